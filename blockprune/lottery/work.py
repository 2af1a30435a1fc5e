"""What each kind of stage does. `perform` runs in whatever process an executor has.

A stage is told everything by its inputs, and reads what earlier stages left in the store. It sees
no other stage of its time, so any number of them can run at once, in any order.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Subset

from blockprune.api import Planner
from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.costs import UncountedWarning, model_costs
from blockprune.criteria import Criterion, NoDataWarning, ZeroScoresWarning, criterion_of
from blockprune.data import ImageData, balanced_batch, load_data, make_loader, size_of
from blockprune.errors import ApproximationWarning, CriterionError, DataError, ModelSpecError
from blockprune.imports import NotFound, imported
from blockprune.lottery.alike import block_similarity
from blockprune.lottery.checkpoints import FINAL, Trainer, state_file
from blockprune.lottery.early_bird import has_settled
from blockprune.lottery.merges import residual_merges
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.stages import Stage, StageStore
from blockprune.lottery.state import TrainingState, load_state
from blockprune.lottery.steps import Step
from blockprune.lottery.training import evaluate
from blockprune.lottery.weights import start_of
from blockprune.models.building import model_and_inputs, model_factory
from blockprune.plan import PruningPlan, Selection, make_plan
from blockprune.profiling import compare_latency
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.scoring import score_blocks
from blockprune.surgery import cut_blocks

__all__ = ["WORK", "Bench", "Job", "Setting", "criterion_named", "fresh_seed", "perform"]

SIMILARITY_IMAGES = 512
SIMILARITY_BATCH = 128
"""Of the test set, in its order: enough for a CKA to two digits, and little to compute."""

OWN_WARNINGS = (ApproximationWarning, NoDataWarning, UncountedWarning, ZeroScoresWarning)
"""What a reader of the results must know."""

Made = tuple[dict[str, Any], dict[str, Any]]
"""What a stage found, and what its clock said."""

_ONE_AT_A_TIME = threading.Lock()
"""Generators and the number of threads belong to the process, so its stages take turns."""


@dataclass(frozen=True)
class Job:
    """A stage on its way to a worker; all plain values.

    Attributes:
        stage: what to do.
        store: the folder of all stages, which every worker must see under this name.
        data_dir: the folder of the data, likewise; None where the data need none.
        checkpoint_epochs: how often a training is written down.
        curves: the folder for TensorBoard; None: no curves are written.
    """

    stage: Stage
    store: str
    data_dir: str | None = None
    checkpoint_epochs: int = 5
    curves: str | None = None


def perform(job: Job) -> str | None:
    """Do the work of a stage and write its output; return the error in words, None if none.

    An error is a value, so that an executor retries what was lost and not what went wrong.
    """
    store = StageStore(Path(job.store))
    inputs = job.stage.inputs
    try:
        with _ONE_AT_A_TIME, preserved_rng(), _threads(int(inputs["setting"]["threads"])):
            bench = Bench(job, store, Setting.of(inputs["setting"], job.data_dir))

            def make(folder: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
                with _own_warnings() as said:
                    found, times = WORK[job.stage.kind](bench, inputs, folder)
                return found, times, tuple(dict.fromkeys((*bench.notes, *said)))

            store.write(job.stage, make)
    # Whatever it is, the other stages go on, and the run says what could not be done.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class Setting:
    """What all stages of a run have in common: the model and the data.

    Attributes:
        model: name and arguments of the factory.
        data: name, image size and options of the data set.
        granularity: of the blocks.
        data_dir: the folder of the data.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    granularity: str
    data_dir: str | None

    @classmethod
    def of(cls, told: Mapping[str, Any], data_dir: str | None) -> Setting:
        """Return the setting that is told in a stage's inputs."""
        return cls(told["model"], told["data"], told["granularity"], data_dir)

    @cached_property
    def images(self) -> ImageData:
        """The data; those of the latest setting are kept in memory."""
        return _images(json.dumps(dict(self.data), sort_keys=True), self.data_dir)

    @cached_property
    def image(self) -> Tensor:
        """A batch of the first training image."""
        size_of(self.images.train)
        image, _ = self.images.train[0]
        if not isinstance(image, Tensor):
            raise DataError(f"The data set's images are {type(image).__name__}, not tensors.")
        return image.unsqueeze(0)

    def build(self, seed: int) -> nn.Module:
        """Build the dense network with the weights of a seed.

        Raises:
            ModelSpecError: it cannot be built.
        """
        name, arguments = self.model["name"], self.model["arguments"]
        factory = model_factory(name, arguments)
        with preserved_rng():
            seed_rng(seed)
            try:
                built = factory()
            except Exception as error:
                raise ModelSpecError(
                    f"{name} cannot be built with the arguments {dict(arguments)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return model_and_inputs(name, built)[0]

    def analyse(self, model: nn.Module) -> BlockAnalysis:
        """Find the blocks of a model of this setting."""
        device = next(model.parameters()).device
        return find_blocks(model, self.image.to(device), self.granularity)

    def ticket(self, seed: int, removed: tuple[str, ...], *, verify: bool = False) -> nn.Module:
        """Return the network of a seed without some blocks; nothing removed: the dense one."""
        model = self.build(seed)
        if not removed:
            return model
        analysis = self.analyse(model)
        plan = PruningPlan(
            remove=removed,
            granularity=analysis.granularity,
            fingerprint=analysis.fingerprint,
        )
        return cut_blocks(model, analysis, plan, verify=verify)


class Bench:
    """Where one stage is worked on.

    Attributes:
        job: what to do.
        store: of all stages.
        setting: the model and the data.
        notes: what the stage wants known.
    """

    def __init__(self, job: Job, store: StageStore, setting: Setting) -> None:
        self.job = job
        self.store = store
        self.setting = setting
        self.notes: list[str] = []

    def state(self, source: Mapping[str, Any]) -> TrainingState:
        """Return the state that inputs name: of a seed's new network, or of a dense training."""
        if "seed" in source:
            return TrainingState.of(self.setting.build(source["seed"]))
        step = source["step"]
        file = FINAL if step is None else state_file(Step.model_validate(step))
        return load_state(self.store.folder / source["dense"] / file)

    def train(self, model: nn.Module, inputs: Mapping[str, Any], folder: Path, **how: Any) -> Made:
        """Train a network, and leave its states in the folder."""
        trainer = Trainer(
            data=self.setting.images,
            unfinished=self.store.unfinished(self.job.stage),
            every=self.job.checkpoint_epochs,
            test_every_epoch=inputs["test_every_epoch"],
            name=self.job.stage.folder,
            curves=self.job.curves,
        )
        epochs = trainer.train(model, folder, **how)
        self.notes += trainer.notes
        found = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in epochs]
        return {"epochs": found}, {"seconds": [epoch["seconds"] for epoch in epochs]}


