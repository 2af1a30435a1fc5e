"""The two networks that a recovery compares, and which of their values belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, Cut, by_flow
from blockprune.errors import RecoveryError
from blockprune.recovery.folding import tensors_of, write_into
from blockprune.recovery.gaps import Gap, Location, gaps_of
from blockprune.recovery.passes import Inspected
from blockprune.surgery import ticket_graph
from blockprune.tracing import Call, aliased_copy, copy_model, structural_copy

__all__ = ["Networks", "gaps_in", "merges_in", "networks_of"]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The dense network and the cut one, in evaluation mode and without gradients.

    Attributes:
        dense: has parameters of its own, in the memory of the dense model's.
        cut: the dense model without what was removed, with a copy of the weights of the ticket.
        gaps: where something was removed, one region at a time.
        kept: the merges of branches that stay, in every region that was asked for.
    """

    dense: Inspected
    cut: Inspected
    gaps: tuple[Gap, ...]
    kept: tuple[Location, ...]


def networks_of(
    dense_model: nn.Module,
    analysis: BlockAnalysis,
    cuts: Sequence[Cut],
    weights: Mapping[str, Tensor] | None = None,
    *,
    everywhere: bool = False,
) -> Networks:
    """Return the dense network and that of a ticket.

    Args:
        dense_model: is left as it is.
        analysis: of it.
        cuts: what was removed from it.
        weights: of the ticket, by their names in the dense model; None: those of the dense model.
        everywhere: also look into regions that nothing was removed from.

    Raises:
        RecoveryError: the weights are not of this dense model.
    """
    flows = by_flow(cuts)
    if everywhere:
        flows = {flow: flows.get(flow, []) for flow in by_flow(analysis.cuts.branches.values())}
    dense = aliased_copy(dense_model).eval().requires_grad_(False)
    # Without the user's hooks, and with weights of its own.
    cut = copy_model(structural_copy(dense_model)).eval().requires_grad_(False)
    _load(cut, weights or {})
    return Networks(
        Inspected(dense, {flow.region.path: flow.region.graph for flow in flows}),
        Inspected(
            cut,
            {
                flow.region.path: ticket_graph(flow, group, analysis.cuts)
                for flow, group in flows.items()
            },
        ),
        tuple(gaps_of(analysis.cuts, cuts)),
        tuple(
            Location(one.flow.region.path, one.branch.merge.name)
            for one in analysis.cuts.branches.values()
            if one.flow in flows and one not in cuts
        ),
    )


def gaps_in(networks: Networks, call: Call) -> list[tuple[Gap, Tensor]]:
    """Return the gaps in order of execution, each with its stream on an example.

    Those whose streams have the same value are one; on few samples a kept branch between two of
    them may happen to be silent.

    Raises:
        RecoveryError: a gap is passed more than once, or the shapes do not fit.
    """
    streams = networks.cut.values(call, *(gap.stream for gap in networks.gaps))
    targets = networks.dense.values(call, *(gap.target for gap in networks.gaps))
    found: list[tuple[Gap, Tensor]] = []
    for gap in networks.gaps:
        stream = _only(streams, gap.stream)
        target = _only(targets, gap.target)
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
    return found


def merges_in(networks: Networks, call: Call, gaps: Iterable[tuple[Gap, Tensor]]) -> list[Location]:
    """Return the kept merges that both networks compute once, other than streams of gaps.

    What stands in front of a gap is to become what is behind the removed blocks, and not what it is
    in the dense network.
    """
    found = networks.cut.values(call, *networks.kept)
    wanted = networks.dense.values(call, *networks.kept)
    streams = [stream for _, stream in gaps]

    def is_alike(place: Location) -> bool:
        own, others = found[place], wanted[place]
        if len(own) != 1 or len(others) != 1 or not isinstance(own[0], Tensor):
            return False
        return (
            own[0].is_floating_point()
            and own[0].shape == others[0].shape
            and not any(torch.equal(own[0], stream) for stream in streams)
        )

    return [place for place in networks.kept if is_alike(place)]


def _only(values: dict[Location, list[Any]], place: Location) -> Tensor:
    found = values[place]
    if len(found) != 1:
        raise RecoveryError(
            f"{place.region or 'the model'!r} is called {len(found)} times in one pass: what one "
            "call of it lacks cannot be told from another."
        )
    value: Tensor = found[0]
    return value


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a copy of the dense model.

    Raises:
        RecoveryError: they do not fit.
    """
    own = tensors_of(model)
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise RecoveryError(
                f"{name!r} of the ticket is no tensor of the dense model, or has another shape: it "
                "was cut from another model."
            )
    write_into(own, weights)
    for name, tensor in weights.items():
        if not torch.equal(own[name], tensor.to(own[name])):
            raise RecoveryError(
                f"{name!r} of the ticket shares its memory with another tensor in the dense model, "
                "and not in the ticket. Tie them again, or untie them in the dense model as well."
            )
