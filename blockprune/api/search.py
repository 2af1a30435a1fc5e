"""Step-by-step selection: each step removes one block more, and the best sets go on.

The score of a set is the sum of the scores that its blocks had when they went, each computed
without those that went before::

    score(b1, ..., bk) = s(b1) + s(b2 | b1) + ... + s(bk | b1, ..., bk-1)

Every criterion has it. Where a score is by how much the loss grows, the sum is by how much the loss
of the whole set has grown. Sets are ranked as blocks are: by the sum, or by the sum for what they
save.

Greedy selection is a beam of width 1. In a wider one the greedy set of each step always stays, so
what is found is never worse than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from blockprune.api.rounds import Rounds
from blockprune.blocks import BlockAnalysis
from blockprune.plan import Goal, Remaining, Selection, per_cost, ranked
from blockprune.scoring import ScoreTable

__all__ = ["Search", "Tried"]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A set of blocks that a search has come to.

    Attributes:
        selection: the blocks that go.
        table: for each block the score that it went with, or its latest one.
        score: of the set.
        is_greedy: whether each of its blocks had the lowest score of all when it went.
        is_enough: whether the goal is met.
    """

    selection: Selection
    table: ScoreTable
    score: float = 0.0
    is_greedy: bool = True
    is_enough: bool = False


class Search:
    """A search for the set of blocks that meets a goal with the lowest score.

    Args:
        analysis: of the dense model.
        rounds: scores what is left.
        goal: of the set.
        width: how many sets go on after each step.
        by: "score" or "score_per_cost".
        costs: what "score_per_cost" divides by.
    """

    def __init__(
        self,
        analysis: BlockAnalysis,
        rounds: Rounds,
        goal: Goal,
        width: int,
        by: str = "score",
        costs: Remaining | None = None,
    ) -> None:
        self._analysis, self._rounds, self._goal = analysis, rounds, goal
        self._width, self._by, self._costs = width, by, costs

    def best(self, selection: Selection, first: ScoreTable) -> Tried:
        """Return the best set that is enough; else a set to which no block can be added.

        Args:
            selection: what to start from.
            first: the scores of all blocks of the dense model.
        """
        ended: list[Tried] = []
        going = [Tried(selection, first)]
        while going:
            following: list[Tried] = []
            for tried in going:
                gone = tried.selection.gone
                if self._goal.is_met(gone):
                    ended.append(dataclasses.replace(tried, is_enough=True))
                    continue
                if gone:
                    table = self._rounds.after(gone, tried.table)
                    tried = dataclasses.replace(tried, table=table)
                extended = list(self._extended(tried))
                if not extended:
                    is_enough = self._goal.is_met(gone, is_last=True)
                    ended.append(dataclasses.replace(tried, is_enough=is_enough))
                following += extended
            going = self._kept(following)
        return min(ended, key=lambda one: (not one.is_enough, *self._place(one)))

    def _extended(self, tried: Tried) -> Iterator[Tried]:
        """Yield the set with each block more that may go, the greedy choice first."""
        selection, scores = tried.selection, tried.table.scores
        room = self._goal.room(selection.gone)
        order = ranked(self._analysis.blocks, scores, self._by, self._costs, gone=selection.gone)
        is_greedy = tried.is_greedy
        for block in order:
            if selection.may_go(block, room):
                score = tried.score + scores[block.name]
                yield Tried(selection.after(block), tried.table, score, is_greedy)
                is_greedy = False

    def _kept(self, found: Iterable[Tried]) -> list[Tried]:
        """Return the best sets, each once, and among them the greedy one."""
        best: dict[frozenset[str], Tried] = {}
        greedy: frozenset[str] | None = None
        for tried in sorted(found, key=self._place):
            gone = tried.selection.gone
            best.setdefault(gone, tried)
            if tried.is_greedy:
                greedy = gone
        kept = list(best)[: self._width]
        if greedy is not None and greedy not in kept:
            kept[-1] = greedy
        return [dataclasses.replace(best[gone], is_greedy=gone == greedy) for gone in kept]

    def _place(self, tried: Tried) -> tuple[float, bool]:
        """Return what sets are sorted by, as blocks are in `ranked`."""
        if self._costs is None:
            return tried.score, False
        saved = self._costs(frozenset()) - self._costs(tried.selection.gone)
        return per_cost(tried.score, saved), saved <= 0
