"""Tickets found at initialisation, against their dense network (the paper's Algorithm 2).

Score the blocks of the untrained network once, remove the ``p`` lowest, train what is
left like the dense network. Every network starts from the same weights. They are trained
in turns, an epoch each, so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from blockprune.api import prune
from blockprune.blocks import find_blocks
from blockprune.costs import model_costs
from blockprune.data import ImageData, balanced_batch, make_loader, size_of
from blockprune.errors import DataError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.results import ExperimentResult, NetworkResult, RecoveredResult
from blockprune.lottery.training import Progress, evaluate, train, train_epochs
from blockprune.plan import PruningPlan, make_plan
from blockprune.profiling import Latency, compare_latency
from blockprune.recovery import recover, recovery_of
from blockprune.scoring import score_blocks
from blockprune.surgery import cut_blocks
from blockprune.tickets import plan_of

__all__ = ["Policy", "Watcher", "tickets_at_initialisation"]

DENSE = 0
"""The ``p`` of the dense network among the tickets."""

RECOVERED = -1
"""Stands for the recovered network where those are timed."""

RECOVERED_FROM = 512
"""Training images that a recovery reads."""

IMAGES_PER_CLASS = 10
"""Of the scoring batch, as in GraSP's reference code."""

WARM_UP_STEPS = 3
"""Steps of a network thrown away, before anything is timed."""


class Watcher(Protocol):
    """What wants to know how far an experiment is."""

    def stage(self, text: str) -> None:
        """Something begins: ``text`` says what."""

    def step(self, p: int, step: Progress) -> None:
        """The network of ``p`` (0: dense) took one training step."""


@dataclass(frozen=True)
class Policy:
    """Which tickets to look for.

    Attributes:
        ps: numbers of blocks to remove, one ticket each.
        criterion: name of the criterion that ranks the blocks.
        protect_first: never remove the first removable block, as the paper does not.
        min_blocks_per_stage: residual blocks that stay in each stage.
        xi_points: accuracy, in percentage points, that a winning ticket may lose.
        latency_batch_size: images of one timed forward pass.
        recover_p: how many blocks the trained dense network loses, to be recovered without
            training; None: this is left out.
    """

    ps: tuple[int, ...] = (1, 2, 3, 4, 5)
    criterion: str = "grasp"
    protect_first: bool = True
    min_blocks_per_stage: int = 2
    xi_points: float = 1.0
    latency_batch_size: int = 64
    recover_p: int | None = None


def tickets_at_initialisation(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    policy: Policy | None = None,
    *,
    name: str | None = None,
    watcher: Watcher | None = None,
) -> ExperimentResult:
    """Find tickets in an untrained network and train them and the network alike.

    Args:
        model: untrained; neither changed nor trained, copies are.
        data: what to train and test on.
        recipe: how every network is trained; its seed also draws the scoring batch.
        policy: which tickets; the paper's choice if None.
        name: of the model, for the report; its class's name if None.
        watcher: told of every stage and step.

    Returns:
        :class:`ExperimentResult`, the dense network and one ticket for each ``p``.

    Raises:
        PlanError: fewer blocks can be removed than a ``p`` asks for.
        DataError: the data set is empty, or a class has fewer than 10 images.
        TrainingDivergedError: a network's loss is not finite.

    Example:
        ``tickets_at_initialisation(resnet32(in_channels=1), load_digits(), Recipe(epochs=5))``

    Source: Jordao et al., Algorithm 2.
    """
    policy = policy or Policy()
    watcher = watcher or _Silent()
    image = _first_image(data.train)

    watcher.stage(f"Scoring blocks with {policy.criterion}")
    batch = balanced_batch(data.train, data.num_classes, IMAGES_PER_CLASS, seed=recipe.seed)
    analysis = find_blocks(model, image)
    protected = analysis.names[:1] if policy.protect_first else ()
    table = score_blocks(
        model, policy.criterion, batch, example_inputs=image, seed=recipe.seed, analysis=analysis
    )
    plans = {
        p: make_plan(
            analysis,
            table,
            p=p,
            protect=protected,
            min_blocks_per_stage=policy.min_blocks_per_stage,
        )
        for p in policy.ps
    }

    watcher.stage("Cutting and verifying tickets")
    networks: dict[int, nn.Module] = {DENSE: copy.deepcopy(model)}
    for p, plan in plans.items():
        networks[p] = cut_blocks(model, analysis, plan)

    watcher.stage("Warming up")
    _warm_up(model, data, recipe)
    watcher.stage("Training")
    seconds = _train_in_turns(networks, data, recipe, watcher)
    watcher.stage("Evaluating")
    accuracies = {p: evaluate(network, data.test).accuracy for p, network in networks.items()}
    timed = dict(networks)
    recovery = None
    if policy.recover_p is not None:
        watcher.stage("Cutting the trained network, and recovering it")
        recovery = _recovered(networks[DENSE], data, policy, protected)
        timed[RECOVERED] = recovery.recovered
    watcher.stage("Timing forward passes")
    latencies = _latencies(timed, image, policy.latency_batch_size)

    merges = sum(len(stage.blocks) + stage.fixed for stage in analysis.stages)
    results = {
        p: _result(p, network, plans.get(p), merges, image, accuracies[p], seconds[p], latencies[p])
        for p, network in networks.items()
    }
    return ExperimentResult(
        model=name or type(model).__name__,
        data=data.name,
        image_shape=data.image_shape,
        train_images=size_of(data.train),
        test_images=size_of(data.test),
        criterion=table.criterion,
        seed=recipe.seed,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        latency_batch_size=policy.latency_batch_size,
        threads=torch.get_num_threads(),
        device=str(next(networks[DENSE].parameters()).device),
        xi_points=policy.xi_points,
        scores=dict(table.scores),
        protected=tuple(protected),
        min_blocks_per_stage=policy.min_blocks_per_stage,
        dense=results[DENSE],
        tickets=tuple(results[p] for p in policy.ps),
        recovered=recovery and recovery.result(data, merges, image, latencies[RECOVERED]),
    )


