"""One case: from its two numbers to a program that shows what is wrong."""

from __future__ import annotations

import torch

from tests.fuzz.laws import problems
from tests.fuzz.recipe import draw
from tests.fuzz.shrink import kind, report, shrunk

__all__ = ["failure"]


def failure(case: int, seed: int) -> str | None:
    """Return a program that shows what is wrong with one case, or None."""
    torch.set_num_threads(1)
    recipe = draw(seed, case)
    found = problems(recipe)
    if not found:
        return None
    wanted = set(map(kind, found))
    small = shrunk(recipe, lambda smaller: not wanted.isdisjoint(map(kind, problems(smaller))))
    return f"# seed {seed}, case {case}\n{report(small, problems(small) or found)}"
