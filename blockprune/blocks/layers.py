"""Layers: modules that become a pass-through once all their branches are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from blockprune.blocks.cuts import Cut, replacements_in
from blockprune.blocks.flow import Flow
from blockprune.blocks.naming import owner_call, owner_of

__all__ = ["find_layers"]


def find_layers(cuts: Mapping[str, Cut]) -> dict[str, tuple[str, ...]]:
    """Return the layer blocks of a model: the module's name, and the names of its branches.

    A module counts when every call of it hands its input on once its branches are cut.
    """
    by_owner: dict[str, dict[tuple[Flow, str], list[Cut]]] = {}
    for cut in cuts.values():
        merge = cut.branch.merge
        owner = owner_of(merge, cut.flow)
        by_owner.setdefault(owner, {}).setdefault((cut.flow, owner_call(merge)), []).append(cut)
    members = _members_of_calls({key for calls in by_owner.values() for key in calls})
    layers = {}
    for owner, calls in by_owner.items():
        names = tuple(cut.name for group in calls.values() for cut in group)
        # A branch of another module may be called like this one; it then keeps the name.
        is_free = owner not in cuts or names == (owner,)
        if (
            owner
            and is_free
            and all(
                _passes_through(flow, members[flow, call], group)
                for (flow, call), group in calls.items()
            )
        ):
            layers[owner] = names
    return layers


def _members_of_calls(
    calls: Iterable[tuple[Flow, str]],
) -> dict[tuple[Flow, str], list[fx.Node]]:
    """Return the nodes recorded within each of these module calls."""
    members: dict[tuple[Flow, str], list[fx.Node]] = {key: [] for key in calls}
    for flow in dict.fromkeys(flow for flow, _ in members):
        for node in flow.region.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
            for call in ("", *stack):
                if (flow, call) in members:
                    members[flow, call].append(node)
    return members


def _passes_through(flow: Flow, members: Sequence[fx.Node], cuts: Sequence[Cut]) -> bool:
    replaced = replacements_in(flow, [cut.branch for cut in cuts])
    dead = flow.dead_without(replaced)
    inside = set(members)
    results = {
        flow.origin(node, replaced)
        for node in members
        if (node in replaced or node not in dead) and any(user not in inside for user in node.users)
    }
    return len(results) == 1 and not results & inside
