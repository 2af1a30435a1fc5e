"""From a failing recipe to a small one that still fails, and its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from tests.fuzz.laws import chosen
from tests.fuzz.recipe import Layer, Loop, Part, Recipe, Region, Unit
from tests.fuzz.source import source_of

__all__ = ["kind", "report", "shrunk"]


def kind(problem: str) -> str:
    """Return a problem less its names and numbers, so that a smaller network can have the same."""
    return " ".join(word for word in problem.split() if re.fullmatch(r"[A-Za-z]+:?", word))


def _shorter(parts: tuple[Part, ...], least: int = 1) -> Iterator[tuple[Part, ...]]:
    """Yield this row with one part taken out, opened or made smaller."""
    for i, part in enumerate(parts):
        before, after = parts[:i], parts[i + 1 :]
        if len(parts) > least:
            yield (*before, *after)
        if isinstance(part, Region):
            yield (*before, *part.items, *after)
        elif isinstance(part, Unit | Loop | Layer):
            yield from ((*before, smaller, *after) for smaller in _smaller(part))
        elif part != "conv":
            yield (*before, "conv", *after)


def _smaller(part: Unit | Loop | Layer) -> Iterator[Part]:
    if isinstance(part, Unit):
        yield from (replace(part, branch=branch) for branch in _shorter(part.branch))
        yield from (replace(part, parallel=g) for g in _shorter(part.parallel, 0))
    if isinstance(part, Loop):
        for i in range(len(part.branches)):
            if len(part.branches) > 1:
                yield Loop(part.branches[:i] + part.branches[i + 1 :])
            for branch in _shorter(part.branches[i]):
                yield Loop((*part.branches[:i], branch, *part.branches[i + 1 :]))
    yield from _defaulted(part)


def _defaulted(value: Any) -> Iterator[Any]:
    for entry in fields(value):
        if entry.name == "choice" or getattr(value, entry.name) == entry.default:
            continue
        if entry.name not in ("branch", "branches", "body"):
            yield replace(value, **{entry.name: entry.default})


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    for body in _shorter(recipe.body):
        again = None if len(body) != len(recipe.body) else recipe.again
        yield replace(recipe, body=body, again=again)
    yield from _defaulted(recipe)


def shrunk(recipe: Recipe, fails: Callable[[Recipe], bool], tries: int = 400) -> Recipe:
    """Return a recipe that fails and of which no smaller variant, tried one by one, fails."""
    found = True
    while found:
        found = False
        for candidate in _candidates(recipe):
            tries -= 1
            if tries < 0:
                return recipe
            if _is_valid(candidate) and fails(candidate):
                recipe, found = candidate, True
                break
    return recipe


def _is_valid(recipe: Recipe) -> bool:
    """Whether the network runs at all: what is tried may be no network."""
    scope: dict[str, Any] = {}
    try:
        exec(source_of(recipe), scope)
        given = scope["inputs"](2)
        net = scope["make"]().eval()
        net(**given) if isinstance(given, dict) else net(*given)
    except Exception:  # any error says the same
        return False
    return True


def report(recipe: Recipe, found: list[str]) -> str:
    """Return a program that shows the failure, what was found as comments above it."""
    comments = "\n".join(f"# {line}" for problem in found for line in problem.splitlines())
    return f"""{comments}
{source_of(recipe)}


import blockprune

net, x = make(), inputs(2)
analysis = blockprune.find_blocks(net, x)
print(analysis.names, analysis.rejections)
ticket = blockprune.remove_blocks(net, {chosen(recipe)}, x)
"""
