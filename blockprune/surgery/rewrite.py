"""Rewriting one region's graph: the ticket's graph, and the reference that it must equal.

In the ticket a removed merge m = s + b becomes s. In the reference it stays, with b replaced by
`zeros_like(b)`: zero times infinity would be NaN. Where a whole layer is bypassed, which is an
approximation, the reference goes on computing it and hands its input on.

The dense m is memory of its own, s is not. So where something behind the merge writes into m in
place (a ReLU whose shortcut was not activated yet), or into s, the ticket works on a clone of s:
others may read s, or autograd may have saved it. The same holds where s is the input of a region
inside the model, or m leaves such a region, since the code around it is not seen and may write into
what it is given. A user may write into what the whole model returns, so there m is a clone where
anything else can be seen of s: it is an argument, a weight or another output, or is read again.
Nothing is cloned where m lay in the memory of s already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from blockprune.blocks import Cut, Cuts, Flow, carry_name, cut_together, still_added
from blockprune.surgery.graph_module import GONE_KEY
from blockprune.tracing import Place, copy_graph

__all__ = ["reference_graph", "ticket_graph"]


def reference_graph(flow: Flow, cuts: Sequence[Cut]) -> fx.Graph:
    """Return the region's graph with the outputs of the cut branches multiplied by zero."""
    graph, twins = copy_graph(flow.region.graph)
    stands_for: dict[fx.Node, fx.Node] = {}
    for cut in sorted(cuts, key=lambda cut: flow.index[cut.branch.merge]):
        merge, branch = twins[cut.branch.merge], twins[cut.branch.branch]
        if not cut.branch.is_exact:
            shortcut = cut.branch.shortcut
            value = stands_for[cut.branch.merge] = stands_for.get(shortcut, twins[shortcut])
            merge.replace_all_uses_with(value, propagate_meta=False)
            continue
        with graph.inserting_before(merge):
            zeros = graph.call_function(torch.zeros_like, (branch,))
        merge.replace_input_with(branch, zeros)
    return graph


def ticket_graph(flow: Flow, cuts: Sequence[Cut], all_cuts: Cuts) -> fx.Graph:
    """Return the region's graph without the cut branches and all that only they needed."""
    graph, twins = copy_graph(flow.region.graph)
    tops = set(cut_together(cut.branch for cut in cuts).values())
    for cut in all_cuts.branches.values():
        if cut.flow is flow:
            # The name that the dense model gives this branch; one less of them would change it.
            added = still_added(cut.branch, tops)
            carry_name(twins[added.merge], added.position, cut.name)
    replaced = all_cuts.replacements(cuts).get(flow, {})
    dead = flow.dead_without(replaced)
    merges = {top.merge for top in tops}
    stands_for: dict[fx.Node, fx.Node] = {}
    memory: dict[fx.Node, frozenset[Place]] = {}
    handed_out: frozenset[Place] = frozenset()
    for node in sorted(replaced, key=flow.index.__getitem__):
        source = replaced[node]
        value = stands_for.get(source, twins.get(source))
        assert value is not None
        memory[node] = memory.get(source, flow.storages(source))
        is_written = node in merges and _needs_own_memory(flow, node, source, memory[node], dead)
        leaves = _leaves_region(flow, node, memory[node])
        if is_written or (
            leaves and (memory[node] & handed_out or _is_seen(flow, memory[node], dead))
        ):
            with graph.inserting_after(twins[node]):
                value = graph.call_method("clone", (value,))
            memory[node] = flow.storages(node)
        if leaves:
            handed_out |= memory[node]
        stands_for[node] = value
        twins[node].replace_all_uses_with(value, propagate_meta=False)
    for node in sorted(dead, key=flow.index.__getitem__, reverse=True):
        if flow.has_stand_in(node):
            known = flow.stand_in(node)
            _put_in_place(twins[node], stands_for.get(known, twins[known]) if known else None)
        graph.erase_node(twins[node])
    _note_gone(graph, dead)
    graph.lint()
    return graph


def _note_gone(graph: fx.Graph, dead: Iterable[fx.Node]) -> None:
    """Keep in the graph the names of the modules and tensors that only `dead` nodes read."""

    def names(nodes: Iterable[fx.Node]) -> set[str]:
        return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}

    [output] = graph.find_nodes(op="output")
    output.meta[GONE_KEY] = tuple(sorted(names(dead) - names(graph.nodes)))


def _put_in_place(node: fx.Node, value: fx.Node | None) -> None:
    """Let all who read `node` read `value`."""

    def change(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for reader in list(node.users):
        reader.args = fx.map_arg(reader.args, change)
        reader.kwargs = fx.map_arg(reader.kwargs, change)


def _needs_own_memory(
    flow: Flow,
    merge: fx.Node,
    shortcut: fx.Node,
    memory: frozenset[Place],
    dead: set[fx.Node],
) -> bool:
    if flow.storages(merge) & flow.storages(shortcut):
        return False
    if flow.region.path and any(memory & flow.storages(node) for node in flow.inputs):
        # Code outside the region may write into what this region returns, or was given.
        return True
    gone = {flow.index[node] for node in dead}
    writers = flow.writers_after(flow.storages(merge) | memory, flow.index[merge])
    return any(writer not in gone for writer in writers)


def _leaves_region(flow: Flow, node: fx.Node, memory: frozenset[Place]) -> bool:
    """Return whether a region returns what was memory of its own, and is not.

    A dropped activation may leave it as well as a merge.
    """
    if flow.storages(node) & memory:
        return False
    [output] = (node for node in flow.region.graph.nodes if node.op == "output")
    return any(flow.storages(node) & flow.storages(one) for one in output.all_input_nodes)


def _is_seen(flow: Flow, memory: frozenset[Place], dead: set[fx.Node]) -> bool:
    """Return whether anyone but who is given what leaves the region may see into `memory`."""
    if flow.region.path:
        return True
    holders = {n for n in flow.nodes if n.op != "output" and flow.storages(n) & memory}
    return any(
        node.op in ("placeholder", "get_attr")
        or any(reader not in dead and reader not in holders for reader in flow.readers[node])
        for node in holders
    )
