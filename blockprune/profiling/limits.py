"""A latency limit as the goal of a plan: chosen by a table, confirmed on tickets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cached_property

from blockprune.blocks import BlockAnalysis
from blockprune.errors import InfeasibleBudgetError
from blockprune.plan import Budget, Selection
from blockprune.plan.structure import Block
from blockprune.profiling.latency import Latency, compare_latency
from blockprune.profiling.table import LatencyTable
from blockprune.profiling.trials import trial_ticket

__all__ = ["LatencyGoal"]


class LatencyGoal:
    """Blocks go until a ticket, timed beside the dense model, is within a limit.

    The table says how many blocks that takes. A ticket without them is cut and timed: in turns with
    the dense model, so that drift cancels in their ratio, which times the dense model's median
    over all rounds so far is the ticket's latency. Where that is over the limit, the table's
    estimates are scaled to it and further blocks go. So a plan that is found was confirmed on a
    ticket; with the table wrong, it may hold more blocks than needed.

    Args:
        analysis: of the model; latency is that of the batch it was made with, in evaluation mode.
        budget: "max_latency_ms".
    """

    p = None

    def __init__(self, analysis: BlockAnalysis, budget: Budget) -> None:
        self.budget = budget
        self.limit_ms = float(budget.value)
        self._analysis = analysis
        self._scale = 1.0
        self._dense_ms: list[float] = []
        self._measured: dict[frozenset[str], float] = {}

    @cached_property
    def table(self) -> LatencyTable:
        """The estimates, measured when first asked for."""
        return LatencyTable(self._analysis)

    def room(self, gone: frozenset[str]) -> float:
        """Return that any number of blocks may go."""
        return math.inf

    def is_met(self, gone: frozenset[str], *, is_last: bool = False) -> bool:
        """Whether a ticket without these blocks was timed within the limit.

        None is cut where the estimate is above it, unless no more blocks can go.
        """
        if gone not in self._measured:
            estimate = self.table(gone)
            if estimate * self._scale > self.limit_ms and not is_last:
                return False
            found = self._measured[gone] = self._measure(gone)
            if found > self.limit_ms and estimate > 0:
                self._scale = found / estimate
        return self._measured[gone] <= self.limit_ms

    def missed(self, selection: Selection, ranked: Sequence[Block]) -> InfeasibleBudgetError:
        """Return the error that names the best latency of a ticket that was timed."""
        asked = f"{self.budget} is below what can be reached"
        dense = f"the dense model takes {self.table.total:.3f} ms"
        if not ranked:
            return InfeasibleBudgetError(
                f"{asked}: {dense}, and it has no removable residual block. Its analysis lists "
                "every merge that was refused, and why, under rejections."
            )
        gone, best = min(self._measured.items(), key=lambda item: item[1])
        return InfeasibleBudgetError(
            f"{asked}: {dense}, and the fastest ticket timed {best:.3f} ms, with {len(gone)} of "
            f"{len(ranked)} blocks gone; {len(selection.gone)} can go{selection.limits}."
        )

    def _measure(self, gone: frozenset[str]) -> float:
        """Return the milliseconds of a ticket without these blocks."""
        dense, ticket = self._time_in_turns(gone)
        self._dense_ms += dense.samples_ms
        return ticket.ratio_to(dense) * statistics.median(self._dense_ms)

    def _time_in_turns(self, gone: frozenset[str]) -> tuple[Latency, Latency]:
        """Return the latencies of the dense model and of a ticket, whose rounds pair up."""
        traced = self._analysis.traced
        models = {"dense": traced.root, "ticket": trial_ticket(self._analysis, gone)}
        inputs = traced.call.kwargs or traced.call.args
        measured = compare_latency(models, inputs, batch_sizes=None)
        return measured["dense"][0], measured["ticket"][0]
