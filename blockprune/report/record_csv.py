"""A run as plain tables: its networks, its verdicts, its scores, and what else it has.

Numbers are written in full, so that reading them back gives the same; a cell is empty where there
is nothing to say. A moment of training is two columns, whole epochs and iterations of the next.
"""

from __future__ import annotations

from collections.abc import Iterable

from blockprune.lottery.record import NetworkRecord, RunRecord, VerdictRecord
from blockprune.report.analyses_csv import analyses_csv
from blockprune.report.csv_rows import Row, case_row, csv_of, step_row

__all__ = ["csv_tables", "networks_csv", "scores_csv", "verdicts_csv"]


def csv_tables(record: RunRecord) -> dict[str, str]:
    """Return each table by the name of its file; those on what a run did not look at are absent."""
    always = {
        "networks.csv": networks_csv(record),
        "verdicts.csv": verdicts_csv(record),
        "scores.csv": scores_csv(record),
    }
    return always | {name: text for name, text in analyses_csv(record).items() if text}


def networks_csv(record: RunRecord) -> str:
    """Return one line for each trained network; names in one cell are apart by semicolons."""
    return csv_of(_network(network) for network in record.networks)


def verdicts_csv(record: RunRecord) -> str:
    """Return one line for each case, with two columns for each seed of the run."""
    seeds = sorted({seed for verdict in record.verdicts for seed in verdict.differences})
    return csv_of(_verdict(verdict, seeds) for verdict in record.verdicts)


def scores_csv(record: RunRecord) -> str:
    """Return one line for each block under each criterion at each moment, for each seed."""
    return csv_of(
        {
            "criterion": table.criterion,
            **step_row("scored_at", table.scored_at),
            "seed": table.seed,
            "block": block,
            "score": score,
        }
        for table in record.scores
        for block, score in table.scores.items()
    )


def _network(network: NetworkRecord) -> Row:
    return {
        **case_row(network.case),
        "seed": network.seed,
        "removed": ";".join(network.removed),
        "blocks": network.blocks,
        "params": network.params,
        "macs": network.macs,
        "filters": network.filters,
        "narrowed": ";".join(f"{name}={gone}" for name, gone in network.narrowed.items()),
        "weights_left": network.weights_left,
        "weights_total": network.weights_total,
        "accuracy": network.accuracy,
        "loss": network.loss,
        "epochs": len(network.epochs),
        "seconds": network.seconds,
        "latency_ms": network.latency_ms,
        "latency_iqr_ms": network.latency_iqr_ms,
        "stage": network.stage,
    }


def _verdict(verdict: VerdictRecord, seeds: Iterable[int]) -> Row:
    row = {
        **case_row(verdict.case),
        "verdict": verdict.verdict,
        "mean_points": verdict.mean,
        **_interval("interval", verdict.interval),
        "against_random_points": verdict.against_random,
        **_interval("against_random", verdict.against_random_interval),
    }
    for seed in seeds:
        row[f"difference_seed_{seed}"] = verdict.differences.get(seed)
        row[f"winning_seed_{seed}"] = verdict.winning.get(seed)
    return row


def _interval(name: str, interval: tuple[float, float] | None) -> Row:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
