"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from blockprune.errors import VerificationError
from blockprune.recovery.data import Batches, Masks
from blockprune.recovery.distillation import OnProgress, Progress
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap
from blockprune.recovery.gram import with_ones
from blockprune.recovery.networks import Networks, gaps_in
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.reach import Reach, run_to, watched, which_reach
from blockprune.recovery.sums import Seen, Sums
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord
from blockprune.tracing import Call

__all__ = ["Work"]


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

    def all_recovered(
        self, call: Call, family: Fit, ridge: float | None, on_progress: OnProgress | None = None
    ) -> tuple[GapRecord, ...]:
        """Fit one gap after the other, in order of execution, and return how each went.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
        gaps, found = self.gaps(call), []
        for done, gap in enumerate(gaps, 1):
            found.append(self.recovered(gap, call, family, ridge))
            if on_progress is not None:
                on_progress(Progress(done=done, total=len(gaps)))
        return tuple(found)

    def gaps(self, call: Call) -> list[Gap]:
        """Return the gaps, those that are one on an example made one, in order of execution."""
        self._uses = watched(self.cut, call).uses
        return [gap for gap, _ in gaps_in(self.networks, call)]

    def recovered(self, gap: Gap, call: Call, family: Fit, ridge: float | None) -> GapRecord:
        """Fit one gap, write what was found into the cut model, and return how it went.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
        reaches = self.reaches(gap, call)
        sums, held_out = (Sums.zeros(self.cut.model, reaches) for _ in range(2))
        for batch, is_held_out in self.batches:
            (held_out if is_held_out else sums).add(gap, reaches, self._seen(gap, reaches, batch))
        return self.fitted(gap, call, reaches, sums, held_out, family, ridge)

    def reaches(self, gap: Gap, call: Call) -> list[Reach]:
        """Return the operations that a gap can be fitted with, by an example."""
        return which_reach(self.cut, call, gap.stream, self._uses)

    def fitted(
        self,
        gap: Gap,
        call: Call,
        reaches: Sequence[Reach],
        sums: Sums,
        held_out: Sums,
        family: Fit,
        ridge: float | None,
    ) -> GapRecord:
        """Fit one gap to sums over two parts of the data; otherwise like `recovered`."""
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

    def _seen(self, gap: Gap, reaches: Sequence[Reach], call: Call) -> Seen:
        with torch.no_grad():
            target = self.dense.value(call, gap.target)
        leaves = frozenset(reach.operation.weight for reach in reaches)
        stream, calls, _ = run_to(self.cut, call, gap.stream, leaves)
        return Seen(stream, target, calls, self.masks.of(call))

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
