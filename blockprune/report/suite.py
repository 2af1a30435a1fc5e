"""Several runs that lie in one folder: which they are, and the page that leads to their reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from blockprune.lottery.record import RunRecord
from blockprune.report.cases import DENSE, Cases
from blockprune.report.page import counts_of, environment, model_name, resource
from blockprune.report.record_csv import csv_tables
from blockprune.report.run_files import RESULTS
from blockprune.report.sections import spread_of

__all__ = ["FOLDER", "INDEX", "index_html", "runs_in"]

INDEX = "index.html"

FOLDER = "report"
"""Inside a run's own folder; ours, so that a new report takes the place of an old one."""


@dataclass(frozen=True)
class _Run:
    """One run as the index shows it."""

    place: str
    name: str
    model: str
    data: str
    networks: int
    dense: str
    failures: int
    counts: dict[str, dict[str, int]]
    files: tuple[str, ...]


def runs_in(source: Path) -> tuple[Path, ...]:
    """Return the folders of the runs in a folder that is no run itself, by name; else none.

    Args:
        source: a folder of folders, as a spec of several runs makes it; a run, or its file.
    """
    if not os.path.isdir(source) or (source / RESULTS).exists():
        return ()
    inside = (folder for folder in source.iterdir() if folder.is_dir() and folder.name != FOLDER)
    return tuple(sorted(folder for folder in inside if (folder / RESULTS).is_file()))


def index_html(name: str, records: Mapping[str, RunRecord]) -> str:
    """Return a page that names each run, says how it ended, and leads to its report.

    Args:
        name: of them all.
        records: by the folder of the report, relative to the page.
    """
    page = environment().get_template("index.html.jinja")
    runs = [_run(place, record) for place, record in records.items()]
    return page.render(name=name, runs=runs, style=Markup(resource("page.css")))


def _run(place: str, record: RunRecord) -> _Run:
    dense = [100 * network.accuracy for network in Cases(record).networks(DENSE)]
    return _Run(
        place=place,
        name=record.name,
        model=model_name(record),
        data=str(record.data.get("name", "unknown data")),
        networks=len(record.networks),
        dense=spread_of(dense) if dense else "",
        failures=len(record.failures),
        counts=counts_of(record),
        files=(RESULTS, *csv_tables(record)),
    )
