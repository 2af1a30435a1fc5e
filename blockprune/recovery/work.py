"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis
from blockprune.errors import RecoveryError, VerificationError
from blockprune.recovery.data import Batches, MaskFunction, weights_of
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap
from blockprune.recovery.gram import Gram, with_ones
from blockprune.recovery.networks import gaps_in, networks_of
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.reach import Reach, run_to, uses_in, which_reach
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord, TicketRecord
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
        dense_model, ticket: are left as they are.
        record: of the ticket.
        analysis: of the dense model.
        batches: what is read.
        mask_fn: see `recover`.

    Attributes:
        cut: the dense model without what was removed, with the weights of the ticket.
        changed: new values by their names in the dense model.
    """

    def __init__(
        self,
        dense_model: nn.Module,
        ticket: nn.Module,
        record: TicketRecord,
        analysis: BlockAnalysis,
        batches: Batches,
        mask_fn: MaskFunction | None,
    ) -> None:
        self.batches, self.mask_fn = batches, mask_fn
        self._signature = inspect.signature(dense_model.forward)
        self.changed: dict[str, Tensor] = {}
        self._uses: Mapping[str, int] = {}
        self._networks = networks_of(dense_model, ticket, record, analysis)
        self.dense, self.cut = self._networks.dense, self._networks.cut

    def gaps(self, call: Call) -> list[Gap]:
        """Return the gaps, those that are one on an example made one, in order of execution."""
        self._uses = uses_in(self.cut, call)
        return [gap for gap, _ in gaps_in(self._networks, call)]

    def recovered(self, gap: Gap, call: Call, family: Fit, ridge: float | None) -> GapRecord:
        """Fit one gap, write what was found into the cut model, and return how it went.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
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
        weights = weights_of(wanted, self._mask(call), is_sequence=is_sequence)
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

    def _mask(self, call: Call) -> Tensor | None:
        """Return the weight of each position, where a user or the call has one.

        Raises:
            RecoveryError: what the user's function returns is none.
        """
        if self.mask_fn is None:
            found = self._signature.bind(*call.args, **call.kwargs).arguments
            mask = found.get("attention_mask", call.kwargs.get("attention_mask"))
            return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        mask = self.mask_fn(call)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise RecoveryError("mask_fn returns a tensor (samples, positions) of weights.")
        return mask

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
        self.changed |= values
        found, _, _ = run_to(self.cut, call, gap.stream, frozenset())
        error = float((found.detach() - wanted).abs().max())
        room = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
        if not error <= room:
            raise VerificationError(
                f"with new numbers in {weight} the stream at {', '.join(gap.blocks)} is not what "
                f"was fitted: largest difference {error:.3g}. The model may keep a copy of it."
            )
