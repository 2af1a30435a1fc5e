"""What a pass has seen of one gap: of the operations that it can be fitted with, and of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from blockprune.errors import RecoveryError
from blockprune.recovery.folding import start_of
from blockprune.recovery.gaps import Gap
from blockprune.recovery.gram import Gram
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.reach import Reach
from blockprune.recovery.tail import Tail

__all__ = ["Seen", "Sums"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one batch shows of a gap.

    Attributes:
        stream: as the ticket computes it, from the results of the operations.
        target: what the dense model has there.
        calls: of the operations, by the names of their weights; their results are leaves.
        weights: what each number of the stream counts.
    """

    stream: Tensor
    target: Tensor
    calls: Mapping[str, LinearCall]
    weights: Tensor


@dataclasses.dataclass
class Sums:
    """Sums over the batches that were seen.

    Attributes:
        grams: by the name of a weight.
        error, size: squares of what is missing in the stream, and of what it should be.
    """

    grams: dict[str, Gram]
    error: float = 0.0
    size: float = 0.0

    @classmethod
    def zeros(cls, model: nn.Module, reaches: Sequence[Reach]) -> Sums:
        """Return sums over nothing, for the operations of a model."""
        grams = {}
        for reach in reaches:
            start = start_of(model, reach.operation)
            groups, columns, outputs = start.shape
            grams[reach.operation.weight] = Gram.zeros(groups, columns - 1, outputs, start.device)
        return cls(grams)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return sum(gram.products.nbytes + gram.targets.nbytes for gram in self.grams.values())

    def add(self, gap: Gap, reaches: Sequence[Reach], seen: Seen) -> None:
        """Add one batch.

        Raises:
            RecoveryError: it has numbers that are not finite.
        """
        stream, wanted = seen.stream, seen.target.detach().to(seen.stream.device)
        missing = wanted - stream.detach()
        if not bool(missing.isfinite().all()):
            raise RecoveryError(
                f"the stream at {', '.join(gap.blocks)} has numbers that are not finite, on these "
                "data. Leave out the samples that cause it, or use a wider precision."
            )
        self.error += _squares(missing, seen.weights)
        self.size += _squares(wanted, seen.weights)
        for reach in reaches:
            operation = seen.calls[reach.operation.weight]
            gram = self.grams[operation.weight]
            for inputs, goal, shares in _rows(reach, operation, stream, missing, seen.weights):
                gram.add(inputs, goal, shares)


def _squares(values: Tensor, weights: Tensor) -> float:
    """Return the sum of weighted squares, the last dimension in single precision at least."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return float((weights * wide.square()).sum(dim=-1).double().sum())


def _rows(
    reach: Reach, operation: LinearCall, stream: Tensor, missing: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield what an operation reads, what it should return, and what each row counts.

    Args:
        reach: the operation as it was found.
        operation: as it was called now.
        stream: what was computed from its result.
        missing: what the stream lacks.
        weights: of the numbers of the stream.
    """
    leaf = operation.returned
    assert leaf is not None
    tail = Tail(stream, leaf)
    change = tail.backward(weights * missing)
    counts = tail.backward(weights * tail.forward(torch.ones_like(leaf))).detach()
    scales = reach.scales.unsqueeze(1)
    total = scales.sum(dim=-1).clamp_min(torch.finfo(scales.dtype).tiny)
    for inputs, result, wanted, counted in operation.pieces(leaf.detach(), change, counts):
        counted = counted.double()
        goal = result.double() + torch.where(counted > 0, wanted.double() / counted, 0)
        shares = (counted * (scales > 0)).sum(dim=-1) / total
        yield inputs, goal, shares
