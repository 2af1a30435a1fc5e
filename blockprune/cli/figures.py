"""From measurements of a network and its dense one to the plain figures of a report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockprune.profiling import Energy, PeakMemory, Timing
from blockprune.report.bench import EnergyFigure, LatencyFigures, MemoryFigures, TrainingFigures

__all__ = [
    "Beside",
    "joined",
    "latency_figures",
    "mean_energy",
    "memory_figures",
    "percent_saved",
    "training_figures",
]


@dataclass(frozen=True)
class Beside:
    """A time, and the dense network's in the same rounds."""

    own: Timing
    dense: Timing


def latency_figures(times: Beside) -> LatencyFigures:
    """Return the figures of a forward pass."""
    own = times.own
    return LatencyFigures(
        batch=own.batch_size,
        median_ms=own.median_ms,
        iqr_ms=own.iqr_ms,
        interval_ms=own.interval_ms(),
        samples_per_s=own.samples_per_s,
        **_against(times),
    )


def memory_figures(own: PeakMemory, dense: PeakMemory) -> MemoryFigures:
    """Return the figures of a peak."""
    return MemoryFigures(
        batch=own.batch_size,
        peak_bytes=own.peak_bytes,
        state_bytes=own.state_bytes,
        percent=100 * own.peak_bytes / dense.peak_bytes,
        source=own.source,
    )


def training_figures(
    times: Beside, steps: int, memory: MemoryFigures, energy: Energy, co2_percent: float
) -> TrainingFigures:
    """Return the figures of a step of training, and of an epoch of ``steps`` and its energy."""
    own = times.own
    return TrainingFigures(
        batch=own.batch_size,
        step_ms=own.median_ms,
        step_iqr_ms=own.iqr_ms,
        step_interval_ms=own.interval_ms(),
        epoch_seconds=steps * own.median_ms / 1e3,
        epoch_interval_seconds=_scaled(own.interval_ms(), steps / 1e3),
        **_against(times),
        memory=memory,
        kwh=energy.kwh,
        co2_kg=energy.co2_kg,
        co2_percent=co2_percent,
        energy=tuple(
            EnergyFigure(part=part.name, kwh=part.kwh, measured=part.measured, source=part.source)
            for part in energy.parts
        ),
    )


def _against(times: Beside) -> dict[str, Any]:
    """Return the time in % of the dense network's, and its inverse."""
    share, interval = times.own.ratio_to(times.dense), times.own.ratio_interval_to(times.dense)
    # Not the median of the inverted ratios: with an even number of rounds the two would disagree.
    return {
        "percent": 100 * share,
        "percent_interval": _scaled(interval, 100),
        "speed_up": 1 / share,
        "speed_up_interval": None if interval is None else (1 / interval[1], 1 / interval[0]),
    }


def joined(times: Sequence[Timing]) -> Timing:
    """Return all rounds of several timings of one thing as one timing."""
    samples = tuple(sample for timing in times for sample in timing.samples_ms)
    return Timing(times[0].batch_size, samples)


def mean_energy(energies: Sequence[Energy]) -> Energy:
    """Return the mean of several meterings of the same work, part by part."""
    parts = tuple(
        replace(same[0], kwh=statistics.fmean(part.kwh for part in same))
        for same in zip(*(energy.parts for energy in energies), strict=True)
    )
    seconds = statistics.fmean(energy.seconds for energy in energies)
    return Energy(seconds, parts, energies[0].grid_kg_per_kwh)


def percent_saved(dense: int, ticket: int) -> float:
    """Return the share of ``dense`` that ``ticket`` does without, in percent."""
    return 100 * (dense - ticket) / dense if dense else 0.0


def _scaled(pair: Iterable[float] | None, factor: float) -> tuple[float, float] | None:
    if pair is None:
        return None
    low, high = pair
    return factor * low, factor * high
