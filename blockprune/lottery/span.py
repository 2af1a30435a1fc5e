"""Which steps of a recipe a run takes: from a moment to a moment, with those to keep between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blockprune.errors import CheckpointError
from blockprune.lottery.steps import Step

__all__ = ["Span", "span_of"]


@dataclass(frozen=True)
class Span:
    """A stretch of training, in batches since the beginning of the recipe.

    Attributes:
        per_epoch: batches of an epoch.
        first: batches done before.
        last: batches done afterwards.
        keep: batches done at the moments whose states are wanted.
    """

    per_epoch: int
    first: int
    last: int
    keep: frozenset[int]

    @property
    def epochs(self) -> range:
        """The epochs (0-based) that the run takes part in."""
        return range(self.first // self.per_epoch, -(-self.last // self.per_epoch))

    def within(self, epoch: int) -> tuple[int, int]:
        """Return the first batch of ``epoch`` to take, and the one to stop before."""
        begin = epoch * self.per_epoch
        return max(self.first - begin, 0), min(self.last - begin, self.per_epoch)


def span_of(
    epochs: int, per_epoch: int, *, start: Step, stop: Step | None = None, keep: Iterable[Step] = ()
) -> Span:
    """Return the span from `start` to `stop`, the end of the recipe if None.

    Raises:
        CheckpointError: a moment lies behind the end.

    Example:
        >>> from blockprune.lottery.span import span_of
        >>> from blockprune.lottery.steps import Step
        >>> span = span_of(10, 5, start=Step(epoch=1, iteration=2), stop=Step(epoch=3))
        >>> [(epoch, *span.within(epoch)) for epoch in span.epochs]
        [(1, 2, 5), (2, 0, 5)]
    """
    moments = list(keep)
    end = last = epochs * per_epoch
    if stop is not None:
        last = stop.iterations(per_epoch)
        _refuse_beyond([stop], end, per_epoch, "stop", "the recipe's end")
    _refuse_beyond([start], last, per_epoch, "start", "where the run ends")
    _refuse_beyond(moments, last, per_epoch, "keep", "where the run ends")
    done = frozenset(moment.iterations(per_epoch) for moment in moments)
    return Span(per_epoch, start.iterations(per_epoch), last, done)


def _refuse_beyond(
    moments: Iterable[Step], last: int, per_epoch: int, what: str, limit: str
) -> None:
    beyond = [moment for moment in moments if moment.iterations(per_epoch) > last]
    if beyond:
        raise CheckpointError(
            f"{what}: {', '.join(str(moment) for moment in beyond[:3])} lies behind {limit}, "
            f"{Step.of_iterations(last, per_epoch)} ({per_epoch} batches an epoch)."
        )