@dataclass(frozen=True)
class _Recovery:
    plan: PruningPlan
    cut: nn.Module
    recovered: nn.Module
    seconds: float

    def result(
        self, data: ImageData, merges: int, image: Tensor, latency: Latency
    ) -> RecoveredResult:
        record = recovery_of(self.recovered)
        assert record is not None
        p = len(self.plan.remove)
        cut, recovered = (
            _result(
                p,
                network,
                self.plan,
                merges,
                image,
                evaluate(network, data.test).accuracy,
                seconds,
                latency,
            )
            for network, seconds in ((self.cut, 0.0), (self.recovered, self.seconds))
        )
        return RecoveredResult(
            criterion=self.plan.criterion,
            method=record.method,
            samples=record.samples,
            cut=cut,
            recovered=recovered,
        )


def _recovered(
    dense: nn.Module, data: ImageData, policy: Policy, protected: Sequence[str]
) -> _Recovery:
    """Cut the trained network by block influence, and refit it, as a user of it would."""
    images = Subset(data.train, range(min(RECOVERED_FROM, size_of(data.train))))
    loader = make_loader(images, policy.latency_batch_size)
    cut = prune(
        dense,
        "block_influence",
        policy.recover_p,
        data=loader,
        protect=protected,
        min_blocks_per_stage=policy.min_blocks_per_stage,
    )
    begin = time.perf_counter()
    recovered = recover(cut, dense, loader)
    seconds = time.perf_counter() - begin
    plan = plan_of(cut)
    assert plan is not None
    return _Recovery(plan, cut, recovered, seconds)


def _first_image(dataset: Dataset[Any]) -> Tensor:
    size_of(dataset)
    image, _ = dataset[0]
    if not isinstance(image, Tensor):
        raise DataError(f"The data set's images are {type(image).__name__}, not tensors.")
    return image.unsqueeze(0)


def _warm_up(model: nn.Module, data: ImageData, recipe: Recipe) -> None:
    # The first steps of a process load kernels and allocate; the network that happens to
    # be trained first must not pay for that.
    images = min(size_of(data.train), WARM_UP_STEPS * recipe.batch_size)
    once = Recipe(epochs=1, lr=recipe.lr, batch_size=recipe.batch_size)
    train(copy.deepcopy(model), Subset(data.train, range(images)), once)


def _train_in_turns(
    networks: Mapping[int, nn.Module], data: ImageData, recipe: Recipe, watcher: Watcher
) -> dict[int, float]:
    """Train all networks, an epoch each at a time; return the seconds each took."""
    seconds = dict.fromkeys(networks, 0.0)
    with ExitStack() as stack:
        runs = {
            p: stack.enter_context(
                closing(train_epochs(network, data.train, recipe, on_step=partial(watcher.step, p)))
            )
            for p, network in networks.items()
        }
        for epoch in range(recipe.epochs):
            order: Sequence[int] = list(runs)
            for p in order if epoch % 2 == 0 else reversed(order):
                seconds[p] += next(runs[p]).seconds
    return seconds


def _latencies(
    networks: Mapping[int, nn.Module], image: Tensor, batch_size: int
) -> dict[int, Latency]:
    measured = compare_latency(
        {str(p): network for p, network in networks.items()}, image, batch_sizes=(batch_size,)
    )
    return {p: measured[str(p)][0] for p in networks}


def _result(
    p: int,
    network: nn.Module,
    plan: PruningPlan | None,
    merges: int,
    image: Tensor,
    accuracy: float,
    seconds: float,
    latency: Latency,
) -> NetworkResult:
    removed = () if plan is None else plan.remove
    costs = model_costs(network, image.to(next(network.parameters()).device))
    return NetworkResult(
        p=p,
        removed=removed,
        blocks=merges - len(removed),
        params=costs.params,
        macs=costs.macs,
        accuracy=accuracy,
        train_seconds=seconds,
        latency_ms=latency.median_ms,
        latency_iqr_ms=latency.iqr_ms,
    )


class _Silent:
    def stage(self, text: str) -> None:
        del text

    def step(self, p: int, step: Progress) -> None:
        del p, step
