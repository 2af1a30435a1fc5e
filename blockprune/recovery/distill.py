"""Training a ticket towards its dense model: the outputs, and the stream where both have it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.errors import RecoveryError, TrainingDivergedError
from blockprune.losses import LossFunction
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.recovery.adapters import add_adapters, layers_in, merge_adapters
from blockprune.recovery.checkpoint import Checkpoint, code_of, key_of
from blockprune.recovery.data import Batches
from blockprune.recovery.distillation import Distillation, OnProgress, Progress
from blockprune.recovery.folding import tensors_of
from blockprune.recovery.gaps import Location
from blockprune.recovery.masks import NOTHING_COUNTS, Masks
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
        loss_fn: of the labels; None: see `loss_of`.
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
    first = batches.first()
    found = gaps_in(networks, first)
    gaps = [gap for gap, _ in found]
    streams = {gap.stream: gap.target for gap in gaps}
    places = streams | {merge: merge for merge in merges_in(networks, first, found)}
    pair = Pair(networks, places, masks, call, recipe, run.loss_fn, run.accelerator)
    model = networks.cut.model
    digest = None if run.checkpoint is None else hashlib.blake2b(digest_size=32)
    before, steps = _residuals(pair, streams, batches, recipe, digest)
    checkpoint = None
    if run.checkpoint is not None and digest is not None:
        keys = _keys(networks, trained, masks, recipe, run, digest.hexdigest())
        checkpoint = Checkpoint(run.checkpoint, keys)
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


def _keys(
    networks: Networks,
    trained: frozenset[str],
    masks: Masks,
    recipe: Distillation,
    run: Run,
    digest: str,
) -> dict[str, str]:
    """Return hashes of what the training depends on, by what it is."""
    accelerator = run.accelerator
    described: dict[str, dict[str, Any]] = {
        "ticket": {
            "removed": [block for gap in networks.gaps for block in gap.blocks],
            "trained": sorted(trained),
        },
        "dense model": {},
        "recipe": recipe.model_dump(),
        "precision": {"name": None if accelerator is None else accelerator.mixed_precision},
        "loss": {"code": code_of(run.loss_fn)},
        "mask": {"code": code_of(masks.mask_fn)},
        "data": {"digest": digest},
    }
    tensors = {
        "ticket": tensors_of(networks.cut.model),
        "dense model": tensors_of(networks.dense.model),
    }
    return {what: key_of(value, tensors.get(what, {})) for what, value in described.items()}


def _residuals(
    pair: Pair,
    streams: Mapping[Location, Location],
    batches: Batches,
    recipe: Distillation,
    digest: hashlib.blake2b | None = None,
) -> tuple[dict[Location, float], int]:
    """Return what each stream lacks, as a share of the squares of its target, and the batches read.

    Batches come in the order of the first epoch, and `digest` is given each of them.

    Raises:
        RecoveryError: activations that are not finite, or no position that counts.
    """
    sums: dict[Location, Tensor] = {own: torch.zeros(2, dtype=torch.float64) for own in streams}
    count = 0
    with preserved_rng():
        seed_rng(_seed(recipe, 0))
        for batch in batches.parts(recipe.batch_size):
            count += 1
            if digest is not None:
                of_batch = tensors_in((batch.call.args, batch.call.kwargs, batch.targets))
                numbered = {str(number): value for number, value in enumerate(of_batch)}
                digest.update(key_of({}, numbered).encode())
            for own, found in pair.missing(batch, streams).items():
                sums[own] += found.double().cpu()
    if not all(bool(found.isfinite().all()) for found in sums.values()):
        raise RecoveryError(
            "the stream has numbers that are not finite, on these data. Leave out the samples that "
            "cause it, or use a wider precision."
        )
    if not all(bool(size > 0) for _, size in sums.values()):
        raise RecoveryError(NOTHING_COUNTS)
    shares = {own: float(error / size) for own, (error, size) in sums.items()}
    return shares, count


def _seed(recipe: Distillation, step: int) -> int:
    """Return the seed of what is drawn at a step."""
    return (recipe.seed * 1_000_003 + step) % 2**32
