"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from blockprune.errors import RecoveryError, VerificationError
from blockprune.recovery.data import Batches, Masks, weights_of
from blockprune.recovery.distillation import OnProgress, Progress
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap
from blockprune.recovery.gram import Gram, with_ones
from blockprune.recovery.networks import Networks, gaps_in
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.reach import Reach, run_to, watched, which_reach
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord
from blockprune.tracing import Call

__all__ = ["Work"]


@dataclasses.dataclass
class _Sums:
    """What was seen of one gap: of each operation, and of the gap itself.

    Attributes:
        grams: by the name of a weight.
        error, size: squares of what is missing in the stream, and of what it should be.
    """

    grams: dict[str, Gram]
    error: float = 0.0
    size: float = 0.0


class Work:
    """The recovery of one ticket.

    Args:
        networks: the cut one is changed.
        batches: what is read.
        masks: which positions count.
    """

    def __init__(self, networks: Networks, batches: Batches, masks: Masks) -> None:
        self.batches, self.masks = batches, masks
        self.networks, self.dense, self.cut = networks, networks.dense, networks.cut
        self._uses: Mapping[str, int] = {}

    def recovered(
        self, call: Call, family: Fit, ridge: float | None, on_progress: OnProgress | None = None
    ) -> tuple[GapRecord, ...]:
        """Fit one gap after the other, in order of execution, and return how each went.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
        self._uses = watched(self.cut, call).uses
        gaps = [gap for gap, _ in gaps_in(self.networks, call)]
        found = []
        for done, gap in enumerate(gaps, 1):
            found.append(self._recovered(gap, call, family, ridge))
            if on_progress is not None:
                on_progress(Progress(done=done, total=len(gaps)))
        return tuple(found)

    def _recovered(self, gap: Gap, call: Call, family: Fit, ridge: float | None) -> GapRecord:
        """Fit one gap, write what was found into the cut model, and return how it went."""
        reaches = which_reach(self.cut, call, gap.stream, self._uses)
        sums, held_out = self._sums(reaches), self._sums(reaches)
        for batch, is_held_out in self.batches:
            self._add(held_out if is_held_out else sums, gap, reaches, batch)
        error, size = sums.error + held_out.error, sums.size + held_out.size
        left, chosen = error, None
        for reach in reaches:
            operation = reach.operation
            best = fitted(
                family,
                sums.grams[operation.weight],
                held_out.grams[operation.weight],
                start_of(self.cut.model, operation),
                reach.scales,
                has_bias=has_bias(operation),
                ridge=ridge,
            )
            left, chosen = left - best.gain, best.ridge
            self._write(gap, call, operation, best)
        size = max(size, torch.finfo(torch.float64).tiny)
        return GapRecord(
            blocks=gap.blocks,
            weights=tuple(reach.operation.weight for reach in reaches),
            residual_before=error / size,
            residual_after=max(left, 0.0) / size,
            ridge=chosen,
        )

    def _sums(self, reaches: list[Reach]) -> _Sums:
        grams = {}
        for reach in reaches:
            start = start_of(self.cut.model, reach.operation)
            groups, columns, outputs = start.shape
            grams[reach.operation.weight] = Gram.zeros(groups, columns - 1, outputs, start.device)
        return _Sums(grams)

    def _add(self, sums: _Sums, gap: Gap, reaches: list[Reach], call: Call) -> None:
        with torch.no_grad():
            wanted = self.dense.value(call, gap.target)
        leaves = frozenset(reach.operation.weight for reach in reaches)
        stream, calls, _ = run_to(self.cut, call, gap.stream, leaves)
        wanted = wanted.to(stream.device)
        missing = wanted - stream.detach()
        if not bool(missing.isfinite().all()):
            raise RecoveryError(
                f"the stream at {', '.join(gap.blocks)} has numbers that are not finite, on these "
                "data. Leave out the samples that cause it, or use a wider precision."
            )
        is_sequence = all(reach.operation.layout != "convolution" for reach in reaches)
        weights = weights_of(wanted, self.masks.of(call), is_sequence=is_sequence)
        sums.error += float((weights.double() * missing.double() ** 2).sum())
        sums.size += float((weights.double() * wanted.double() ** 2).sum())
        for reach in reaches:
            operation = calls[reach.operation.weight]
            leaf = operation.returned
            assert leaf is not None
            tail = Tail(stream, leaf)
            counts = tail.backward(weights * tail.forward(torch.ones_like(leaf))).detach()
            change = tail.backward(weights * missing).detach()
            goal = leaf.detach() + torch.where(counts > 0, change / counts, 0)
            rows = operation.outputs(counts).double() * (reach.scales > 0).unsqueeze(1)
            shares = rows.sum(dim=-1) / reach.scales.sum(dim=-1, keepdim=True).clamp_min(1e-300)
            sums.grams[operation.weight].add(operation.inputs(), operation.outputs(goal), shares)

    def _write(self, gap: Gap, call: Call, operation: LinearCall, best: Fitted) -> None:
        """Put a fit into the cut model, and prove that the stream is what was fitted."""
        weight = operation.weight
        stream, calls, _ = run_to(self.cut, call, gap.stream, frozenset({weight}))
        seen = calls[weight]
        assert seen.returned is not None
        rows = with_ones(seen.inputs().double()) @ best.matrix
        change = seen.result(rows, seen.returned).to(seen.returned.dtype) - seen.returned.detach()
        wanted = (stream + Tail(stream, seen.returned).forward(change)).detach()
        values = folded(self.cut.model, operation, best.matrix, best.gram)
        write_into(tensors_of(self.cut.model), values)
        found, _, _ = run_to(self.cut, call, gap.stream, frozenset())
        error = float((found.detach() - wanted).abs().max())
        room = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
        if not error <= room:
            raise VerificationError(
                f"with new numbers in {weight} the stream at {', '.join(gap.blocks)} is not what "
                f"was fitted: largest difference {error:.3g}. The model may keep a copy of it."
            )
