"""Layers: modules that become a pass-through, or next to one, once all their branches are gone.

A module is looked at as one layer when its own forward merges a branch, or when it holds several
smaller layers, each of another class: a decoder block of self-attention, cross-attention and
feed-forward is one layer, a stage of equal blocks is not. Of layers that lie in one another, the
outermost counts.

With its branches cut, an exact layer hands its input on. A post-norm layer does not, since its
normalisations are on the stream itself: what stays is a chain of operations with no weight matrix.
Leaving that out as well is an approximation, and is kept apart as a `bypass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from blockprune.blocks.cuts import Cut, replacements_in, unread_without
from blockprune.blocks.flow import Call, Flow, owner_call
from blockprune.blocks.rule import Branch, merge_of, parameters_read

__all__ = ["find_layers"]

_Place = tuple[Flow, Call]
"""One call of a module in one region."""


def find_layers(
    cuts: Mapping[str, Cut],
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[Cut, ...]]]:
    """Return the layers of a model by the name of their module, exact ones and others.

    Of an exact layer, the names of its branches; of another, what bypasses it, one for each call. A
    module counts when every call of it does.
    """
    scopes = _scopes(cuts)
    members = _members(place for calls in scopes.values() for place in calls)
    exact: dict[str, tuple[str, ...]] = {}
    bypasses: dict[str, tuple[Cut, ...]] = {}
    for path, calls in scopes.items():
        # A branch of another module may be called like this one; it then keeps the name.
        if path in cuts and path not in {cut.name for group in calls.values() for cut in group}:
            continue
        if set(members[path]) != set(calls):
            continue
        for chosen in (_direct(calls), _outermost(calls)):
            if not chosen or path in exact:
                continue
            if all(_passes_through(p[0], members[path][p], group) for p, group in chosen.items()):
                exact[path] = tuple(cut.name for group in chosen.values() for cut in group)
        chosen = _outermost(calls)
        # A name means one thing: where it is a branch's, it is not that of a way around it.
        if path not in exact and path not in cuts and chosen:
            ways = [_bypass(path, p[0], members[path][p], group) for p, group in chosen.items()]
            bypasses[path] = tuple(way for way in ways if way is not None)
            if len(bypasses[path]) < len(ways):
                del bypasses[path]
    exact = {name: parts for name, parts in exact.items() if not _is_inner(parts, name, exact)}
    inner = {name: _branches_in(ways, cuts) for name, ways in bypasses.items()}
    taken = {part for parts in exact.values() for part in parts}
    return exact, {
        name: ways
        for name, ways in bypasses.items()
        if not taken & set(inner[name]) and not _is_inner(inner[name], name, inner)
    }


def _scopes(cuts: Mapping[str, Cut]) -> dict[str, dict[_Place, list[Cut]]]:
    """Return the cuts inside each module, by its path and then by its call."""
    scopes: dict[str, dict[_Place, list[Cut]]] = {}
    for cut in cuts.values():
        for call, path in _calls_around(cut.branch.merge, cut.flow):
            if path:
                scopes.setdefault(path, {}).setdefault((cut.flow, call), []).append(cut)
    return scopes


def _calls_around(node: fx.Node, flow: Flow) -> list[tuple[Call, str]]:
    """Return the module calls that `node` was recorded in, and the path of each module."""
    calls = [("", flow.region.path)]
    return calls + [(call, flow.region.qualified(path)) for call, (path, _) in _stack(node).items()]


def _stack(node: fx.Node) -> dict[Call, tuple[str, Any]]:
    return node.meta.get("nn_module_stack") or {}


def _members(places: Iterable[_Place]) -> dict[str, dict[_Place, list[fx.Node]]]:
    """Return, by the path of a module and its call, the nodes recorded within."""
    members: dict[str, dict[_Place, list[fx.Node]]] = {}
    for flow in dict.fromkeys(flow for flow, _ in places):
        for node in flow.nodes:
            if node.op not in ("placeholder", "output"):
                for call, path in _calls_around(node, flow):
                    members.setdefault(path, {}).setdefault((flow, call), []).append(node)
    return members


def _direct(calls: Mapping[_Place, list[Cut]]) -> dict[_Place, list[Cut]]:
    """Return the cuts that the module's own forward merges, if each call has some."""
    found = {
        place: [cut for cut in group if owner_call(cut.branch.merge) == place[1]]
        for place, group in calls.items()
    }
    return found if all(found.values()) else {}


