"""Where a cut has left gaps in the stream, and which value of the dense model belongs there.

A run of removed blocks turns the value of the stream behind the run into the value in front of it.
Each such place is a gap: the *stream*, a value that the ticket computes, should now be the
*target*, a value that the dense model computes behind the last removed merge. Where the merges have
an activation behind them (ReLU after the sum), both are the values in front of that activation.

Both are named by nodes of recorded graphs: a ticket's graph keeps the names of the dense one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from blockprune.blocks import Cut, Cuts, Flow, by_flow, clamped_range, cut_together, input_of

__all__ = ["Gap", "Location", "gaps_of"]


@dataclasses.dataclass(frozen=True)
class Location:
    """A node of a recorded graph: the path of its region, and its name."""

    region: str
    node: str


@dataclasses.dataclass(frozen=True)
class Gap:
    """One gap in the stream of a ticket.

    Attributes:
        blocks: names of the removed branches that left it.
        stream: the value in the ticket that stands for what went.
        target: the value in the dense model that it should be.
    """

    blocks: tuple[str, ...]
    stream: Location
    target: Location


def gaps_of(cuts: Cuts, chosen: Sequence[Cut]) -> list[Gap]:
    """Return the gaps that cutting `chosen` leaves, in order of execution, one region at a time.

    A run of blocks that extends over several regions has a gap in each; that they are one is seen
    when the ticket runs, since their streams have the same value.
    """
    found: list[Gap] = []
    groups = by_flow(chosen)
    for flow, replaced in cuts.replacements(chosen).items():
        dead = flow.dead_without(replaced)
        runs: dict[fx.Node, list[Cut]] = {}
        tops = cut_together(cut.branch for cut in groups[flow])
        for cut in sorted(groups[flow], key=lambda cut: flow.index[cut.branch.merge]):
            merge = tops[cut.branch].merge
            if merge not in dead or merge in replaced:
                runs.setdefault(flow.origin(merge, replaced), []).append(cut)
        for stream, run in runs.items():
            target = max((tops[cut.branch].merge for cut in run), key=flow.index.__getitem__)
            before, after = _without_activation(flow, stream, target, replaced)
            path = flow.region.path
            names = tuple(cut.name for cut in run)
            found.append(Gap(names, Location(path, before.name), Location(path, after.name)))
    return found


def _without_activation(
    flow: Flow, stream: fx.Node, merge: fx.Node, replaced: dict[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Return stream and target in front of the activation that both have, or as they are."""
    activations = [
        node
        for node in replaced
        if clamped_range(node, flow) is not None
        and (given := input_of(node)) is not None
        and flow.origin(given) is merge
    ]
    if not activations:
        return stream, merge
    source = input_of(stream)
    if source is not None and clamped_range(stream, flow) == clamped_range(activations[0], flow):
        return source, merge
    return stream, activations[0]
