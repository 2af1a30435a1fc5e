"""The report of a run: read from the one file that the run leaves, written as a page and tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from blockprune.errors import BlockpruneError
from blockprune.lottery.record import RECORD_VERSION, RunRecord
from blockprune.report.page import page_html
from blockprune.report.record_csv import csv_tables

__all__ = ["RESULTS", "read_run", "write_run_report"]

RESULTS = "results.json"


def read_run(run: Path) -> RunRecord:
    """Return what a run found.

    Args:
        run: the folder of the run, or its ``results.json``.

    Raises:
        BlockpruneError: there is no such file, or it does not hold a run of the lottery.
    """
    file = run / RESULTS if os.path.isdir(run) else run
    try:
        text = file.read_text(encoding="utf-8")
    # A name with a null byte, and text that is no UTF-8, are ValueErrors.
    except (OSError, ValueError) as error:
        if not os.path.exists(run):
            found = f"{run} does not exist"
        elif run.is_dir() and not os.path.exists(file):
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
    was made from, ``networks.csv``, ``verdicts.csv``, ``scores.csv`` and, where the run has what
    they hold, ``masks.csv`` and others are the same as tables.
    """
    files = {
        "report.html": page_html(record),
        RESULTS: record.to_json(),
        **csv_tables(record),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return tuple(files)


def _why(text: str, error: ValidationError) -> str:
    try:
        values = json.loads(text)
    # So deep as to exhaust the parser: no run writes that.
    except RecursionError:
        return "its values are nested too deeply."
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
