"""Controls: criteria that know nothing, to measure the others against."""

from __future__ import annotations

import random
from dataclasses import dataclass

from blockprune.criteria.base import ScoringContext

__all__ = ["Random"]


@dataclass(frozen=True)
class Random:
    """Random: a number drawn uniformly from [0, 1) for each block.

    The draws depend on `context.seed` and the order of the blocks alone, not on the state of
    any global generator.
    """

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return one draw for each block."""
        generator = random.Random(context.seed)
        return {block.name: generator.random() for block in context.blocks}
