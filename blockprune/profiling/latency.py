"""How long a forward pass takes, and how modules compare on a machine that drifts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockprune.errors import MeasurementError, TraceError
from blockprune.modes import in_mode
from blockprune.profiling.arguments import (
    Arguments,
    arguments_of,
    batches,
    check_counts,
    device_of,
)
from blockprune.profiling.clocks import Clock, clock_for, take_turns
from blockprune.profiling.execution import Execution, first_line, recompiling
from blockprune.profiling.samples import Timing

__all__ = ["Latency", "compare_latency", "measure_latency"]


@dataclass(frozen=True)
class Latency(Timing):
    """Time of one forward pass of one batch."""


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    execution: Execution | None = None,
) -> tuple[Latency, ...]:
    """Return the latency of ``model`` for each batch size; see :func:`compare_latency`.

    Example:
        >>> import torch
        >>> from blockprune.profiling import measure_latency
        >>> [one] = measure_latency(torch.nn.Linear(4, 2), torch.zeros(1, 4), repeats=3)
        >>> one.batch_size, len(one.samples_ms), one.median_ms > 0
        (1, 3, True)
    """
    measured = compare_latency(
        {"model": model},
        example_inputs,
        batch_sizes=batch_sizes,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
        execution=execution,
    )
    return measured["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    execution: Execution | None = None,
    clock: Clock | None = None,
) -> dict[str, tuple[Latency, ...]]:
    """Time the forward passes of several modules in turns, so that drift cancels.

    Modules run in evaluation mode without gradients, on the device they are on, and get
    their modes back.

    Args:
        models: the modules by name; all take the same inputs, and are on one device.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of
            keyword arguments. Every tensor whose first axis has the batch's length (that
            of the first tensor) is repeated or cut to each batch size; so is a list of
            tensors among the arguments, one a sample.
        batch_sizes: at least one, each at least 1; None: the batch as it is given.
        repeats: rounds, one figure each, at least 1.
        warmup: untimed passes of each module before the first round, at least 1.
        threads: of torch inside an operation; what torch is set to if None.
        execution: number format, memory layout, compiled or not; as the modules are if None.
        clock: what time is taken by; the one of the device if None: marks in the queue of a GPU,
            else that of ``torch.utils.benchmark``.

    Returns:
        For each name, one :class:`Latency` a batch size, in the order given.

    Raises:
        MeasurementError: an argument is out of range, or there is no working compiler; raised
            before a module runs. Or a module cannot be compiled.
        TraceError: a module refuses the inputs; its own error is quoted.

    Example:
        ``compare_latency({"dense": model, "ticket": ticket}, images, batch_sizes=(1, 64))``
    """
    if not models:
        raise MeasurementError("There is no model to time; give at least one.")
    check_counts(batch_sizes, repeats=repeats, warmup=warmup, threads=threads)
    execution = execution or Execution()
    batched = batches(arguments_of(example_inputs), batch_sizes)
    device = device_of(next(iter(models.values())))
    execution.check(device)
    converted = {name: execution.converted(model) for name, model in models.items()}
    measured: dict[str, list[Latency]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(in_mode(False, *converted.values()))
        stack.enter_context(torch.no_grad())
        if execution.compile:
            stack.enter_context(recompiling())
        for batch_size, batch in batched:
            calls = _calls(converted, execution, batch)
            samples = take_turns(
                calls,
                clock or clock_for(device),
                repeats=repeats,
                warmup=warmup,
                threads=threads,
                refused=_not_compiled if execution.compile else _refused,
            )
            for name, figures in samples.items():
                measured[name].append(Latency(batch_size, figures))
    return {name: tuple(latencies) for name, latencies in measured.items()}


def _calls(
    models: Mapping[str, nn.Module], execution: Execution, batch: Arguments
) -> dict[str, Callable[[], object]]:
    """Return the pass of each module; where they are compiled, each has passed once as it is."""
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        inputs = execution.inputs(batch, device_of(model))
        if execution.compile:
            # What the module itself refuses is not the compiler's fault.
            try:
                _pass(model, inputs)()
            except Exception as error:
                raise _refused(name, error) from error
        calls[name] = _pass(execution.runnable(model), inputs)
    return calls


def _pass(model: Callable[..., object], inputs: Arguments) -> Callable[[], object]:
    positional, named = inputs
    return lambda: model(*positional, **named)


def _refused(name: str, error: Exception) -> Exception:
    if isinstance(error, torch.OutOfMemoryError):
        return MeasurementError(f"{name} does not fit in the memory of the device: {error}")
    return TraceError(f"{name} refused the example inputs: {error}")


def _not_compiled(name: str, error: Exception) -> Exception:
    return MeasurementError(
        f"{name} runs, and cannot be compiled: {first_line(error)} Leave compile out."
    )
