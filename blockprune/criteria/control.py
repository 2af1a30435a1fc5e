"""Controls: criteria that know nothing, to measure the others against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from blockprune.criteria.base import ScoringContext

__all__ = ["Random"]


@dataclass(frozen=True)
class Random:
    """Random: a number drawn uniformly from [0, 1) for each block.

    A draw depends on `context.seed` and the name of the block alone: not on the state of any global
    generator, nor on the other blocks. Looks at no data, and makes sense at any time: what does
    not beat it is not worth its cost.

    Example:
        >>> import blockprune, torch
        >>> from blockprune.models import resnet20
        >>> images = torch.rand(2, 3, 32, 32)
        >>> table = blockprune.score_blocks(resnet20(), "random", example_inputs=images)
        >>> all(0 <= score < 1 for score in table.scores.values())
        True

    Source: Li et al., "Revisiting random channel pruning", 2022, on why such a control is needed.
    """

    needs: ClassVar[str] = "nothing"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return one draw for each block."""
        return {
            block.name: random.Random(f"{context.seed} {block.name}").random()
            for block in context.blocks
        }
