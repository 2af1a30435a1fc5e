"""The batch at which a module's throughput stops growing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blockprune.errors import MeasurementError
from blockprune.profiling.arguments import check_counts
from blockprune.profiling.execution import Execution
from blockprune.profiling.latency import measure_latency

__all__ = ["Saturation", "saturated_batch"]

GAIN = 0.05
"""Less growth of throughput than this, for twice the batch, is none."""


@dataclass(frozen=True)
class Saturation:
    """Where throughput stops growing.

    Attributes:
        batch_size: the smallest that is within the gain asked for of twice its size, or the
            largest that could be tried.
        samples_per_s: throughput of each batch size tried, in the order of trying.
        reason: why the search ended: "throughput" stopped growing, the "limit" was reached, or
            twice the batch did not fit in "memory".
    """

    batch_size: int
    samples_per_s: dict[int, float]
    reason: Literal["throughput", "limit", "memory"]


def saturated_batch(
    model: nn.Module,
    example_inputs: Any,
    *,
    limit: int = 1024,
    gain: float = GAIN,
    repeats: int = 5,
    execution: Execution | None = None,
    throughput: Callable[[int], float] | None = None,
) -> Saturation:
    """Double the batch of a forward pass until the samples per second stop growing.

    Args:
        model: as for :func:`measure_latency`.
        example_inputs: that batches are made of.
        limit: the largest batch to try.
        gain: growth of throughput, as a share, below which it counts as none.
        repeats: rounds for each size.
        execution: as for :func:`measure_latency`.
        throughput: samples per second of a batch size; measured if None.

    Raises:
        MeasurementError: an argument is out of range, or not even one sample fits in memory.
        TraceError: the model refuses the inputs.

    Example:
        >>> from torch import nn
        >>> from blockprune.profiling import saturated_batch
        >>> busy = {1: 100.0, 2: 190.0, 4: 300.0, 8: 310.0}
        >>> saturated_batch(nn.Identity(), None, throughput=busy.__getitem__).batch_size
        4
    """
    check_counts((limit,), repeats=repeats)
    if not 0 <= gain < 1:
        raise MeasurementError(f"gain must be a share from 0 on and below 1, got {gain!r}.")

    def measured(batch_size: int) -> float:
        [latency] = measure_latency(
            model, example_inputs, batch_sizes=(batch_size,), repeats=repeats, execution=execution
        )
        return latency.samples_per_s

    throughput = throughput or measured
    tried = {1: throughput(1)}
    size = 1
    while 2 * size <= limit:
        try:
            tried[2 * size] = throughput(2 * size)
        except MeasurementError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                return Saturation(size, tried, "memory")
            raise
        if tried[2 * size] < (1 + gain) * tried[size]:
            return Saturation(size, tried, "throughput")
        size *= 2
    return Saturation(size, tried, "limit")