def _outermost(calls: Mapping[_Place, list[Cut]]) -> dict[_Place, list[Cut]]:
    """Return the cuts within each call that lie in no other, if the module is one layer."""
    found = {}
    for place, group in calls.items():
        ends = {cut.branch.branch for cut in group}
        nested = {
            end
            for cut in group
            for end in unread_without(cut.flow, [cut]) & ends
            if end is not cut.branch.branch
        }
        found[place] = [cut for cut in group if cut.branch.branch not in nested]
        if not _is_one_layer(place[1], found[place]):
            return {}
    return found


def _is_one_layer(call: Call, cuts: Sequence[Cut]) -> bool:
    """Whether the parts of a module are of different classes, and no row of layers."""
    kinds: dict[Call, Any] = {}
    for cut in cuts:
        stack = _stack(cut.branch.merge)
        path = list(stack)
        within = path[path.index(call) + 1 :] if call else path
        around = [*within[:-1], *([call] if call and within else [])]
        if any(_is_row(stack[outer][1]) for outer in around):
            return False
        owner = within[-1] if within else call
        kinds[owner] = stack[owner][1] if owner else None
    has_own = call in kinds
    return len(set(kinds.values())) == len(kinds) and (has_own or len(kinds) > 1)


def _is_row(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Sequential)


def _passes_through(flow: Flow, members: Sequence[fx.Node], cuts: Sequence[Cut]) -> bool:
    replaced = replacements_in(flow, [cut.branch for cut in cuts])
    results = _results(flow, members, replaced, flow.dead_without(replaced))
    return len(results) == 1 and not results & set(members)


def _results(
    flow: Flow, members: Sequence[fx.Node], replaced: Mapping[fx.Node, fx.Node], dead: set[fx.Node]
) -> set[fx.Node]:
    """Return what the code around a module reads of it once `dead` is gone."""
    inside = set(members)
    return {
        flow.origin(node, replaced)
        for node in members
        if (node in replaced or node not in dead) and any(user not in inside for user in node.users)
    }


def _bypass(name: str, flow: Flow, members: Sequence[fx.Node], cuts: Sequence[Cut]) -> Cut | None:
    """Return the way around what stays of a module without its branches, if it is next to none."""
    replaced = replacements_in(flow, [cut.branch for cut in cuts])
    dead = flow.dead_without(replaced)
    inside = set(members)
    results = _results(flow, members, replaced, dead)
    alive = [node for node in members if node not in dead]
    entries = {
        flow.origin(source, replaced)
        for node in alive
        for source in flow.data_sources(node)
        if flow.is_activation(source)
    } - inside
    if len(results) != 1 or len(entries) != 1 or not results <= inside:
        return None
    (result,), (entry,) = results, entries
    holds_matrix = any(p.dim() > 1 for n in alive for _, p in parameters_read(n, flow))
    if not flow.same_kind(result, entry) or holds_matrix:
        return None
    if any(_adds_activations(node, flow) for node in alive):
        return None
    way = Branch(result, entry, result, 0, entry, frozenset(members), is_exact=False)
    return Cut(name, flow, way, frozenset(flow.dead_without({result: entry})))


def _adds_activations(node: fx.Node, flow: Flow) -> bool:
    merge = merge_of(node, flow)
    return merge is not None and all(flow.is_activation(operand) for operand in merge.operands)


def _branches_in(ways: Iterable[Cut], cuts: Mapping[str, Cut]) -> tuple[str, ...]:
    return tuple(
        name
        for name, cut in cuts.items()
        if any(cut.flow is way.flow and cut.branch.branch in way.dead for way in ways)
    )


def _is_inner(parts: Iterable[str], name: str, layers: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a layer is part of another, whose module is further out."""
    return any(
        name != other and name.startswith(other + ".") and set(parts) <= set(layers[other])
        for other in layers
    )
