"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, Cut, by_flow
from blockprune.errors import RecoveryError, VerificationError
from blockprune.recovery.data import Batches, MaskFunction, mask_of
from blockprune.recovery.fitting import Fit, Fitted, fitted
from blockprune.recovery.folding import folded, has_bias, start_of, tensors_of, write_into
from blockprune.recovery.gaps import Gap, gaps_of
from blockprune.recovery.gram import with_ones
from blockprune.recovery.operations import LinearCall
from blockprune.recovery.passes import Inspected
from blockprune.recovery.reach import Reach, run_to, uses_in, which_reach
from blockprune.recovery.sums import Seen, Sums
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord, ticket_graph
from blockprune.tracing import Call, aliased_copy, copy_model, structural_copy

__all__ = ["Work"]


class Work:
    """The recovery of one ticket.

    Args:
        dense_model: is left as it is.
        analysis: of the dense model.
        cuts: what was removed from it.
        batches: what is read.
        mask_fn: see `recover`.
        weights: of the ticket, by their names in the dense model; None: those of the dense model.

    Attributes:
        dense: the dense model.
        cut: the dense model without what was removed, with the weights of the ticket.
        changed: new values by their names in the dense model.

    Raises:
        RecoveryError: the weights are not of this dense model.
    """

    def __init__(
        self,
        dense_model: nn.Module,
        analysis: BlockAnalysis,
        cuts: Sequence[Cut],
        batches: Batches,
        mask_fn: MaskFunction | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.batches = batches
        self._mask = partial(mask_of, dense_model, mask_fn=mask_fn)
        self.changed: dict[str, Tensor] = {}
        self._uses: Mapping[str, int] = {}
        self._gaps = gaps_of(analysis.cuts, cuts)
        flows = by_flow(cuts)
        # With parameters of its own, in the memory of the dense model's.
        self.dense = Inspected(
            aliased_copy(dense_model), {f.region.path: f.region.graph for f in flows}
        )
        # Without the user's hooks, and with weights of its own.
        shallow = copy_model(structural_copy(dense_model))
        _load(shallow, weights or {})
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

    def _seen(self, gap: Gap, reaches: Sequence[Reach], call: Call) -> Seen:
        with torch.no_grad():
            target = self.dense.value(call, gap.target)
        leaves = frozenset(reach.operation.weight for reach in reaches)
        stream, calls, _ = run_to(self.cut, call, gap.stream, leaves)
        return Seen(stream, target, calls, self._mask(call))

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


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a ticket into a copy of the dense model.

    Raises:
        RecoveryError: they do not fit.
    """
    state = tensors_of(model)
    with torch.no_grad():
        for name, tensor in weights.items():
            own = state.get(name)
            if own is None or own.shape != tensor.shape:
                raise RecoveryError(
                    f"{name!r} of the ticket is no tensor of the dense model, or has another "
                    "shape: it was cut from another model."
                )
            own.copy_(tensor)
