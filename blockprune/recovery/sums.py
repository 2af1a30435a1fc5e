"""What a pass has seen of one gap: of the operations that it can be fitted with, and of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from blockprune.errors import RecoveryError
from blockprune.recovery.data import weights_of
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
        mask: of the positions; see `weights_of`.
    """

    stream: Tensor
    target: Tensor
    calls: Mapping[str, LinearCall]
    mask: Tensor | None


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
        is_sequence = all(reach.operation.layout != "convolution" for reach in reaches)
        weights = weights_of(wanted, seen.mask, is_sequence=is_sequence)
        self.error += float((weights.double() * missing.double() ** 2).sum())
        self.size += float((weights.double() * wanted.double() ** 2).sum())
        for reach in reaches:
            operation = seen.calls[reach.operation.weight]
            leaf = operation.returned
            assert leaf is not None
            tail = Tail(stream, leaf)
            counts = tail.backward(weights * tail.forward(torch.ones_like(leaf))).detach()
            change = tail.backward(weights * missing).detach()
            goal = leaf.detach() + torch.where(counts > 0, change / counts, 0)
            rows = operation.outputs(counts).double() * (reach.scales > 0).unsqueeze(1)
            shares = rows.sum(dim=-1) / reach.scales.sum(dim=-1, keepdim=True).clamp_min(1e-300)
            self.grams[operation.weight].add(operation.inputs(), operation.outputs(goal), shares)
