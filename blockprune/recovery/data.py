"""What a recovery reads: the same batches again for each gap, some of them held out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.batches import Batch, Replay, batches_of, device_of
from blockprune.errors import DataError
from blockprune.randomness import preserved_rng
from blockprune.tracing import Call

__all__ = ["Batches", "MaskFunction", "weights_of"]

MaskFunction = Callable[[Call], Tensor]
"""From the arguments of a model to the weight of each position, (samples, positions)."""

HELD_OUT = 4
"""One batch of so many is held out."""
_FIRST = 64
"""Samples of the first batch where it is the only one."""
_SINK = 30.0


class Batches:
    """The batches of a user's data, as calls of a model.

    Every fourth is held out, of two or three the last, and of a single one its last samples.

    Args:
        model: on whose device they are to be.
        data: as for `score_blocks`.
        limit: at most so many; None: all.

    Attributes:
        samples: how many were read the last time.
    """

    def __init__(self, model: nn.Module, data: Any, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"max_batches is at least 1, not {limit}.")
        device = device_of(model)
        self._limit, self.samples = limit, 0
        if isinstance(data, Iterator):
            kept: Iterable[Batch] = Replay(itertools.islice(batches_of(model, data, device), limit))
            self._read: Callable[[], Iterable[Batch]] = lambda: kept
        else:
            self._read = lambda: batches_of(model, data, device)

    def __iter__(self) -> Iterator[tuple[Call, bool]]:
        """Yield each call, and whether it is held out.

        Raises:
            DataError: there is none.
        """
        with preserved_rng():
            first, batches = self._begun(HELD_OUT)
            if len(first) == 1 and len(first[0]) >= HELD_OUT:
                batch = first.pop()
                start = len(batch) - len(batch) // HELD_OUT
                first = [batch.part(0, start), batch.part(start, len(batch))]
                self.samples = len(batch)
                yield first[0].call, False
                yield first[1].call, True
                return
            last = min(len(first), HELD_OUT) - 1
            for position, batch in enumerate(itertools.chain(first, batches)):
                self.samples += len(batch)
                yield batch.call, last > 0 and position % HELD_OUT == last

    def first(self) -> Call:
        """Return the first batch.

        Raises:
            DataError: there is none.
        """
        with preserved_rng():
            return next(self.parts(_FIRST)).call

    def parts(self, size: int) -> Iterator[Batch]:
        """Yield the batches with their targets; where there is a single one, parts of that size.

        Raises:
            DataError: there is none.
        """
        first, batches = self._begun(2)
        if len(first) == 1 and len(first[0]) > size:
            first = [first[0].part(at, at + size) for at in range(0, len(first[0]), size)]
        for batch in itertools.chain(first, batches):
            self.samples += len(batch)
            yield batch

    def _begun(self, count: int) -> tuple[list[Batch], Iterator[Batch]]:
        """Begin to read: return the first `count` batches and those behind them."""
        batches = iter(itertools.islice(self._read(), self._limit))
        first = list(itertools.islice(batches, count))
        if not first:
            raise DataError("The data is empty: recovering needs at least one batch.")
        self.samples = 0
        return first, batches

    def inputs(self) -> Iterator[Any]:
        """Yield the batches as `recalibrate_norms` takes them."""
        for call, _ in self:
            # A forward may write into them.
            yield call.map(lambda tensor: tensor.clone()), None


def weights_of(
    stream: Tensor, mask: Tensor | None, *, is_sequence: bool, with_sinks: bool = False
) -> Tensor:
    """Return what each number of a stream counts, in a shape that broadcasts to it.

    Positions where the mask is zero count nothing. Nor do positions whose stream is many times as
    long as that of others: language models park attention on tokens without content (sinks), which
    would decide the fit alone.

    Args:
        stream: (samples, positions, channels) where it is a sequence; else anything.
        mask: (samples, positions), or None. One of another shape belongs to another sequence.
        is_sequence: whether channels come last.
        with_sinks: let those count as well.
    """
    weights = torch.ones((1,) * stream.dim(), dtype=stream.dtype, device=stream.device)
    if not is_sequence or stream.dim() != 3:
        return weights
    if mask is not None and mask.shape == stream.shape[:2]:
        weights = weights * mask.to(weights)[..., None]
    if with_sinks:
        return weights
    lengths = stream.detach().double().norm(dim=-1)
    counted = lengths[(weights[..., 0] > 0).expand_as(lengths)]
    if counted.numel():
        weights = weights * (lengths <= _SINK * counted.median()).to(weights)[..., None]
    return weights
