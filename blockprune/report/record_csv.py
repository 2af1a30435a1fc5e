"""A run as three plain tables: its networks, its verdicts, its scores.

Numbers are written in full, so that reading them back gives the same; a cell is empty where there
is nothing to say. A moment of training is two columns, whole epochs and iterations of the next.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from blockprune.lottery.record import NetworkRecord, RunRecord, TicketCase, VerdictRecord
from blockprune.lottery.steps import Step

__all__ = ["networks_csv", "scores_csv", "verdicts_csv"]

Row = dict[str, Any]


def networks_csv(record: RunRecord) -> str:
    """Return one line for each trained network; removed blocks are apart by semicolons."""
    return _csv(_network(network) for network in record.networks)


def verdicts_csv(record: RunRecord) -> str:
    """Return one line for each case, with two columns for each seed of the run."""
    seeds = sorted({seed for verdict in record.verdicts for seed in verdict.differences})
    return _csv(_verdict(verdict, seeds) for verdict in record.verdicts)


def scores_csv(record: RunRecord) -> str:
    """Return one line for each block under each criterion at each moment, for each seed."""
    return _csv(
        {
            "criterion": table.criterion,
            **_step("scored_at", table.scored_at),
            "seed": table.seed,
            "block": block,
            "score": score,
        }
        for table in record.scores
        for block, score in table.scores.items()
    )


def _network(network: NetworkRecord) -> Row:
    return {
        **_case(network.case),
        "seed": network.seed,
        "removed": ";".join(network.removed),
        "blocks": network.blocks,
        "params": network.params,
        "macs": network.macs,
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
        **_case(verdict.case),
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


def _case(case: TicketCase) -> Row:
    return {
        "kind": case.kind,
        "criterion": case.criterion,
        "p": case.p,
        **_step("scored_at", case.scored_at),
        "weights": case.weights,
        **_step("rewound_to", case.rewound_to),
        "schedule": case.schedule,
        "early_bird": case.early_bird,
    }


def _step(name: str, step: Step | None) -> Row:
    return {
        f"{name}_epoch": None if step is None else step.epoch,
        f"{name}_iteration": None if step is None else step.iteration,
    }


def _interval(name: str, interval: tuple[float, float] | None) -> Row:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue()
