"""Training a ticket towards its dense model: the outputs, and the stream where both have it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.errors import RecoveryError, TrainingDivergedError
from blockprune.losses import LossFunction
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.recovery.adapters import add_adapters, layers_in, merge_adapters
from blockprune.recovery.checkpoint import Checkpoint, key_of
from blockprune.recovery.data import Batches
from blockprune.recovery.distillation import Distillation, OnProgress, Progress
from blockprune.recovery.folding import tensors_of
from blockprune.recovery.gaps import Location
from blockprune.recovery.masks import Masks
from blockprune.recovery.networks import Networks, gaps_in, merges_in
from blockprune.recovery.optimiser import Optimiser
from blockprune.recovery.pair import Pair
from blockprune.surgery import GapRecord
from blockprune.tracing import Call, tensors_in

__all__ = ["Run", "distilled"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What surrounds a distillation.

    Attributes:
        loss_fn: of the labels; None: cross entropy.
        accelerator: device and mixed precision; None: those of the model.
        checkpoint: the file that it writes now and then, and goes on from if it exists.
        on_progress: called after each step.
    """

    loss_fn: LossFunction | None = None
    accelerator: Accelerator | None = None
    checkpoint: str | os.PathLike[str] | None = None
    on_progress: OnProgress | None = None


def distilled(
    networks: Networks,
    trained: frozenset[str],
    call: Call,
    batches: Batches,
    masks: Masks,
    recipe: Distillation,
    run: Run,
) -> tuple[GapRecord, ...]:
    """Train the cut network in place, and return what each gap lacked before and after.

    Args:
        networks: the cut one is changed.
        trained: names of the parameters that may change.
        call: an example.
        batches: the data.
        masks: which positions count.
        recipe: see `Distillation`.
        run: what surrounds it.

    Raises:
        RecoveryError: nothing can be trained, or the activations are not finite.
        TrainingDivergedError: the loss is not finite.
        CheckpointError: the checkpoint is of something else.
    """
    found = gaps_in(networks, call)
    gaps = [gap for gap, _ in found]
    streams = {gap.stream: gap.target for gap in gaps}
    places = streams | {merge: merge for merge in merges_in(networks, call, found)}
    pair = Pair(networks, places, masks, call, recipe, run.loss_fn, run.accelerator)
    model = networks.cut.model
    before, steps = _residuals(pair, streams, batches, recipe)
    checkpoint = None
    if run.checkpoint is not None:
        key = _key(networks, batches, recipe, run, steps)
        checkpoint = Checkpoint(run.checkpoint, key)
    if recipe.lora_rank is not None:
        with preserved_rng():
            seed_rng(_seed(recipe, 0))
            add_adapters(model, recipe.lora_rank, layers_in(networks.cut, call, trained))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    model.train()
    if recipe.fixed_norms:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    _train(model, pair, batches, recipe, run, checkpoint, steps)
    if recipe.lora_rank is not None:
        merge_adapters(model)
    model.eval().requires_grad_(False)
    after, _ = _residuals(pair, streams, batches, recipe)
    return tuple(
        GapRecord(
            blocks=gap.blocks,
            weights=(),
            residual_before=before[gap.stream],
            residual_after=after[gap.stream],
        )
        for gap in gaps
    )


def _train(
    model: nn.Module,
    pair: Pair,
    batches: Batches,
    recipe: Distillation,
    run: Run,
    checkpoint: Checkpoint | None,
    steps: int,
) -> None:
    """Take all steps that are left, of `steps` an epoch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise RecoveryError(
            "no parameter of the ticket requires a gradient, so there is nothing to train. Set "
            "requires_grad of those that may change."
        )
    optimiser = Optimiser(parameters, recipe, run.accelerator)
    done = 0 if checkpoint is None else checkpoint.resume(model, optimiser)
    total = recipe.epochs * steps
    for epoch in range(done // steps, recipe.epochs):
        with preserved_rng():
            # A loader that shuffles by the global generator has the same order when it resumes.
            seed_rng(_seed(recipe, epoch * steps))
            for step, batch in enumerate(batches.parts(recipe.batch_size), epoch * steps):
                if step < done:
                    continue
                loss = pair.loss(batch, _seed(recipe, step + 1))
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingDivergedError(
                        f"the loss of the distillation is {value} at step {step + 1} of "
                        f"{total}; the ticket is as it was. Use a learning rate below {recipe.lr:g}"
                        ", or data whose activations are finite."
                    )
                optimiser.step(loss, recipe.learning_rate(min(step, total - 1), total))
                if checkpoint is not None:
                    is_end = (step + 1) % steps == 0
                    checkpoint.save(model, optimiser, step + 1, at_once=is_end)
                if run.on_progress is not None:
                    run.on_progress(Progress(done=step + 1, total=total, loss=value))


def _key(
    networks: Networks,
    batches: Batches,
    recipe: Distillation,
    run: Run,
    steps: int,
) -> str:
    """Return a hash of what the training depends on; of the data, of their first batch."""
    loss, accelerator = run.loss_fn, run.accelerator
    described = {
        "recipe": recipe.model_dump(),
        "removed": [block for gap in networks.gaps for block in gap.blocks],
        "steps": steps,
        "precision": None if accelerator is None else accelerator.mixed_precision,
        "loss": None if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__),
    }
    with preserved_rng():
        seed_rng(_seed(recipe, 0))
        first = next(batches.parts(recipe.batch_size))
    tensors = {f"cut/{name}": value for name, value in tensors_of(networks.cut.model).items()}
    tensors |= {f"dense/{name}": value for name, value in tensors_of(networks.dense.model).items()}
    of_batch = tensors_in((first.call.args, first.call.kwargs, first.targets))
    tensors |= {f"batch/{number}": value for number, value in enumerate(of_batch)}
    return key_of(described, tensors)


def _residuals(
    pair: Pair, streams: Mapping[Location, Location], batches: Batches, recipe: Distillation
) -> tuple[dict[Location, float], int]:
    """Return what each stream lacks, as a share of the squares of its target, and the batches read.

    Raises:
        RecoveryError: activations that are not finite.
    """
    sums: dict[Location, Tensor] = {own: torch.zeros(2, dtype=torch.float64) for own in streams}
    count = 0
    for batch in batches.parts(recipe.batch_size):
        count += 1
        for own, found in pair.missing(batch, streams).items():
            sums[own] += found.double().cpu()
    if not all(bool(found.isfinite().all()) for found in sums.values()):
        raise RecoveryError(
            "the stream has numbers that are not finite, on these data. Leave out the samples that "
            "cause it, or use a wider precision."
        )
    return {
        own: float(error / size.clamp_min(1e-300)) for own, (error, size) in sums.items()
    }, count


def _seed(recipe: Distillation, step: int) -> int:
    """Return the seed of what is drawn at a step."""
    return (recipe.seed * 1_000_003 + step) % 2**32
