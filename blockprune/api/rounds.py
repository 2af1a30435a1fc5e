"""Iterative selection: score, remove one block, score what is left.

Every ticket is cut from the dense model, with all that has gone so far, and its blocks keep their
dense names. It is thrown away after its round: the ticket to keep is cut once, from the dense model
with the whole plan, so that it is the one that was proved.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.plan import Goal, PruningPlan, Remaining, Selection, as_plan, ranked
from blockprune.profiling import trial_ticket
from blockprune.scoring import NoDataWarning, ScoreTable

__all__ = ["Rounds"]


class Rounds:
    """The rounds of one iterative selection.

    Args:
        analysis: of the dense model.
        first: the scores of all its blocks.
        score: what scores a ticket, given its analysis.

    Attributes:
        table: for each block the score that it went with, or its latest one. A block that has none
            in a ticket, since there it is no longer removable, keeps the one from before.
    """

    def __init__(
        self,
        analysis: BlockAnalysis,
        first: ScoreTable,
        score: Callable[[nn.Module, BlockAnalysis], ScoreTable],
    ) -> None:
        self.table = first
        self._analysis = analysis
        self._score = score

    def choose(
        self, selection: Selection, goal: Goal, by: str, costs: Remaining | None = None
    ) -> bool:
        """Take the block that may go and comes first, and score again, until the goal is met.

        Returns:
            Whether it is met; if not, no further block may go.
        """
        while not goal.is_met(selection.gone):
            room = goal.room(selection.gone)
            order = ranked(self._analysis.blocks, self.table.scores, by, costs, gone=selection.gone)
            block = next((block for block in order if selection.may_go(block, room)), None)
            if block is None:
                return goal.is_met(selection.gone, is_last=True)
            selection.take(block)
            if not goal.is_met(selection.gone):
                self._score_again(selection.gone)
        return True

    def as_plan(self, selection: Selection, goal: Goal) -> PruningPlan:
        """Return what was chosen as a plan for the dense model."""
        return as_plan(self._analysis, selection, goal, self.table.criterion, self.table.scores)

    def _score_again(self, gone: frozenset[str]) -> None:
        ticket = trial_ticket(self._analysis, gone)
        analysis = find_blocks(
            ticket,
            self._analysis.traced.call,
            self._analysis.granularity,
            preserve_root=self._analysis.preserve_root,
            leaf_modules=_left_in(ticket, self._analysis.leaf_modules),
        )
        with warnings.catch_warnings():
            # Said of the first scores.
            warnings.simplefilter("ignore", NoDataWarning)
            latest = self._score(ticket, analysis).scores
        kept = {name: latest.get(name, old) for name, old in self.table.scores.items()}
        went = {name: self.table.scores[name] for name in gone}
        self.table = dataclasses.replace(self.table, scores=kept | went)


def _left_in(ticket: nn.Module, leaf_modules: Iterable[str]) -> list[str]:
    """Return the entries that still match a module, as `find_blocks` asks of each."""
    modules = [(path, type(module).__name__) for path, module in ticket.named_modules() if path]
    return [
        entry
        for entry in leaf_modules
        if any(fnmatchcase(path, entry) or kind == entry for path, kind in modules)
    ]
