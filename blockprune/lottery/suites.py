"""Several runs in one file: what they share, and what each has of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockprune.errors import SpecError
from blockprune.lottery.spec import Spec, table_in

__all__ = ["read_specs"]

RUNS = "runs"
_TAKEN = ("report", "stages")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_specs(path: str | os.PathLike[str]) -> tuple[Spec, ...]:
    """Return the specs in a TOML or JSON file: one, or one for each table of ``[[runs]]``.

    What stands outside of ``[[runs]]`` belongs to every run, and each table adds to it or says
    otherwise, key by key in tables inside tables. Each needs a name of its own, which becomes the
    folder of its results.

    Raises:
        SpecError: the file cannot be read, or one of the specs cannot be used.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from blockprune.lottery.suites import read_specs
        >>> text = '''
        ... criteria = "grasp"
        ... p = 1
        ... recipe = { epochs = 2, lr = 0.1 }
        ... [[runs]]
        ... name = "short"
        ... model = { name = "blockprune:resnet20" }
        ... [[runs]]
        ... name = "long"
        ... model = { name = "blockprune:resnet32" }
        ... recipe = { epochs = 4 }
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "both.toml")
        ...     _ = file.write_text(text)
        ...     specs = read_specs(file)
        >>> [(spec.name, spec.recipe.epochs, spec.recipe.lr) for spec in specs]
        [('short', 2, 0.1), ('long', 4, 0.1)]
    """
    file = Path(path)
    table = table_in(file)
    if RUNS not in table:
        return (Spec.parse(table, source=str(file)),)
    runs = table[RUNS]
    if not isinstance(runs, list) or not runs or not all(isinstance(r, Mapping) for r in runs):
        raise SpecError(f"{file}: {RUNS} is a list of tables, [[{RUNS}]], one for each run.")
    shared = {key: value for key, value in table.items() if key != RUNS}
    _check_names(file, [run.get("name") for run in runs])
    return tuple(
        Spec.parse(_merged(shared, run), source=f"{file}, run {run['name']}") for run in runs
    )


def _check_names(file: Path, names: list[object]) -> None:
    for place, name in enumerate(names, start=1):
        if not isinstance(name, str) or not _FOLDER.fullmatch(name) or name in _TAKEN:
            raise SpecError(
                f"{file}: run {place} is named {name!r}. Each needs a name that can be a folder: "
                f"letters, digits, dots, dashes and underscores, but not {', '.join(_TAKEN)}."
            )
    if len({str(name).lower() for name in names}) < len(names):
        raise SpecError(f"{file}: two runs have one name: {', '.join(map(str, names))}.")


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table in which what is in `own` counts, and `shared` where that says nothing."""
    merged = dict(shared)
    for key, value in own.items():
        before = merged.get(key)
        is_table = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[key] = _merged(before, value) if is_table else value  # type: ignore[arg-type]
    return merged
