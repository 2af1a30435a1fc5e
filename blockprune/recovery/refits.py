"""Many tickets of one model, each refitted by itself, for little more than one dense pass.

In front of its first gap a ticket computes what the dense model does. So where a ticket has one gap
only, its stream, its target and what its operations read are values of the dense model, and one
dense pass over the data gives the sums of many tickets. What is left for each is to solve, to write
and to prove.

A ticket with several gaps is recovered as `recover` does it: the stream at a later gap is that
which the earlier fits have left.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from blockprune.blocks import BlockAnalysis, Cut, by_flow
from blockprune.recovery.data import Batches
from blockprune.recovery.fitting import FAMILIES
from blockprune.recovery.gaps import Gap
from blockprune.recovery.masks import Masks
from blockprune.recovery.networks import networks_of
from blockprune.recovery.operations import Watching
from blockprune.recovery.passes import Inspected
from blockprune.recovery.reach import Reach, names_of, statistics_for
from blockprune.recovery.sums import Seen, Sums
from blockprune.recovery.work import Weigh, Work
from blockprune.surgery import cuts_of
from blockprune.tracing import Call, aliased_copy

__all__ = ["Refits"]

_REFIT = FAMILIES["refit"]


@dataclasses.dataclass(frozen=True)
class _Ticket:
    """A ticket with one gap, and what was seen of that."""

    name: str
    cuts: Sequence[Cut]
    gap: Gap
    reaches: Sequence[Reach]
    weigh: Weigh
    sums: Sums
    held_out: Sums

    def add(self, seen: Seen, *, is_held_out: bool) -> None:
        (self.held_out if is_held_out else self.sums).add(self.gap, self.reaches, seen)


class Refits:
    """Refits of tickets of one dense model, as `recover` makes them, without the tickets.

    Args:
        dense_model: is left as it is.
        analysis: of it.
        batches: what is read.
        example: a few samples of them.
        max_bytes: tickets share a dense pass as long as their sums take no more.
    """

    def __init__(
        self,
        dense_model: nn.Module,
        analysis: BlockAnalysis,
        batches: Batches,
        example: Call,
        max_bytes: int,
    ) -> None:
        self._dense_model, self._analysis = dense_model, analysis
        self._batches, self._example = batches, example
        self._max_bytes = max_bytes
        self._masks = Masks(inspect.signature(dense_model.forward), None)

    def of(self, removals: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, nn.Module]]:
        """Yield each name, and the dense model without the blocks that it stands for, refitted.

        Each model is one to run, with the dense model's signature; they come in any order.

        Args:
            removals: name to the names of blocks that go together.

        Raises:
            RecoveryError: activations that are not finite, or a gap that no fit can be made for.
            VerificationError: the weights do not compute what was fitted.
        """
        waiting: list[_Ticket] = []
        for name, blocks in removals.items():
            cuts = cuts_of(self._analysis, blocks, self._analysis.granularity)
            work = self._work(cuts)
            gaps = work.gaps(self._example)
            rounds = work.rounds(gaps[0], self._example) if len(gaps) == 1 else []
            if rounds == [[]]:
                yield name, work.cut.model
                continue
            if len(rounds) != 1 or statistics_for(rounds[0]) is not None:
                for gap in gaps:
                    work.recovered(gap, self._example, _REFIT, None)
                yield name, work.cut.model
                continue
            weigh = work.weighing(gaps[0], self._example, rounds)
            sums, held_out = (Sums.zeros(self._dense_model, rounds[0]) for _ in range(2))
            waiting.append(_Ticket(name, cuts, gaps[0], rounds[0], weigh, sums, held_out))
            if sum(2 * ticket.sums.nbytes for ticket in waiting) > self._max_bytes:
                yield from self._together(waiting)
                waiting = []
        yield from self._together(waiting)

    def _together(self, tickets: Sequence[_Ticket]) -> Iterator[tuple[str, nn.Module]]:
        if tickets:
            self._see(tickets)
        for ticket in tickets:
            work = self._work(ticket.cuts)
            for reach in ticket.reaches:
                work.fitted(
                    ticket.gap,
                    self._example,
                    reach,
                    ticket.sums,
                    ticket.held_out,
                    _REFIT,
                    None,
                )
            yield ticket.name, work.cut.model

    def _see(self, tickets: Sequence[_Ticket]) -> None:
        """Run the dense model over the data, and add what it shows of each ticket."""
        flows = by_flow(cut for ticket in tickets for cut in ticket.cuts)
        dense = Inspected(
            aliased_copy(self._dense_model), {f.region.path: f.region.graph for f in flows}
        )
        places = {place for t in tickets for place in (t.gap.stream, t.gap.target)}
        leaves = frozenset(r.operation.weight for t in tickets for r in t.reaches)
        for call, is_held_out in self._batches:
            watching = Watching(names_of(dense.model), leaves)
            with watching:
                values = dense.values(call, *places)
            calls = {seen.weight: seen for seen in watching.calls if seen.weight in leaves}
            for ticket in tickets:
                [stream], [target] = values[ticket.gap.stream], values[ticket.gap.target]
                seen = Seen(stream, target, calls, ticket.weigh(target, call))
                ticket.add(seen, is_held_out=is_held_out)

    def _work(self, cuts: Sequence[Cut]) -> Work:
        networks = networks_of(self._dense_model, self._analysis, cuts)
        return Work(networks, self._batches, self._masks)
