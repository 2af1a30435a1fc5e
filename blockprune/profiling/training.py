"""How long a step of training takes, and an epoch of such steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockprune.errors import MeasurementError
from blockprune.profiling.arguments import arguments_of, batches, check_counts, device_of
from blockprune.profiling.clocks import Clock, clock_for, take_turns
from blockprune.profiling.energy import GRID_KG_PER_KWH, Energy, metered_energy
from blockprune.profiling.execution import Execution, recompiling
from blockprune.profiling.samples import Timing
from blockprune.profiling.steps import OutputLoss, TrainingStep
from blockprune.randomness import preserved_rng, seed_rng

__all__ = ["StepTime", "compare_training", "metered_step", "steps_of_epoch"]


@dataclass(frozen=True)
class StepTime(Timing):
    """Time of one step of training on one batch: forward, loss, backward, optimiser."""

    def epoch_seconds(self, samples: int) -> float:
        """Return the seconds of one epoch at the median: ``ceil(samples / batch_size)`` steps.

        Raises:
            MeasurementError: `samples` is not a count from 1 on.
        """
        return steps_of_epoch(samples, self.batch_size) * self.median_ms / 1e3


def steps_of_epoch(samples: int, batch_size: int) -> int:
    """Return the steps of one epoch: ``ceil(samples / batch_size)``.

    Raises:
        MeasurementError: a number is not a count from 1 on.
    """
    check_counts((batch_size,), samples=samples)
    return math.ceil(samples / batch_size)


def compare_training(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (64,),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    loss_fn: OutputLoss | None = None,
    execution: Execution | None = None,
    clock: Clock | None = None,
) -> dict[str, tuple[StepTime, ...]]:
    """Time training steps of several modules in turns, so that drift cancels.

    Copies are trained: by stochastic gradient descent with momentum, in train mode, on the device
    that the modules are on. A step is what :class:`TrainingStep` says. Loading data is no part of
    it. All random generators come back as they were.

    Args:
        models: the modules by name; all take the same inputs, and are on one device.
        example_inputs, batch_sizes: as for :func:`compare_latency`.
        repeats: rounds, one figure each, at least 1.
        warmup: untimed steps of each module before the first round, at least 1.
        threads: of torch inside an operation; what torch is set to if None.
        loss_fn: of a module's output. None: the loss that the output brings along, else cross
            entropy of its first floating-point tensor, else its mean.
        execution: memory layout, compiled or not; a number format is that of autocast.
        clock: what time is taken by; the one of the device if None.

    Returns:
        For each name, one :class:`StepTime` a batch size, in the order given.

    Raises:
        MeasurementError: an argument is out of range, raised before a module runs; or a module
            cannot be trained on the inputs, or cannot be compiled.

    Example:
        >>> import torch
        >>> from blockprune.profiling import compare_training
        >>> nets = {"dense": torch.nn.Linear(4, 2)}
        >>> [step] = compare_training(nets, torch.zeros(1, 4), batch_sizes=(8,), repeats=3)["dense"]
        >>> step.batch_size, len(step.samples_ms)
        (8, 3)
    """
    if not models:
        raise MeasurementError("There is no model to train; give at least one.")
    check_counts(batch_sizes, repeats=repeats, warmup=warmup, threads=threads)
    execution = execution or Execution()
    batched = batches(arguments_of(example_inputs), batch_sizes)
    device = device_of(next(iter(models.values())))
    execution.check(device)
    measured: dict[str, list[StepTime]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        if execution.compile:
            stack.enter_context(recompiling())
        for batch_size, batch in batched:
            seed_rng(0)
            steps = {
                name: TrainingStep(name, model, batch, loss_fn, execution)
                for name, model in models.items()
            }
            samples = take_turns(
                steps,
                clock or clock_for(device),
                repeats=repeats,
                warmup=warmup,
                threads=threads,
                refused=lambda name, error, steps=steps: steps[name].refused(error),  # type: ignore[misc]
            )
            for name, figures in samples.items():
                measured[name].append(StepTime(batch_size, figures))
    return {name: tuple(times) for name, times in measured.items()}


def metered_step(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_size: int = 64,
    at_least_seconds: float = 10.0,
    grid_kg_per_kwh: float = GRID_KG_PER_KWH,
    loss_fn: OutputLoss | None = None,
    execution: Execution | None = None,
) -> Energy:
    """Return the metered energy of one step of training, from as many as fill some seconds.

    Args:
        model, example_inputs, loss_fn, execution: as for :func:`compare_training`.
        batch_size: samples a step.
        at_least_seconds: that steps are taken for; one at least.
        grid_kg_per_kwh: of the grid.

    Raises:
        MeasurementError, MissingExtraError: those of :func:`compare_training` and
            :func:`metered_energy`.

    Example:
        ``metered_step(model, images, batch_size=128).times(steps_of_epoch(50_000, 128)).co2_kg``
    """
    check_counts((batch_size,))
    execution = execution or Execution()
    [(_, batch)] = batches(arguments_of(example_inputs), (batch_size,))
    execution.check(device_of(model))
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        if execution.compile:
            stack.enter_context(recompiling())
        seed_rng(0)
        step = TrainingStep("The model", model, batch, loss_fn, execution)
        try:
            step()
        except Exception as error:
            raise step.refused(error) from error
        taken = 0

        def work() -> None:
            nonlocal taken
            end = time.perf_counter() + at_least_seconds
            while taken == 0 or time.perf_counter() < end:
                step()
                taken += 1
                if step.device.type == "cuda":
                    # The code runs ahead of the GPU, whose work is what is metered.
                    torch.cuda.synchronize(step.device)

        return metered_energy(work, grid_kg_per_kwh=grid_kg_per_kwh).times(1 / taken)
