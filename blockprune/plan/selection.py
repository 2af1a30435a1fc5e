"""The blocks chosen so far, and the rules that a further one must keep to."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from blockprune.errors import PlanError, close_names
from blockprune.plan.structure import Analysis, Block

__all__ = ["Selection"]


class Selection:
    """Blocks that go, chosen one by one under the rules of `blockprune.plan`.

    A block that may not go now may not go later either: what others take from its stage, or from
    the room there is, they take from it as well, be they nested in it or not.

    Args:
        analysis: of the model.
        protect: `fnmatch` patterns of names that stay.
        minimum: residual blocks that stay in each stage at the least.

    Raises:
        PlanError: a pattern without a match, or a minimum that is no count.
    """

    def __init__(
        self, analysis: Analysis, protect: str | Iterable[str] = (), minimum: int = 0
    ) -> None:
        _check_minimum(minimum)
        self._analysis = analysis
        self._protected = _protected(protect, [block.name for block in analysis.blocks])
        self._minimum = minimum
        self._stage_of = {block.name: block.stage for block in analysis.blocks}
        self._left = Counter({i: stage.fixed for i, stage in enumerate(analysis.stages)})
        self._left.update(self._stage_of.values())
        self._gone: set[str] = set()

    @property
    def gone(self) -> frozenset[str]:
        """Names of the blocks chosen, nested ones included."""
        return frozenset(self._gone)

    @property
    def in_order(self) -> tuple[str, ...]:
        """The same names in order of execution."""
        return tuple(b.name for b in self._analysis.blocks if b.name in self._gone)

    @property
    def limits(self) -> str:
        """The rules that bind, as the end of a sentence; empty if there are none."""
        limits = []
        if self._protected:
            limits.append(f"{len(self._protected)} protected")
        if self._minimum:
            limits.append(f"min_blocks_per_stage={self._minimum}")
        return f" with {' and '.join(limits)}" if limits else ""

    @property
    def depends_on_order(self) -> bool:
        """Whether taking all that can go in another order can end in another set."""
        return self._minimum > 0

    def restarted(self) -> Selection:
        """Return an empty selection under the same rules."""
        fresh = Selection(self._analysis, (), self._minimum)
        fresh._protected = self._protected
        return fresh

    def may_go(self, block: Block, room: float = math.inf) -> bool:
        """Whether a block can go, with those nested in it, where `room` more may go."""
        group = self._group(block)
        losses = Counter(self._stage_of[name] for name in group)
        return (
            block.name in group
            and len(group) <= room
            and not group & self._protected
            and all(self._left[stage] - lost >= self._minimum for stage, lost in losses.items())
        )

    def take(self, block: Block) -> None:
        """Choose a block that may go."""
        group = self._group(block)
        self._gone |= group
        self._left.subtract(self._stage_of[name] for name in group)

    def after(self, block: Block) -> Selection:
        """Return a selection with one block more, that may go."""
        following = copy.copy(self)
        following._gone, following._left = self._gone.copy(), self._left.copy()
        following.take(block)
        return following

    def take_all(self, ranked: Sequence[Block]) -> None:
        """Choose every block that may go, the first first."""
        for block in ranked:
            if self.may_go(block):
                self.take(block)

    def _group(self, block: Block) -> set[str]:
        return {block.name, *block.contains} - self._gone


def _check_minimum(minimum: object) -> None:
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise PlanError(f"min_blocks_per_stage is a count of blocks, 0 or more, not {minimum!r}.")


def _protected(protect: str | Iterable[str], names: Sequence[str]) -> frozenset[str]:
    patterns = [protect] if isinstance(protect, str) else list(protect)
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PlanError(f"protect takes patterns of block names, not {pattern!r}.")
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise PlanError(
                f"protect={pattern!r} matches no removable block.{close_names(pattern, names)} "
                f"There are: {', '.join(names) or 'none'}."
            )
        found |= matches
    return frozenset(found)
