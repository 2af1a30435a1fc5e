"""The section of the report on third-party libraries: what was found of what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cells import number, table
from .others_models import INSTALL, OTHERS
from .status import STATUSES, status_of
from .study import Row

__all__ = ["OTHERS", "others_section"]

INTRODUCTION = f"""\
Tiny models of libraries that nobody here wrote for, by `python benchmarks/zoo_coverage.py others`
(`{INSTALL}` installs the libraries). How many identity branches a model has was counted by reading
its source; "because" is the sum. One branch, several drawn at random, all, and all that contain no
other are removed into a ticket each, and up to two whole layers; each ticket is compared as above.

- **complete**: every branch was found, and every ticket is equal in both modes.
- **found**: every branch was found; no ticket was asked for.
- **none**: there is no branch, and none was found.
- **partly**, **unseen**: some, or all, branches were not found; the last column says why.
- **wrong**: a ticket differs or was refused, or there are more blocks than branches.
- **crash**: an error that is not the package's own, or more time or memory than the limit."""


def others_section(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of the section, as Markdown."""
    rows: Sequence[Row] = sorted(result["models"], key=lambda row: row["name"].lower())
    machine = result["machine"]
    states = Counter(status_of(row)[0] for row in rows)
    yield "## Other libraries"
    yield INTRODUCTION
    yield table(
        ["configurations", "libraries", *STATUSES, "made with"],
        [
            [
                len(rows),
                len({row["library"] for row in rows}),
                *(states[status] for status in STATUSES),
                f"{machine['date']}, torch {machine['torch']}, Python {machine['python']}, "
                f"{machine['architecture']}, {machine['cores']} cores",
            ]
        ],
    )
    yield table(
        [
            "library",
            "model",
            "input",
            "parameters",
            "branches",
            "found",
            "because",
            "layers",
            "seconds",
            "status",
            "why, or note",
        ],
        [_cells(row, result["versions"]) for row in rows],
    )


def _cells(row: Row, versions: Mapping[str, str]) -> list[Any]:
    library = row["library"]
    return [
        f"{library} {versions[library]}",
        row["name"].partition("/")[2],
        row.get("input", ""),
        number(row.get("parameters")),
        row["expected"],
        row.get("branches", ""),
        row["expected_because"],
        row.get("layers", ""),
        round(sum(row.get("seconds", {}).values()), 1),
        *status_of(row),
    ]
