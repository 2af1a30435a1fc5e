"""Lines of plain tables: what a case is called, and rows as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from blockprune.lottery.record import TicketCase
from blockprune.lottery.steps import Step

__all__ = ["Row", "case_row", "csv_of", "step_row"]

Row = dict[str, Any]


def case_row(case: TicketCase) -> Row:
    """Return the columns that say which case a line is about."""
    return {
        "kind": case.kind,
        "criterion": case.criterion,
        "p": case.p,
        **step_row("scored_at", case.scored_at),
        "weights": case.weights,
        **step_row("rewound_to", case.rewound_to),
        "schedule": case.schedule,
        "early_bird": case.early_bird,
        "structure": case.structure,
        "matched": case.matched,
        "level": case.level,
        "scope": case.scope,
    }


def step_row(name: str, step: Step | None) -> Row:
    """Return a moment as two columns."""
    return {
        f"{name}_epoch": None if step is None else step.epoch,
        f"{name}_iteration": None if step is None else step.iteration,
    }


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as a table; none give an empty text."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue()
