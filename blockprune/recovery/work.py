"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blockprune.errors import RecoveryError, VerificationError
from blockprune.recovery.data import Batches, weights_of
from blockprune.recovery.distillation import OnProgress, Progress
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap
from blockprune.recovery.gram import with_ones
from blockprune.recovery.masks import NOTHING_COUNTS, Masks
from blockprune.recovery.networks import Networks, gaps_in
from blockprune.recovery.reach import Reach, rounds_for, run_to, statistics_for, watched
from blockprune.recovery.sums import Seen, Sums
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord
from blockprune.tracing import Call

__all__ = ["Weigh", "Work"]

Weigh = Callable[[Tensor, Call], Tensor]
"""From what a stream should be, and the arguments of the model, to what each number counts."""


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
        # A whole batch tells gaps apart that a few samples may not.
        seen = self.batches.first() if len(self.networks.gaps) > 1 else call
        return [gap for gap, _ in gaps_in(self.networks, seen)]

    def recovered(self, gap: Gap, call: Call, family: Fit, ridge: float | None) -> GapRecord:
        """Fit one gap, write what was found into the cut model, and return how it went.

        A fit that is exact leaves what was predicted. One with the statistics of norms held is
        measured by the round behind it, and taken back where it did not make the stream better.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
        rounds = self.rounds(gap, call)
        weigh = self.weighing(gap, call, rounds)
        ridges: dict[str, float] = {}
        before: dict[str, Tensor] = {}
        errors: list[float] = []
        for reaches in rounds:
            sums, held_out = self._read(gap, reaches, weigh)
            if not sums.size + held_out.size:
                raise RecoveryError(NOTHING_COUNTS)
            errors.append(sums.error + held_out.error)
            if before and errors[-1] >= errors[-2]:
                errors.pop()
                self._write(before)
                ridges = {name: ridge for name, ridge in ridges.items() if name not in before}
                break
            before, gain = {}, 0.0
            for reach in reaches:
                best, replaced = self.fitted(gap, call, reach, sums, held_out, family, ridge)
                ridges[reach.operation.weight] = best.ridge
                if reach.is_exact:
                    gain += best.gain
                else:
                    before |= replaced
            if gain:
                errors.append(errors[-1] - gain)
        size = max(sums.size + held_out.size, torch.finfo(torch.float64).tiny)
        return GapRecord(
            blocks=gap.blocks,
            weights=tuple(ridges),
            residual_before=errors[0] / size,
            residual_after=max(errors[-1], 0.0) / size,
            ridge=next(reversed(ridges.values()), None),
        )

    def rounds(self, gap: Gap, call: Call) -> list[list[Reach]]:
        """Return the operations that a gap can be fitted with, by an example; see `rounds_for`.

        A last round without any measures what the fits have left, where they do not tell.
        """
        found = rounds_for(self.cut, call, gap.stream, self._uses)
        if not found or not all(reach.is_exact for reach in found[-1]):
            found.append([])
        return found

    def weighing(self, gap: Gap, call: Call, rounds: Sequence[Sequence[Reach]]) -> Weigh:
        """Return what each number of the stream of a gap counts, as a function of a batch."""
        layouts = {reach.operation.layout for reaches in rounds for reach in reaches}
        mask = self.masks.name_for(call, lambda given: self.cut.value(given, gap.stream))

        def weigh(wanted: Tensor, batch: Call) -> Tensor:
            own = self.masks.of(batch, mask)
            return weights_of(wanted, own, is_sequence="convolution" not in layouts)

        return weigh

    def fitted(
        self,
        gap: Gap,
        call: Call,
        reach: Reach,
        sums: Sums,
        held_out: Sums,
        family: Fit,
        ridge: float | None,
    ) -> tuple[Fitted, dict[str, Tensor]]:
        """Fit one operation to sums over two parts of the data, and write what was found.

        Returns:
            The fit, and the values that it has replaced.

        Raises:
            RecoveryError: too few samples.
            VerificationError: the weights do not compute what was fitted.
        """
        weight = reach.operation.weight
        best = fitted(
            family,
            sums.grams[weight],
            held_out.grams[weight],
            start_of(self.cut.model, reach.operation),
            reach.scales,
            has_bias=has_bias(reach.operation),
            ridge=ridge,
        )
        return best, self._proved(gap, call, reach, best)

    def _read(self, gap: Gap, reaches: Sequence[Reach], weigh: Weigh) -> tuple[Sums, Sums]:
        """Return the sums over what is fitted, and over what is held out."""
        sums, held_out = (Sums.zeros(self.cut.model, reaches) for _ in range(2))
        leaves = frozenset(reach.operation.weight for reach in reaches)
        for batch, is_held_out in self.batches:
            target = self.dense.value(batch, gap.target)
            held = statistics_for(reaches)
            stream, calls, _ = run_to(self.cut, batch, gap.stream, leaves, held=held)
            seen = Seen(stream, target, calls, weigh(target, batch))
            (held_out if is_held_out else sums).add(gap, reaches, seen)
        return sums, held_out

    def _proved(self, gap: Gap, call: Call, reach: Reach, best: Fitted) -> dict[str, Tensor]:
        """Put a fit into the cut model, prove that the stream is what was fitted, and return what
        was there before.

        Raises:
            VerificationError: it is not.
        """
        weight, held = reach.operation.weight, statistics_for([reach])
        stream, calls, _ = run_to(self.cut, call, gap.stream, frozenset({weight}), held=held)
        seen = calls[weight]
        assert seen.returned is not None
        rows = with_ones(seen.inputs().double()) @ best.matrix
        change = seen.result(rows, seen.returned).to(seen.returned.dtype) - seen.returned.detach()
        wanted = (stream + Tail(stream, seen.returned).forward(change)).detach()
        before = self._write(folded(self.cut.model, reach.operation, best.matrix, best.gram))
        found, _, _ = run_to(self.cut, call, gap.stream, frozenset(), held=held)
        error = float((found.detach() - wanted).abs().max())
        room = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
        if not error <= room:
            raise VerificationError(
                f"with new numbers in {weight} the stream at {', '.join(gap.blocks)} is not what "
                f"was fitted: largest difference {error:.3g}. The model may keep a copy of it."
            )
        return before

    def _write(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put values into the cut model, and return those that were there."""
        tensors = tensors_of(self.cut.model)
        before = {name: tensors[name].detach().clone() for name in values}
        write_into(tensors, values)
        return before
