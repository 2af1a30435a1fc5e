"""One gap after the other: what it is fitted to, with what, and what is written back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
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
from blockprune.recovery.masks import Masks
from blockprune.recovery.norms import HeldStatistics
from blockprune.recovery.passes import Inspected
from blockprune.recovery.reach import Reach, rounds_for, run_to, uses_in
from blockprune.recovery.tail import Tail
from blockprune.surgery import GapRecord, TicketRecord, cuts_of, ticket_graph, translated
from blockprune.tracing import Call, aliased_copy, copy_model, structural_copy

__all__ = ["Work"]

_Weigh = Callable[[Tensor, Call], Tensor]
"""From what a stream should be, and the arguments of the model, to what each number counts."""


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
        changed: new values by their names in the dense model; a shared one by all of its names.
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
        self.batches = batches
        self._masks = Masks(inspect.signature(dense_model.forward), mask_fn)
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

        A fit that is exact leaves what was predicted. One with the statistics of norms held is
        measured by the round behind it, and taken back where it did not make the stream better.

        Raises:
            RecoveryError: too few samples, or activations that are not finite.
            VerificationError: the weights do not compute what was fitted.
        """
        rounds = rounds_for(self.cut, call, gap.stream, self._uses)
        if not rounds or not all(reach.is_exact for reach in rounds[-1]):
            rounds.append([])  # It measures only.
        layouts = {reach.operation.layout for reaches in rounds for reach in reaches}
        mask = self._masks.name_for(call, lambda given: self._stream(gap, given))

        def weigh(wanted: Tensor, batch: Call) -> Tensor:
            own = self._masks.of(batch, mask)
            return weights_of(wanted, own, is_sequence="convolution" not in layouts)

        ridges: dict[str, float] = {}
        before: dict[str, Tensor] = {}
        errors: list[float] = []
        for reaches in rounds:
            sums, held_out = self._read(gap, reaches, weigh)
            errors.append(sums.error + held_out.error)
            if before and errors[-1] >= errors[-2]:
                errors.pop()
                self._write(before)
                ridges = {name: ridge for name, ridge in ridges.items() if name not in before}
                break
            before = {}
            gain = 0.0
            for reach in reaches:
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
                values = self._proved(gap, call, reach, best)
                if reach.is_exact:
                    gain += best.gain
                else:
                    before |= values
                ridges[weight] = best.ridge
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

    def _stream(self, gap: Gap, call: Call) -> Tensor:
        with torch.no_grad():
            return self.cut.value(call, gap.stream)

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

    def _read(self, gap: Gap, reaches: list[Reach], weigh: _Weigh) -> tuple[_Sums, _Sums]:
        """Return the sums over what is fitted, and over what is held out."""
        sums, held_out = self._sums(reaches), self._sums(reaches)
        for batch, is_held_out in self.batches:
            part = held_out if is_held_out else sums
            self._add(part, gap, reaches, batch, weigh)
        return sums, held_out

    def _sums(self, reaches: list[Reach]) -> _Sums:
        grams = {}
        for reach in reaches:
            start = start_of(self.cut.model, reach.operation)
            groups, columns, outputs = start.shape
            grams[reach.operation.weight] = Gram.zeros(groups, columns - 1, outputs, start.device)
        return _Sums(grams)

    def _add(self, sums: _Sums, gap: Gap, reaches: list[Reach], call: Call, weigh: _Weigh) -> None:
        with torch.no_grad():
            wanted = self.dense.value(call, gap.target)
        leaves = frozenset(reach.operation.weight for reach in reaches)
        stream, calls, _ = run_to(self.cut, call, gap.stream, leaves, held=_statistics(reaches))
        wanted = wanted.to(stream.device)
        missing = wanted - stream.detach()
        if not bool(missing.isfinite().all()):
            raise RecoveryError(
                f"the stream at {', '.join(gap.blocks)} has numbers that are not finite, on these "
                "data. Leave out the samples that cause it, or use a wider precision."
            )
        weights = weigh(wanted, call)
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

    def _proved(self, gap: Gap, call: Call, reach: Reach, best: Fitted) -> dict[str, Tensor]:
        """Put a fit into the cut model, prove that the stream is what was fitted, and return what
        was there before.

        Raises:
            VerificationError: it is not.
        """
        weight, held = reach.operation.weight, _statistics([reach])
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

    def _write(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put values into the cut model, and return those that were there."""
        tensors = tensors_of(self.cut.model)
        before = {name: tensors[name].detach().clone() for name in values}
        write_into(tensors, values)
        for name, value in values.items():
            self.changed |= {n: value for n, own in tensors.items() if own is tensors[name]}
        return before


def _statistics(reaches: list[Reach]) -> HeldStatistics | None:
    """Return where norms keep their statistics, if one of these operations needs them held."""
    needs = any(not one.is_exact or one.operation.layout == "channels" for one in reaches)
    return HeldStatistics() if needs else None


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
