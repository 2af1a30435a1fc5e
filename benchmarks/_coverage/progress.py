"""Finished rows, kept line by line, so that a sweep that ended early can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Progress", "versions"]

Row = dict[str, Any]


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions that the rows of these distributions depend on."""
    return {
        "blockprune": metadata.version("blockprune"),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in distributions},
    }


class Progress:
    """The rows of a sweep in a JSON Lines file: every line is whole, or is not counted."""

    def __init__(self, path: Path, made_with: Mapping[str, str], *, resume: bool) -> None:
        self.path = path
        self.made_with = dict(made_with)
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            self.rows = [row for row in _read(path) if row.get("versions") == self._of(row)]
        # What a killed sweep left of its last line must not be written on.
        path.write_text("".join(_line(row) for row in self.rows))

    def add(self, row: Row) -> Row:
        """Keep a row, on disk before this returns."""
        row = {**row, "versions": self._of(row)}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(_line(row))
            file.flush()
        return row

    def _of(self, row: Row) -> dict[str, str]:
        """Return the versions that a row depends on: of its own library, not of the others."""
        names = ("blockprune", "torch", row.get("library"))
        return {name: self.made_with[name] for name in names if name in self.made_with}

    def found(self, **label: str) -> Row | None:
        """Return the row that has these fields."""
        rows = (row for row in self.rows if label.items() <= row.items())
        return next(rows, None)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the sweep was killed while it wrote this
    return rows