def fresh_seed(seed: int) -> int:
    """Return the seed of the new weights of a replicate: those of no other, and not its own."""
    return 2**32 - 1 - seed


# --- the kinds ------------------------------------------------------------------------------------


def _dense(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    return bench.train(
        bench.setting.build(inputs["seed"]),
        inputs,
        folder,
        recipe=Recipe.model_validate(inputs["recipe"]),
        keep=[Step.model_validate(step) for step in inputs["keep"]],
        with_optimizer=inputs["carry_optimizer"],
    )


def _ticket(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    ticket = bench.setting.ticket(inputs["seed"], tuple(inputs["removed"]))
    policy, source = inputs["weights"], inputs["from"]
    state = bench.state(source)
    how: dict[str, Any] = {}
    if policy == "rewind":
        how = {"dense_state_at": lambda _: state}
    else:
        how = {"fresh" if policy == "reinit" else "dense_final": state}
    if inputs["rewound_to"] is not None:
        how["rewound_to"] = Step.model_validate(inputs["rewound_to"])
    if policy == "finetune":
        how["finetune_epochs"] = inputs["finetune"]["epochs"]
        how["finetune_lr"] = inputs["finetune"]["lr"]
    start = start_of(
        policy,
        ticket,
        recipe=Recipe.model_validate(inputs["recipe"]),
        carry_optimizer=inputs["carry_optimizer"] and policy != "reinit",
        **how,
    )
    return bench.train(ticket, inputs, folder, recipe=start.recipe, start=start.state)


def _score(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    del folder
    planner = _planner(bench, inputs)
    table = score_blocks(
        planner.model,
        planner.criterion,
        planner.data,
        example_inputs=planner.analysis.traced.call,
        seed=planner.seed,
        analysis=planner.analysis,
    )
    return {"criterion": inputs["criterion"], "scores": dict(table.scores)}, {}


def _plan(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose the lowest scores, and prove the cut."""
    del folder
    model = bench.setting.build(inputs["seed"])
    analysis = bench.setting.analyse(model)
    plan = make_plan(
        analysis,
        inputs["scores"],
        p=inputs["p"],
        protect=inputs["protect"],
        min_blocks_per_stage=inputs["min_blocks_per_stage"],
    )
    cut_blocks(model, analysis, plan)
    return {"removed": list(plan.remove)}, {}


def _iterative(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose a block, score what is left, and so on; prove the cut."""
    del folder
    planner = _planner(bench, inputs)
    plan = planner.plan(inputs["p"])
    cut_blocks(planner.model, planner.analysis, plan)
    return {"removed": list(plan.remove), "scores": dict(plan.scores)}, {}


def _early_bird(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Draw a mask after every epoch until masks have settled; prove the cut."""
    del folder
    candidates = len(_candidates(bench, inputs))
    masks: list[tuple[str, ...]] = []
    for step in inputs["steps"]:
        planner = _planner(bench, {**inputs, "source": {"dense": inputs["dense"], "step": step}})
        plan = planner.plan(inputs["p"])
        masks.append(plan.remove)
        settled = has_settled(
            masks, candidates, window=inputs["window"], distance=inputs["distance"]
        )
        if settled:
            cut_blocks(planner.model, planner.analysis, plan)
            return {"masks": masks, "removed": list(plan.remove), "step": step}, {}
    return {"masks": masks, "removed": None, "step": None}, {}


def _evaluation(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    del folder
    model = bench.setting.ticket(inputs["seed"], tuple(inputs["removed"]))
    load_state(bench.store.folder / inputs["network"] / FINAL).load_into(model)
    dense = bench.setting.analyse(bench.setting.build(inputs["seed"]))
    merges = sum(len(stage.blocks) + stage.fixed for stage in dense.stages)
    costs = model_costs(model, bench.setting.image)
    result = evaluate(model, bench.setting.images.test)
    return {
        "accuracy": result.accuracy,
        "loss": result.loss,
        "blocks": merges - len(inputs["removed"]),
        "params": costs.params,
        "macs": costs.macs,
    }, {}


def _latency(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    del folder
    device = _device()
    networks = {
        json.dumps(removed): bench.setting.ticket(inputs["seed"], tuple(removed)).to(device)
        for removed in inputs["structures"]
    }
    measured = compare_latency(
        networks,
        bench.setting.image.to(device),
        batch_sizes=(inputs["batch"],),
        repeats=inputs["repeats"],
    )
    times = [
        {"removed": json.loads(name), "median_ms": one.median_ms, "iqr_ms": one.iqr_ms}
        for name, [one] in measured.items()
    ]
    return {}, {"latencies": times}


def _similarity(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    del folder
    removed = tuple(inputs["removed"])
    dense, ticket = (
        bench.setting.build(inputs["seed"]),
        bench.setting.ticket(inputs["seed"], removed),
    )
    rows = [merge.name for merge in residual_merges(bench.setting.analyse(dense))]
    columns = [name for name in rows if name not in removed]
    for network, stage in ((dense, inputs["dense"]), (ticket, inputs["network"])):
        load_state(bench.store.folder / stage / FINAL).load_into(network)
        network.to(_device())
    test = bench.setting.images.test
    images = Subset(test, range(min(size_of(test), SIMILARITY_IMAGES)))
    values = block_similarity(
        dense,
        ticket,
        make_loader(images, SIMILARITY_BATCH),
        rows,
        columns,
        granularity=bench.setting.granularity,
    )
    return {"rows": rows, "columns": columns, "values": values}, {}


WORK: dict[str, Callable[[Bench, Mapping[str, Any], Path], Made]] = {
    "dense": _dense,
    "ticket": _ticket,
    "score": _score,
    "plan": _plan,
    "iterative": _iterative,
    "early-bird": _early_bird,
    "evaluation": _evaluation,
    "latency": _latency,
    "similarity": _similarity,
}
"""What a kind of stage does: given a bench, its inputs and a folder to leave tensors in."""


def _planner(bench: Bench, inputs: Mapping[str, Any]) -> Planner:
    """Return what ranks the blocks of the network that inputs name, with weights and batch."""
    setting, seed = bench.setting, inputs["seed"]
    model = setting.build(seed)
    if "dense" in inputs["source"]:
        # What training moves is scored, as it is what a rewind goes back to.
        bench.state(inputs["source"]).load_into(model, averaged=False)
    model.to(_device())
    images = setting.images
    return Planner(
        model,
        setting.analyse(model),
        criterion_named(inputs["criterion"]),
        balanced_batch(images.train, images.num_classes, inputs["images_per_class"], seed=seed),
        seed=seed,
        schedule=inputs.get("schedule", "one-shot"),
        protect=tuple(inputs.get("protect", ())),
        min_blocks_per_stage=inputs.get("min_blocks_per_stage", 0),
    )


def criterion_named(name: str) -> str | Criterion:
    """Return the criterion of that name, or the callable that package.module:function is.

    Raises:
        CriterionError: there is none.
    """
    module, separator, attribute = name.partition(":")
    if not separator:
        return criterion_of(name)[0]
    try:
        found = imported(module, attribute)
    except NotFound as error:
        raise CriterionError(f"The criterion {name!r}: {error}") from error
    return criterion_of(found)[1]


def _candidates(bench: Bench, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the blocks that may go."""
    analysis = bench.setting.analyse(bench.setting.build(inputs["seed"]))
    selection = Selection(analysis, inputs["protect"], inputs["min_blocks_per_stage"])
    return tuple(b.name for b in analysis.blocks if selection.may_go(b, len(analysis.blocks)))


@lru_cache(maxsize=1)
def _images(told: str, data_dir: str | None) -> ImageData:
    choice = json.loads(told)
    options = dict(choice["options"])
    if choice["image_size"] is not None:
        options["image_size"] = choice["image_size"]
    return load_data(choice["name"], data_dir, **options)


def _device() -> torch.device:
    device: torch.device = Accelerator().device
    return device


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_warnings() -> Iterator[list[str]]:
    """Give a list of what this package warns of; other warnings go where they would."""
    said: list[str] = []
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, OWN_WARNINGS):
                said.append(str(message))
            else:
                shown(message, category, *place, **more)

        for category in OWN_WARNINGS:
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        yield said
