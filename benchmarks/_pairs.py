"""Timing calls in turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], Any]


def again(run: Run) -> Callable[[], Run]:
    """Return what `alternate` takes for a call that needs nothing made ready."""
    return lambda: run


def alternate(
    runs: Mapping[str, Callable[[], Run]],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each call, one figure a round, the order of a round turning over.

    Args:
        runs: each entry is called untimed before its sample, and returns the call to time.
        rounds: samples of each.
        warmup: untimed calls of each before the first round.
        device: a GPU is waited for before and after each sample.
    """
    for make_ready in runs.values():
        for _ in range(warmup):
            make_ready()()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in order:
            samples[name].append(_seconds(runs[name](), device))
    return samples


def ratio(own: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Return the median and the quartiles of the ratios within the rounds."""
    found = [a / b for a, b in zip(own, reference, strict=True)]
    low, middle, high = quartiles(found)
    return {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile; all alike for a single value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1e3 * statistics.median(seconds), 4)


def _seconds(run: Run, device: torch.device | None) -> float:
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
