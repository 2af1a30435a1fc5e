"""Clocks, and calls that take turns under them.

A machine's speed changes over seconds (frequency, temperature, other programs), often by more
than what is compared differs. So the calls take turns: a round times each of them once, the
next round in the reverse order, and the figures of one round belong together.
"""

from __future__ import annotations

import importlib
import logging
import math
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch

__all__ = ["Clock", "clock_for", "take_turns"]

MIN_SAMPLE_SECONDS = 0.002
"""Shorter samples would measure the clock; short calls are repeated up to this."""

Call = Callable[[], object]


class Clock(Protocol):
    """Measures how long a call takes."""

    def seconds(self, call: Call, passes: int) -> float:
        """Return the mean time of `passes` calls in a row, in seconds."""


@dataclass(frozen=True)
class HostClock:
    """The clock of ``torch.utils.benchmark``, which waits for an accelerator if there is one."""

    def seconds(self, call: Call, passes: int) -> float:
        """Return the mean time of `passes` calls in a row, in seconds."""
        return timeit.Timer(call, timer=_benchmark().timer).timeit(passes) / passes


@dataclass(frozen=True)
class CudaClock:
    """Two marks in the queue of a GPU: the time between them, without that of waiting for it.

    Where the GPU is done before the next operation reaches it, the gap counts, as it does for
    whoever waits for the result.
    """

    device: torch.device

    def seconds(self, call: Call, passes: int) -> float:
        """Return the mean time of `passes` calls in a row, in seconds."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            first, last = _mark(), _mark()
            first.record()
            for _ in range(passes):
                call()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3 / passes


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def take_turns(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    repeats: int,
    warmup: int,
    threads: int | None = None,
    refused: Callable[[str, Exception], Exception],
) -> dict[str, tuple[float, ...]]:
    """Return the milliseconds of each call in each round.

    Args:
        calls: by name.
        clock: of the device that they run on.
        repeats: rounds.
        warmup: untimed calls of each before the first round. One more comes before each
            sample, since the call before it was another's, and left its own data in the caches.
        threads: of torch inside an operation; what torch is set to if None.
        refused: makes the error to raise of a name and the error of its first call.
    """
    with _benchmark().set_torch_threads(torch.get_num_threads() if threads is None else threads):
        passes = {}
        for name, call in calls.items():
            try:
                clock.seconds(call, warmup)
            except Exception as error:
                raise refused(name, error) from error
            estimate = clock.seconds(call, 1)
            passes[name] = max(1, math.ceil(MIN_SAMPLE_SECONDS / max(estimate, 1e-9)))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(repeats):
            # Turning the order over cancels a steady drift within a round as well.
            order = list(calls) if number % 2 == 0 else list(reversed(list(calls)))
            for name in order:
                calls[name]()
                samples[name].append(1e3 * clock.seconds(calls[name], passes[name]))
    return {name: tuple(figures) for name, figures in samples.items()}


@cache
def _benchmark() -> ModuleType:
    """Return ``torch.utils.benchmark``, imported in silence.

    It loads the C++ extension builder, which logs where it looks for CUDA; nothing is built here.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("torch.utils.benchmark")
    finally:
        logger.setLevel(level)
