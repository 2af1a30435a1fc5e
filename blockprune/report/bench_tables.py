"""A benchmark as tables of at most 80 columns: headers and rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blockprune.report.bench import BenchResult, LatencyFigures, NetworkFigures, TrainingFigures

__all__ = ["BenchTable", "bench_notes", "bench_tables"]

Pair = tuple[float, float] | None


@dataclass(frozen=True)
class BenchTable:
    """One table: the first column holds names, all others numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def bench_tables(result: BenchResult) -> tuple[BenchTable, ...]:
    """Return the tables of what was measured: costs, latency, memory, training."""
    networks = result.networks
    tables = [_costs(networks), _latency(networks), _memory(networks)]
    trained = [(n.name, n.training) for n in networks if n.training is not None]
    if trained:
        tables += [_training(trained), _energy(trained)]
    return tuple(table for table in tables if table.rows)


def bench_notes(result: BenchResult) -> tuple[str, ...]:
    """Return the sentences without which the figures cannot be read."""
    return tuple(_notes(result))


def _notes(result: BenchResult) -> Iterator[str]:
    yield (
        f"% is of dense, from {result.repeats} rounds in which both take turns; ranges hold the "
        f"median with {100 * result.confidence:g} % confidence; a dash stands where the rounds are "
        "too few for one."
    )
    sources = {figures.source for network in result.networks for figures in network.memory}
    uncompiled = ", not compiled" if "compiled" in result.execution else ""
    yield (
        f"Memory is the peak of a pass{uncompiled} ({', '.join(sorted(sources))}), weights "
        "included; paper: 4 bytes for each output of a layer and each parameter."
    )
    settings = result.training
    if settings is None or not any(network.training for network in result.networks):
        return
    yield (
        f"Training: steps of {settings.batch} samples, data loading not included; an epoch is "
        f"{settings.epoch_samples:,} samples; peak memory is that of a step."
    )
    if settings.watts is not None:
        yield (
            f"CO2 by formula: kg = {settings.watts:g} W x hours / 1000 x "
            f"{settings.grid_kg_per_kwh:g} kg/kWh, so its share is that of the time."
        )
        return
    parts = {
        f"{figure.part} {'measured' if figure.measured else 'estimated'} ({figure.source})"
        for network in result.networks
        for figure in (network.training.energy if network.training else ())
    }
    yield (
        f"Energy by codecarbon: {'; '.join(sorted(parts))}. CO2 at "
        f"{settings.grid_kg_per_kwh:g} kg/kWh."
    )


def _costs(networks: Sequence[NetworkFigures]) -> BenchTable:
    return BenchTable(
        ("network", "removed", "parameters", "saved", "MACs", "MACs saved"),
        tuple(
            (
                network.name,
                str(len(network.removed)),
                f"{network.params:,}",
                f"{network.params_saved_percent:.3f} %",
                f"{network.macs:,}",
                f"{network.macs_saved_percent:.3f} %",
            )
            for network in networks
        ),
    )


def _latency(networks: Sequence[NetworkFigures]) -> BenchTable:
    return BenchTable(
        (
            "network",
            "batch",
            "latency ms",
            "IQR",
            "%",
            "95 % range",
            "speed-up",
            "per s",
        ),
        tuple(
            (
                network.name,
                str(figures.batch),
                f"{figures.median_ms:.3f}",
                f"{figures.iqr_ms:.3f}",
                f"{figures.percent:.1f}",
                _against_dense(network, figures),
                f"{figures.speed_up:.3f}",
                f"{figures.samples_per_s:,.0f}",
            )
            for network in networks
            for figures in network.latency
        ),
    )


def _memory(networks: Sequence[NetworkFigures]) -> BenchTable:
    return BenchTable(
        ("network", "batch", "memory MB", "%", "paper MB", "paper saved"),
        tuple(
            (
                network.name,
                str(figures.batch),
                _megabytes(figures.peak_bytes),
                f"{figures.percent:.1f}",
                _megabytes(network.paper_memory_bytes),
                f"{network.paper_memory_saved_percent:.3f} %",
            )
            for network in networks
            for figures in network.memory
        ),
    )


def _training(trained: Sequence[tuple[str, TrainingFigures]]) -> BenchTable:
    return BenchTable(
        ("network", "step ms", "epoch s", "%", "speed-up", "95 % range", "peak MB", "%"),
        tuple(
            (
                name,
                f"{figures.step_ms:.2f}",
                f"{figures.epoch_seconds:.2f}",
                f"{figures.percent:.1f}",
                f"{figures.speed_up:.3f}",
                _range(figures.speed_up_interval, ".3f") if index else "",
                _megabytes(figures.memory.peak_bytes),
                f"{figures.memory.percent:.1f}",
            )
            for index, (name, figures) in enumerate(trained)
        ),
    )


def _energy(trained: Sequence[tuple[str, TrainingFigures]]) -> BenchTable:
    return BenchTable(
        ("network", "Wh an epoch", "CO2 g an epoch", "%"),
        tuple(
            (
                name,
                f"{1e3 * figures.kwh:.4g}",
                f"{1e3 * figures.co2_kg:.4g}",
                f"{figures.co2_percent:.1f}",
            )
            for name, figures in trained
        ),
    )


def _against_dense(network: NetworkFigures, figures: LatencyFigures) -> str:
    # The dense network is not compared with itself.
    return _range(figures.percent_interval, ".1f") if network.name != "dense" else ""


def _range(pair: Pair, form: str) -> str:
    return "-" if pair is None else f"{pair[0]:{form}}-{pair[1]:{form}}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f}"
