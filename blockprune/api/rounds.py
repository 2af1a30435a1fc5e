"""Scoring again once some blocks have gone.

Most criteria score a ticket that is cut from the dense model, with all that has gone so far, and
its blocks keep their dense names. It is thrown away after its round: the ticket to keep is cut
once, from the dense model with the whole plan, so that it is the one that was proved.

A criterion that repairs what has gone needs the dense model itself. It has a method `beside`, which
is given the names that have gone and returns the criterion that scores the dense model.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.criteria import Criterion, criterion_of
from blockprune.profiling import trial_ticket
from blockprune.scoring import NoDataWarning, ScoreTable

__all__ = ["Rounds"]


class Rounds:
    """Scores of one model after removals.

    Args:
        analysis: of the dense model.
        criterion: a name, or a callable of the protocol.
        score: scores a model, given its analysis and a criterion.
    """

    def __init__(
        self,
        analysis: BlockAnalysis,
        criterion: str | Criterion,
        score: Callable[[nn.Module, BlockAnalysis, str | Criterion], ScoreTable],
    ) -> None:
        self._analysis = analysis
        self._criterion = criterion
        self._score = score

    def after(self, gone: Collection[str], before: ScoreTable) -> ScoreTable:
        """Return for each block the score that it went with, or its latest one.

        A block that has none in a ticket, since there it is no longer removable, keeps the one from
        before.

        Args:
            gone: names of the blocks that have gone.
            before: the scores of the round before.
        """
        with warnings.catch_warnings():
            # Said of the first scores.
            warnings.simplefilter("ignore", NoDataWarning)
            latest = self._latest(gone).scores
        kept = {name: latest.get(name, old) for name, old in before.scores.items()}
        went = {name: before.scores[name] for name in gone}
        return dataclasses.replace(before, scores=kept | went)

    def _latest(self, gone: Collection[str]) -> ScoreTable:
        beside = getattr(criterion_of(self._criterion)[1], "beside", None)
        if beside is not None:
            return self._score(self._analysis.traced.root, self._analysis, beside(gone))
        ticket = trial_ticket(self._analysis, gone)
        analysis = find_blocks(
            ticket,
            self._analysis.traced.call,
            self._analysis.granularity,
            preserve_root=self._analysis.preserve_root,
            leaf_modules=_left_in(ticket, self._analysis.leaf_modules),
        )
        return self._score(ticket, analysis, self._criterion)


def _left_in(ticket: nn.Module, leaf_modules: Iterable[str]) -> list[str]:
    """Return the entries that still match a module, as `find_blocks` asks of each."""
    modules = [(path, type(module).__name__) for path, module in ticket.named_modules() if path]
    return [
        entry
        for entry in leaf_modules
        if any(fnmatchcase(path, entry) or kind == entry for path, kind in modules)
    ]
