"""Criteria made of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from blockprune.criteria.base import Criterion, ScoringContext
from blockprune.criteria.meters import evaluate
from blockprune.errors import CriterionError

__all__ = ["Consensus"]


@dataclass(frozen=True)
class Consensus:
    """Consensus: the sum of the block's ranks under several criteria.

    ::

        score = sum over criteria of  rank of the block, 1 for the least important

    Blocks with equal scores share the mean of their ranks. Criteria that read forward passes share
    them.

    Args:
        criteria: two or more, by name in `CRITERIA` or as callables.

    Raises (when called):
        CriterionError: what one of them raises, with its name.
        DataError: as they do.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> batch = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
        >>> table = blockprune.score_blocks(resnet20(), Consensus(("snip", "l1")), batch)
        >>> sum(table.scores.values()) == 2 * sum(range(1, 8))
        True

    Source: Mugnaini et al., "Layer pruning with consensus: a triple-win solution", 2024.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True

    criteria: tuple[str | Criterion, ...] = ("snip", "grasp", "synflow")

    def __post_init__(self) -> None:
        if isinstance(self.criteria, str) or len(self.criteria) < 2:
            raise CriterionError(
                f"A consensus is of two or more criteria, such as ('snip', 'grasp'), not "
                f"{self.criteria!r}."
            )

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the sum of the ranks of each block."""
        # The table has a row for the consensus itself.
        from blockprune.criteria import criterion_of

        found = [criterion_of(criterion) for criterion in self.criteria]
        named = {f"{i} {name}": criterion for i, (name, criterion) in enumerate(found)}
        tables = evaluate(context, named)
        ranks = [_ranks(table) for table in tables.values()]
        return {block.name: sum(rank[block.name] for rank in ranks) for block in context.blocks}


def _ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the rank of each, from 1 for the lowest; equal ones share the mean of theirs."""
    ordered = sorted(float(score) for score in scores.values())
    first = {score: position for position, score in reversed(list(enumerate(ordered, 1)))}
    last = {score: position for position, score in enumerate(ordered, 1)}
    return {name: (first[float(s)] + last[float(s)]) / 2 for name, s in scores.items()}
