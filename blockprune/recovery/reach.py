"""Which linear operations reach a gap, found by trial.

An operation can be refitted where the stream depends on its result y alone, and by a tail A whose
A^T A is diagonal (see `tail`). No list of layers says so. The cut model runs once more for each
candidate, the last ones first, with something added to y: the stream must change by A times that.

Where none does, a norm of positions may stand between (post-norm layers). The trial is then made
with the statistics of norms held, and the norm's own weight and bias are tried as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import raise_if_out_of_memory
from blockprune.recovery.gaps import Location
from blockprune.recovery.norms import HeldStatistics
from blockprune.recovery.operations import LinearCall, Watching
from blockprune.recovery.passes import Inspected
from blockprune.recovery.tail import Tail
from blockprune.tracing import Call

__all__ = ["Reach", "names_of", "rounds_for", "run_to", "statistics_for", "watched"]

_FURTHER = 2
"""How many operations that fail are tried behind one that reaches a gap."""
_WHOLE = 0.999
"""What share of a stream an operation reaches at the least that reaches the whole of it."""
_MOST = 24
"""How many operations are tried for one gap."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """A linear operation that can be refitted for a gap.

    Attributes:
        operation: as it was called.
        scales: what the square of each output counts in the stream, (groups, outputs of a group);
            0 for one that does not reach it.
        share: how much of the stream it reaches.
        is_exact: whether the stream depends on it linearly; else only with the statistics of
            norms held.
    """

    operation: LinearCall
    scales: Tensor
    share: float
    is_exact: bool = True


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter and buffer by its identity."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {id(tensor): name for name, tensor in tensors}


def run_to(
    cut: Inspected,
    call: Call,
    stream: Location,
    leaves: frozenset[str],
    change: Callable[[Tensor], Tensor] | None = None,
    held: HeldStatistics | None = None,
) -> tuple[Tensor, dict[str, LinearCall], list[LinearCall]]:
    """Run the cut model up to a stream.

    Args:
        cut, call: the model and its arguments.
        stream: where the run ends.
        leaves, change: see `Watching`.
        held: what norms use for statistics; filled in if this is the first run with it.

    Returns:
        The stream, the calls whose results are leaves, by the names of their weights, and all
        calls of linear operations in order.
    """
    if held is not None:
        held.rewind()
    watching = Watching(names_of(cut.model), leaves, change, held)
    with watching:
        value = cut.value(call, stream)
    calls = {seen.weight: seen for seen in watching.calls if seen.weight in leaves}
    return value, calls, watching.calls


def watched(cut: Inspected, call: Call) -> Watching:
    """Return the linear operations of one whole run, and how often parameters are read in it."""
    watching = Watching(names_of(cut.model))
    with watching:
        cut.values(call)
    return watching


def rounds_for(
    cut: Inspected, call: Call, stream: Location, uses: Mapping[str, int]
) -> list[list[Reach]]:
    """Return the operations that a gap can be fitted with, of weights that nothing else reads.

    A round is what is fitted together, and rounds are fitted one after the other. One round, of
    one operation, if there is one that reaches the whole stream. Where several do, that behind most
    other linear operations (the end of a branch goes before a projection beside it), and of these
    that with the most numbers to fit for each output. Else as many as reach parts of it
    (concatenated branches).

    Behind a norm of positions: its weight and bias, then the operation in front of it, and, since
    that one changes what the norm is given, weight and bias once more.
    """
    whole, parts = _found(cut, call, stream, uses, None)
    if whole or sum(part.share for part in parts) > _WHOLE:
        return [whole[:1] or list(_apart(parts))]
    behind, _ = _found(cut, call, stream, uses, HeldStatistics())
    norms = [one for one in behind if one.operation.layout == "channels" and one.is_exact]
    others = [one for one in behind if one.operation.layout != "channels"]
    if not norms and not others:
        return [list(_apart(parts))] if parts else []
    return [[one] for one in (*norms[:1], *others[:1], *(norms[:1] if others else ()))]


def statistics_for(reaches: Sequence[Reach]) -> HeldStatistics | None:
    """Return where norms keep their statistics, if one of these operations needs them held."""
    needs = any(not one.is_exact or one.operation.layout == "channels" for one in reaches)
    return HeldStatistics() if needs else None


def _found(
    cut: Inspected,
    call: Call,
    stream: Location,
    uses: Mapping[str, int],
    held: HeldStatistics | None,
) -> tuple[list[Reach], list[Reach]]:
    """Return what reaches the whole of a stream, the best first, and what reaches parts of it."""
    value, _, calls = run_to(cut, call, stream, frozenset(), held=held)
    if not value.is_floating_point() or (held is not None and held.is_empty):
        return [], []
    own = [seen for seen in calls if all(uses[n] == 1 for n in (seen.weight, seen.bias) if n)]
    candidates = [seen.weight for seen in reversed(own)][:_MOST]
    whole: list[Reach] = []
    parts: list[Reach] = []
    failed = 0
    for weight in candidates:
        found = _try(cut, call, stream, weight, held, uses)
        if found is None:
            failed += 1
        else:
            (whole if found.share > _WHOLE else parts).append(found)
            failed = 0
        if failed > _FURTHER and (whole or sum(part.share for part in parts) > _WHOLE):
            break
    if len(whole) < 2:
        return whole, parts
    _, _, calls = run_to(cut, call, stream, frozenset({calls[0].weight}), held=held)
    levels = _levels(calls)
    whole.sort(
        key=lambda one: (levels[one.operation.weight], _columns(cut.model, one)), reverse=True
    )
    return whole, parts


def _levels(calls: list[LinearCall]) -> dict[str, int]:
    """Return on how many linear operations in a row the result of each depends."""
    own = {seen.node for seen in calls if seen.node is not None}
    known: dict[Any, int] = {None: 0}
    for seen in calls:
        pending = [seen.node]
        while pending:
            node = pending[-1]
            before = [] if node is None else [other for other, _ in node.next_functions]
            missing = [other for other in before if other not in known]
            if node not in known and missing:
                pending += missing
                continue
            pending.pop()
            known.setdefault(node, max((known[o] for o in before), default=0) + (node in own))
    return {seen.weight: known[seen.node] for seen in calls}


def _columns(model: nn.Module, reach: Reach) -> int:
    weight = model.get_parameter(reach.operation.weight)
    return reach.operation.matrix(weight).shape[1]


def _apart(parts: list[Reach]) -> Iterator[Reach]:
    """Yield those that together reach no more than there is."""
    share = 0.0
    for part in parts:
        if share + part.share <= 1.001:
            share += part.share
            yield part


def _try(
    cut: Inspected,
    call: Call,
    stream: Location,
    weight: str,
    held: HeldStatistics | None,
    uses: Mapping[str, int],
) -> Reach | None:
    value, seen, _ = run_to(cut, call, stream, frozenset({weight}), held=held)
    operation = seen[weight]
    leaf = operation.returned
    assert leaf is not None
    if not Tail.reaches(value, leaf):
        return None
    if operation.norm is not None and any(uses[name] != 1 for name in operation.norm.names):
        # Another call is normalised by it as well: it stays as it is.
        operation = dataclasses.replace(operation, norm=None)
    try:
        return _measured(cut, call, stream, operation, leaf, value, held)
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        # What has no second derivative is not linear.
        return None


def _measured(
    cut: Inspected,
    call: Call,
    stream: Location,
    operation: LinearCall,
    leaf: Tensor,
    value: Tensor,
    held: HeldStatistics | None,
) -> Reach | None:
    tail = Tail(value, leaf)
    spread = leaf.detach().double().std().nan_to_num().to(leaf.dtype).clamp_min(1e-3)
    generator = torch.Generator().manual_seed(0)

    def signs() -> Tensor:
        drawn = torch.randint(0, 2, leaf.shape, generator=generator)
        return (drawn * 2 - 1).to(leaf) * spread

    one, other = signs(), signs()
    moved = tail.forward(one)

    def changes(held: HeldStatistics | None) -> bool:
        leaves = frozenset({operation.weight})
        changed, _, _ = run_to(cut, call, stream, leaves, lambda y: one, held)
        return _close(changed - value, moved, value)

    if not changes(held):
        return None
    squares = tail.backward(moved) / one
    if not _close(tail.backward(tail.forward(other)) / other, squares, squares):
        return None
    rows = operation.outputs(squares.detach().double())
    scales = rows.amax(dim=1)
    # Each position counts as much in every channel that reaches the stream.
    shares = rows / scales.clamp_min(1e-300).unsqueeze(1)
    reached = scales > 1e-12 * scales.max().clamp_min(1e-300)
    if not bool(reached.any()):
        return None
    first = shares.gather(
        2, reached.long().argmax(dim=1)[:, None, None].expand(-1, len(shares[0]), 1)
    )
    if not bool((torch.where(reached.unsqueeze(1), shares - first, 0.0).abs() < 1e-2).all()):
        return None
    share = float((moved.detach() != 0).double().mean())
    plain = dataclasses.replace(operation, given=None, returned=None, node=None)
    return Reach(
        plain,
        torch.where(reached, scales, 0.0),
        share,
        is_exact=held is None or changes(HeldStatistics()),
    )


def _close(found: Tensor, wanted: Tensor, size: Tensor) -> bool:
    """Whether two changes are alike, as far as the digits of `size` go."""
    found, wanted = found.detach().double(), wanted.detach().double()
    digits = torch.finfo(size.dtype).eps * size.detach().double().abs().max()
    error = (found - wanted).abs().max()
    return bool(error <= 1e-3 * wanted.abs().max() + 64 * digits)
