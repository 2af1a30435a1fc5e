"""The libraries: which models they have, and what is done with each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from blockprune.errors import BlockpruneError

from . import others_models, timm_models, torchvision_models, transformers_models
from .children import Task
from .others_models import OTHERS
from .study import Row, study

__all__ = [
    "LIBRARIES",
    "VERIFY",
    "distributions_of",
    "first_tasks",
    "names_of",
    "smallest_tasks",
    "study_model",
]

LIBRARIES: dict[str, ModuleType] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}
VERIFY = {"torchvision": "all", "timm": "smallest", "transformers": "all", OTHERS: "all"}
"""Which models have tickets made and checked, unless the command line says otherwise."""

SEED = 0


def names_of(library: str) -> list[str]:
    """Return the names of all models of a library."""
    if library == OTHERS:
        return others_models.names()
    names: list[str] = LIBRARIES[library].names()
    return names


def distributions_of(library: str, names: Iterable[str]) -> list[str]:
    """Return the distributions that models come from."""
    if library != OTHERS:
        return [library]
    return list(dict.fromkeys(others_models.configuration(name).library for name in names))


def first_tasks(library: str, names: Iterable[str], verify: str) -> Iterator[Task]:
    """Yield what is done with every model: all of it, or what the smallest are found by."""
    if library == OTHERS:
        for name in names:
            yield _configuration_task(name, verify=verify == "all")
        return
    for name in names:
        on_meta = library == "timm" and verify != "all"
        label = {"library": library, "name": name, "task": "analyse" if on_meta else "study"}
        if library == "timm":
            label["file"] = timm_models.file_of(name)
        work = _analysis_of_timm if on_meta else functools.partial(study_model, library)
        yield Task(label, functools.partial(work, name, verify=verify == "all"))


def smallest_tasks(library: str, rows: Sequence[Row]) -> Iterator[Task]:
    """Yield the check of the smallest model with blocks of every file, or of the library."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("branches"):
            files.setdefault(row.get("file", ""), []).append(row)
    for members in files.values():
        row = min(members, key=lambda row: (row["parameters"], row["name"]))
        label = {key: row[key] for key in ("library", "name", "file") if key in row}
        work = functools.partial(study_model, library, row["name"], verify=True)
        yield Task({**label, "task": "verify"}, work)


def study_model(library: str, name: str, *, verify: bool) -> Iterator[Row]:
    """Build a model with random weights and study it; yield the row as it fills up."""
    yield from _study(LIBRARIES[library].build, name, verify=verify)


def _configuration_task(name: str, *, verify: bool) -> Task:
    chosen = others_models.configuration(name)
    label = {
        "library": chosen.library,
        "name": name,
        "task": "study",
        "expected": chosen.branches,
        "expected_because": chosen.why,
    }
    return Task(label, functools.partial(_study_configuration, name, verify=verify))


def _study_configuration(name: str, *, verify: bool) -> Iterator[Row]:
    """Study a configuration thoroughly; an error of the package's own is a `refusal`."""
    try:
        yield from _study(others_models.build, name, verify=verify, thorough=True)
    except BlockpruneError as error:
        lines = str(error).strip().splitlines() or ["without a message"]
        yield {"refusal": f"{type(error).__name__}: {lines[0]}"}


def _analysis_of_timm(name: str, *, verify: bool = False) -> Iterator[Row]:
    """Analyse a model on the meta device; where that does not work, with memory for its weights."""
    try:
        yield from _study(timm_models.build_on_meta, name, verify=verify)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["without a message"]
        yield {"meta_refusal": f"{type(error).__name__}: {lines[0]}"}
        yield from _study(timm_models.build, name, verify=verify)


def _study(
    build: Callable[[str], tuple[nn.Module, Any]],
    name: str,
    *,
    verify: bool,
    thorough: bool = False,
) -> Iterator[Row]:
    torch.manual_seed(SEED)
    model, inputs = build(name)
    yield from study(model.eval(), inputs, verify=verify, thorough=thorough)
