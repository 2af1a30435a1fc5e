"""``blockprune report``: a run of the lottery as one page, and the tables behind it."""

from __future__ import annotations

from pathlib import Path

from blockprune.cli.output import plural, print_line
from blockprune.errors import BlockpruneError
from blockprune.report import read_run, staged_folder, write_run_report

__all__ = ["run"]

FOLDER = "report"
"""Inside the run's own folder; ours, so that a new report takes the place of an old one."""


def run(source: Path, out: Path | None, *, force: bool) -> None:
    """Write the report of a run, and say where it is.

    Args:
        source: the folder of the run, or its ``results.json``.
        out: the folder of the report; None: ``report`` inside the run's own.
        force: write into an ``out`` that holds files.

    Raises:
        BlockpruneError: there is no such run, or ``out`` is in the way.
    """
    record = read_run(source)
    folder = out or (source if source.is_dir() else source.parent) / FOLDER
    try:
        with staged_folder(folder, force=force or out is None) as staging:
            files = write_run_report(record, staging)
    except OSError as error:
        raise BlockpruneError(f"{folder} cannot be written to: {error}") from error
    networks, cases = len(record.networks), len(record.verdicts)
    print_line(f"{record.name}: {plural(networks, 'network')}, {plural(cases, 'case')} judged.")
    if record.failures:
        failed = plural(len(record.failures), "stage")
        print_line(f"{failed} failed; the report says which at its top.")
    print_line(f"Written to {folder}: {', '.join(files)}")
