"""``blockprune criteria``: the names that ``--criterion`` takes."""

from __future__ import annotations

import dataclasses
import inspect

from blockprune.cli.output import print_json, print_table
from blockprune.criteria import CRITERIA, Criterion

__all__ = ["run"]


def run(*, as_json: bool = False) -> None:
    """Print every criterion with the first line of its documentation."""
    described = {name: _describe(criterion) for name, criterion in CRITERIA.items()}
    if as_json:
        print_json(described)
        return
    print_table(("criterion", "importance of a block"), list(described.items()))


def _describe(criterion: Criterion) -> str:
    """Return the first line of a criterion's documentation, and its settings."""
    text = (inspect.getdoc(criterion) or "").split("\n")[0]
    if not dataclasses.is_dataclass(criterion):
        return text
    settings = [f"{f.name} {getattr(criterion, f.name)}" for f in dataclasses.fields(criterion)]
    return f"{text} ({', '.join(settings)})" if settings else text
