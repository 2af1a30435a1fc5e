"""Result files: written aside, and moved into place when all of them are whole."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from blockprune.errors import BlockpruneError
from blockprune.lottery.results import ExperimentResult
from blockprune.report.plots import plot_accuracy, plot_blocks
from blockprune.report.tables import comparison_markdown, comparison_table, reading_notes
from blockprune.whole_files import new_folder

__all__ = ["staged_folder", "write_report"]

TEXT_WIDTH = 80


def write_report(result: ExperimentResult, folder: Path) -> tuple[str, ...]:
    """Write a result into ``folder``; return the names of the files.

    ``results.json`` holds every figure, ``table.txt`` and ``table.md`` the comparison,
    ``accuracy.png`` and ``blocks.png`` the plots.
    """
    notes = "\n".join(f"- {note}" for note in reading_notes(result))
    text = io.StringIO()
    console = Console(file=text, width=TEXT_WIDTH, highlight=False)
    console.print(comparison_table(result))
    console.print()
    for note in reading_notes(result):
        console.print(note, markup=False)
    (folder / "results.json").write_text(result.to_json(), encoding="utf-8")
    (folder / "table.txt").write_text(text.getvalue(), encoding="utf-8")
    (folder / "table.md").write_text(comparison_markdown(result) + "\n" + notes + "\n", "utf-8")
    plot_accuracy(result, folder / "accuracy.png")
    plot_blocks(result, folder / "blocks.png")
    return ("results.json", "table.txt", "table.md", "accuracy.png", "blocks.png")


@contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a folder to write files in, which move to ``out`` when the block ends well.

    When it ends with an exception, Ctrl-C included, ``out`` is as it was before, absent
    if it was absent. Each file is moved in one step, so none is ever half written.

    Args:
        out: the folder of the results; made, with its parents, where absent.
        force: write into a folder that holds files already; those of the same name are
            replaced, all others stay.

    Raises:
        BlockpruneError: ``out`` is a file, cannot be written to, or holds files and
            ``force`` is false; raised before the block begins. Or a folder in it stands where a
            file belongs; raised before any file is moved.

    Example:
        ``with staged_folder(Path("results")) as folder: (folder / "a.txt").write_text("a")``
    """
    if out.exists() and not out.is_dir():
        raise BlockpruneError(f"{out} is a file; the results need a folder. Choose another.")
    if out.is_dir() and not force and any(out.iterdir()):
        raise BlockpruneError(
            f"{out} exists and is not empty. Use --force to replace the results in it, or "
            "choose another folder."
        )
    absent = [folder for folder in (out, *out.parents) if not folder.exists()]
    staging: Path | None = None
    try:
        staging = _make_staging(out)
        yield staging
        files = sorted(staging.iterdir())
        for file in files:
            if (out / file.name).is_dir():
                raise BlockpruneError(
                    f"{out / file.name} is a folder, where a file of results belongs. Remove it, "
                    "or choose another folder."
                )
        for file in files:
            os.replace(file, out / file.name)
        absent = []
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in absent:
            # Made by us, and still empty: nothing was moved in.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _make_staging(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside `out`: a move within one folder never crosses file systems.
        return new_folder(out / "results")
    except OSError as error:
        raise BlockpruneError(f"{out} cannot be written to: {error}") from error
