"""When enough blocks are gone: so many of them, or so little left of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockprune.errors import InfeasibleBudgetError
from blockprune.plan.selection import Selection
from blockprune.plan.structure import Analysis, Block
from blockprune.plan.values import Budget

__all__ = ["CostGoal", "CountGoal", "Goal", "Remaining"]

# A share such as 0.29 of 100 blocks is 28.999... in binary, and means 29.
ROUNDING = 1e-9
# The same for a share of billions: a few units in the last place, which make no more of anything.
RELATIVE_ROUNDING = 1e-15


class Remaining(Protocol):
    """How much of one quantity a model has left without a set of its blocks.

    Removing more never leaves more.
    """

    @property
    def total(self) -> float:
        """Of the dense model."""

    def __call__(self, removed: frozenset[str], /) -> float:
        """Of the ticket without the blocks `removed`, each given with those nested in it."""


class Goal(Protocol):
    """What a choice of blocks is to reach."""

    @property
    def p(self) -> int | float | None:
        """The number of blocks asked for, None where a `budget` was."""

    @property
    def budget(self) -> Budget | None:
        """What was asked for in place of `p`."""

    def room(self, gone: frozenset[str]) -> float:
        """Return how many more blocks may go."""

    def is_met(self, gone: frozenset[str], *, is_last: bool = False) -> bool:
        """Whether `gone` is enough; `is_last` where no more can go."""

    def missed(self, selection: Selection, ranked: Sequence[Block]) -> InfeasibleBudgetError:
        """Return the error for a selection that no block can be added to."""


@dataclass(frozen=True)
class CountGoal:
    """A number of blocks, or a share of them.

    Attributes:
        p: an int is a count; a float is a share of the removable blocks, rounded down.
        analysis: that the blocks are of.
    """

    p: int | float
    analysis: Analysis

    budget = None

    @property
    def count(self) -> int:
        """How many blocks that is."""
        if isinstance(self.p, int):
            return self.p
        return math.floor(self.p * len(self.analysis.blocks) + ROUNDING)

    def room(self, gone: frozenset[str]) -> float:
        """Return how many are missing."""
        return self.count - len(gone)

    def is_met(self, gone: frozenset[str], *, is_last: bool = False) -> bool:
        """Whether that many are gone."""
        return len(gone) == self.count

    def missed(self, selection: Selection, ranked: Sequence[Block]) -> InfeasibleBudgetError:
        """Return the error that says how many can go at most."""
        total = len(self.analysis.blocks)
        asked = f"p={self.p} asks for {self.count}"
        if total == 0:
            return InfeasibleBudgetError(f"{asked} blocks, and {NO_BLOCK}")
        most = selection.restarted()
        most.take_all(ranked)
        reachable = max(len(most.gone), len(selection.gone))
        return InfeasibleBudgetError(
            f"{asked} of {total} removable {self.analysis.granularity} blocks; "
            f"at most {reachable} can go{selection.limits}."
        )


@dataclass(frozen=True)
class CostGoal:
    """A bound on what is left of a quantity that can be counted.

    Attributes:
        budget: "keep_macs" or "keep_params".
        remaining: of that quantity.
    """

    budget: Budget
    remaining: Remaining

    p = None

    @property
    def target(self) -> float:
        """The most that may be left."""
        value = self.budget.value
        if isinstance(value, int):
            return value
        return math.floor(value * self.remaining.total * (1 + RELATIVE_ROUNDING))

    def room(self, gone: frozenset[str]) -> float:
        """Return that any number of blocks may go."""
        return math.inf

    def is_met(self, gone: frozenset[str], *, is_last: bool = False) -> bool:
        """Whether what is left is within the bound."""
        return self.remaining(gone) <= self.target

    def missed(self, selection: Selection, ranked: Sequence[Block]) -> InfeasibleBudgetError:
        """Return the error that says what is left at least."""
        unit, total = self.budget.unit, self.remaining.total
        left = self.remaining(selection.gone)
        asked = f"{self.budget} allows {self.target:,} of {total:,} {unit}"
        if not ranked:
            return InfeasibleBudgetError(f"{asked}, and {NO_BLOCK}")
        share = f" ({100 * left / total:.2f} %)" if total else ""
        return InfeasibleBudgetError(
            f"{asked}; with {len(selection.gone)} of {len(ranked)} blocks gone, which is all that "
            f"can go{selection.limits}, {left:,}{share} are left."
        )


NO_BLOCK = (
    "the model has no removable residual block. Its analysis lists every merge that was refused, "
    "and why, under rejections."
)
