"""The report of a run: read from the one file that the run leaves, written as a page and tables."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from blockprune.errors import BlockpruneError
from blockprune.lottery.record import RECORD_VERSION, RunRecord
from blockprune.report.page import page_html
from blockprune.report.record_csv import networks_csv, scores_csv, verdicts_csv

__all__ = ["RESULTS", "read_run", "write_run_report"]

RESULTS = "results.json"


def read_run(run: Path) -> RunRecord:
    """Return what a run found.

    Args:
        run: the folder of the run, or its ``results.json``.

    Raises:
        BlockpruneError: there is no such file, or it does not hold a run of the lottery.
    """
    file = run / RESULTS if run.is_dir() else run
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not run.exists():
            found = f"{run} does not exist"
        elif run.is_dir() and not file.exists():
            found = f"{run} holds no {RESULTS}, which a run writes when it ends"
        else:
            found = f"{file} cannot be read: {error}"
        raise BlockpruneError(
            f"{found}. Give the folder that `blockprune lottery run SPEC --out FOLDER` wrote."
        ) from error
    try:
        return RunRecord.from_json(text)
    except ValidationError as error:
        raise BlockpruneError(f"{file} is no run of the lottery: {_why(text, error)}") from error


def write_run_report(record: RunRecord, folder: Path) -> tuple[str, ...]:
    """Write the report of a run into ``folder``; return the names of the files.

    ``report.html`` is one page that needs no other file and no network; ``results.json`` is what it
    was made from, ``networks.csv``, ``verdicts.csv`` and ``scores.csv`` are the same as tables.
    """
    files = {
        "report.html": page_html(record),
        RESULTS: record.to_json(),
        "networks.csv": networks_csv(record),
        "verdicts.csv": verdicts_csv(record),
        "scores.csv": scores_csv(record),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return tuple(files)


def _why(text: str, error: ValidationError) -> str:
    try:
        values = json.loads(text)
    except ValueError:
        return "it is not whole JSON. Run the lottery again: it goes on where it stopped."
    if not isinstance(values, dict):
        return f"it holds a {type(values).__name__}."
    if "tickets" in values and "networks" not in values:
        return "it is a result of `blockprune demo`, whose report lies beside it."
    version = values.get("version", RECORD_VERSION)
    if version != RECORD_VERSION:
        return f"it has the version {version!r}; this blockprune reads version {RECORD_VERSION}."
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']} ({error.error_count()} problems in all)."
