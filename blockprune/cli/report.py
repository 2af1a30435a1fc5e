"""``blockprune report``: a run of the lottery as one page, and the tables behind it."""

from __future__ import annotations

import os
from pathlib import Path

from blockprune.cli.output import plural, print_line
from blockprune.errors import BlockpruneError
from blockprune.lottery.record import RunRecord
from blockprune.report import index_html, read_run, runs_in, staged_folder, write_run_report
from blockprune.report.suite import FOLDER, INDEX

__all__ = ["run"]


def run(source: Path, out: Path | None, *, force: bool) -> None:
    """Write the report of a run, or of each run in a folder of runs, and say where it is.

    Args:
        source: the folder of the run, or its ``results.json``; or a folder of such folders, as a
            spec with several runs makes it.
        out: the folder of the report; None: ``report`` inside the run's own. Of several runs each
            has a folder in it, and ``index.html`` leads to them.
        force: write into an ``out`` that holds files.

    Raises:
        BlockpruneError: there is no such run, or ``out`` is in the way.
    """
    folders = runs_in(source)
    if folders:
        _write_all(source, folders, out, force=force)
        return
    record = read_run(source)
    folder = out or (source if os.path.isdir(source) else source.parent) / FOLDER
    _write(record, folder, force=force or out is None)


def _write_all(source: Path, folders: tuple[Path, ...], out: Path | None, *, force: bool) -> None:
    """Write each run's report, and the page that leads to them when all are there."""
    # All are read first: one that is no run is found before anything is written.
    records = {folder: read_run(folder) for folder in folders}
    top = out or source / FOLDER
    reports = {run: (run / FOLDER if out is None else out / run.name) for run in folders}
    try:
        with staged_folder(top, force=force or out is None) as staging:
            for folder, record in records.items():
                _write(record, reports[folder], force=force or out is None)
            places = {
                Path(os.path.relpath(reports[folder], top)).as_posix(): record
                for folder, record in records.items()
            }
            name = source.resolve().name
            (staging / INDEX).write_text(index_html(name, places), "utf-8", newline="\n")
    except OSError as error:
        raise BlockpruneError(f"{top} cannot be written to: {error}") from error
    print_line(f"{plural(len(folders), 'run')}; open {top / INDEX}")


def _write(record: RunRecord, folder: Path, *, force: bool) -> None:
    try:
        with staged_folder(folder, force=force) as staging:
            files = write_run_report(record, staging)
    except OSError as error:
        raise BlockpruneError(f"{folder} cannot be written to: {error}") from error
    networks, cases = len(record.networks), len(record.verdicts)
    print_line(f"{record.name}: {plural(networks, 'network')}, {plural(cases, 'case')} judged.")
    if record.failures:
        failed = plural(len(record.failures), "stage")
        print_line(f"{failed} failed; the report says which at its top.")
    print_line(f"Written to {folder}: {', '.join(files)}")
