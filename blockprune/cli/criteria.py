"""``blockprune criteria``, and what ``--criterion`` takes: a name of the list, or a user's own."""

from __future__ import annotations

import dataclasses
import inspect

import typer

from blockprune.cli.output import print_detail, print_json, print_line
from blockprune.criteria import CRITERIA, Criterion
from blockprune.errors import close_names
from blockprune.imports import NotFound, imported

__all__ = ["criterion_named", "run"]

FORMS = (
    "Give a name that `blockprune criteria` lists, or package.module:function, a callable that "
    "takes a ScoringContext and returns one number for each block."
)


def criterion_named(text: str) -> str | Criterion:
    """Return what ``--criterion`` names: a name of the list, or the callable that is imported.

    A class is called without arguments first. Scores and plans go by the callable's own name,
    as they do in Python.

    Raises:
        typer.BadParameter: it names nothing, or nothing that can be called.
    """
    module_name, separator, attribute = text.partition(":")
    if not separator:
        if text not in CRITERIA:
            raise typer.BadParameter(
                f"there is no criterion {text!r}.{close_names(text, CRITERIA)} "
                f"Known: {', '.join(CRITERIA)}; or package.module:function."
            )
        return text
    if not module_name or not attribute:
        raise typer.BadParameter(f"--criterion {text!r} names nothing. {FORMS}")
    try:
        found = imported(module_name, attribute)
    except NotFound as error:
        raise typer.BadParameter(f"--criterion {text!r}: {error} {FORMS}") from error
    if inspect.isclass(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise typer.BadParameter(
                f"--criterion {text!r} is a class that cannot be called without arguments "
                f"({error}). Name an instance of it."
            ) from error
        found = found()
    if not callable(found):
        raise typer.BadParameter(
            f"--criterion {text!r} is a {type(found).__name__}, which cannot be called. {FORMS}"
        )
    criterion: Criterion = found
    return criterion


def run(*, as_json: bool = False) -> None:
    """Print every criterion with what it reads and the first line of its documentation."""
    if as_json:
        print_json(
            {
                name: {"needs": _needs(criterion), "importance": _describe(criterion)}
                for name, criterion in CRITERIA.items()
            }
        )
        return
    for position, (name, criterion) in enumerate(CRITERIA.items()):
        if position:
            print_line("")
        needs = _needs(criterion)
        print_line(f"{name}  (needs {needs})" if needs else name)
        print_detail(_describe(criterion))


def _needs(criterion: Criterion) -> str:
    """Return what a criterion reads beside the weights, in a few words; empty if it is not said."""
    return str(getattr(criterion, "needs", ""))


def _describe(criterion: Criterion) -> str:
    """Return the first line of a criterion's documentation, and its settings."""
    text = (inspect.getdoc(criterion) or "").split("\n")[0]
    if not dataclasses.is_dataclass(criterion):
        return text
    settings = [
        f"{f.name} {getattr(criterion, f.name)}"
        for f in dataclasses.fields(criterion)
        if f.name != "needs" and getattr(criterion, f.name) != ()
    ]
    return f"{text} ({', '.join(settings)})" if settings else text
