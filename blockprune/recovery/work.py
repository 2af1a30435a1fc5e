"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, by_flow
from blockprune.errors import RecoveryError, VerificationError
from blockprune.recovery.data import Batches, MaskFunction, weights_of
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap, gaps_of
from blockprune.recovery.gram import Gram, with_ones
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.passes import Inspected
from blockprune.recovery.reach import Reach, run_to, uses_in, which_reach
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord, TicketRecord, cuts_of, ticket_graph, translated
from blockprune.tracing import Call, aliased_copy, copy_model, structural_copy

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
        cuts = cuts_of(analysis, record.plan.remove, record.plan.granularity)
        self._gaps = gaps_of(analysis.cuts, cuts)
        flows = by_flow(cuts)
        # With parameters of its own, in the memory of the dense model's.
        self.dense = Inspected(
            aliased_copy(dense_model), {f.region.path: f.region.graph for f in flows}
        )
        # Without the user's hooks, and with weights of its own.
        shallow = copy_model(structural_copy(dense_model))
        _load(shallow, ticket, record)
        self.cut = Inspected(
            shallow,
            {f.region.path: ticket_graph(f, group, analysis.cuts) for f, group in flows.items()},
        )

    def gaps(self, call: Call) -> list[Gap]:
        """Return the gaps, those that are one on an example made one, in order of execution."""
        self._uses = uses_in(self.cut, call)
        streams = self._values(self.cut, call, [gap.stream for gap in self._gaps])
        targets = self._values(self.dense, call, [gap.target for gap in self._gaps])
        found: list[tuple[Gap, Tensor]] = []
        for gap in self._gaps:
            [stream], [target] = streams[gap.stream], targets[gap.target]
            if stream.shape != target.shape or not stream.is_floating_point():
                raise RecoveryError(
                    f"the stream without {', '.join(gap.blocks)} has the shape "
                    f"{tuple(stream.shape)}, and {tuple(target.shape)} with them."
                )
            if found and torch.equal(found[-1][1], stream):
                before, _ = found.pop()
                gap = dataclasses.replace(
                    gap, blocks=(*before.blocks, *gap.blocks), stream=before.stream
                )
            found.append((gap, stream))
        return [gap for gap, _ in found]

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

    def _values(self, model: Inspected, call: Call, places: list[Any]) -> dict[Any, list[Any]]:
        with torch.no_grad():
            found = model.values(call, *places)
        for place, values in found.items():
            if len(values) != 1:
                raise RecoveryError(
                    f"{place.region or 'the model'!r} is called {len(values)} times in one pass: "
                    "what one call of it lacks cannot be told from another."
                )
        return found

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
        sums.error += _squares(missing, weights)
        sums.size += _squares(wanted, weights)
        for reach in reaches:
            operation = calls[reach.operation.weight]
            gram = sums.grams[operation.weight]
            for inputs, goal, shares in _rows(reach, operation, stream, missing, weights):
                gram.add(inputs, goal, shares)

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
    seen = [leaf.detach(), tail.backward(weights * missing)]
    if not (reach.is_even and bool((weights == 1).all())):
        seen.append(tail.backward(weights * tail.forward(torch.ones_like(leaf))).detach())
    scales = reach.scales.unsqueeze(1)
    total = scales.sum(dim=-1).clamp_min(torch.finfo(scales.dtype).tiny)
    for inputs, result, change, *counted in operation.pieces(*seen):
        counts = counted[0].double() if counted else scales
        goal = result.double() + torch.where(counts > 0, change.double() / counts, 0)
        shares = (counts * (scales > 0)).sum(dim=-1) / total
        yield inputs, goal, shares.expand(-1, inputs.shape[1])


def _load(model: nn.Module, ticket: nn.Module, record: TicketRecord) -> None:
    """Copy the tensors of a ticket into a copy of the dense model.

    Raises:
        RecoveryError: they do not fit.
    """
    state = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors_of(ticket).items():
            own = state.get(translated(name, record.renamed))
            if own is None or own.shape != tensor.shape:
                raise RecoveryError(
                    f"{name!r} of the ticket is no tensor of the dense model, or has another "
                    "shape: it was cut from another model."
                )
            own.copy_(tensor)
