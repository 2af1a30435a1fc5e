"""Which constant arguments a forward only hands on to the modules it calls.

A forward branches on constants (`if mask is not None`), so a trace binds them. A layer of a
transformer, though, takes `attention_mask=None` and `use_cache=True` just to pass them to its
attention, which is called, not looked into. Bound there, they would make a ticket that knows one
way of being called. Such an argument is recognised by trying what else it may be: a proxy, which
stops any look at it, the other value of a flag, a tensor instead of None. Where all these traces
agree, but for the places that the argument is handed to, it stays an argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from blockprune.errors import TraceError
from blockprune.tracing.calls import Binding, expect_constant
from blockprune.tracing.modes import compare_arguments, compare_constants, trace_both_modes
from blockprune.tracing.tracer import Leaves

__all__ = ["trace_with_arguments"]


def trace_with_arguments(
    root: nn.Module, bindings: Sequence[Binding], leaves: Leaves, *, conditions: bool
) -> fx.Graph:
    """Return the graph of `root`, right in both modes, with as few constants bound as can be.

    Raises:
        TraceError: see `trace_both_modes`.
    """
    graph = trace_both_modes(root, list(bindings), leaves, conditions=conditions)
    bound = {binding.name for binding in bindings if _may_be_handed_on(binding)}
    for group in _groups(bound):
        graph, bindings = _free(root, bindings, leaves, graph, group, conditions) or (
            graph,
            bindings,
        )
    return graph


def _may_be_handed_on(binding: Binding) -> bool:
    return binding.is_constant and isinstance(binding.value, bool | None)


def _groups(names: set[str]) -> Iterator[set[str]]:
    """Yield all names at once, and then each for itself; what is free already agrees again."""
    if names:
        yield names
    if len(names) > 1:
        for name in sorted(names):
            yield {name}


def _free(
    root: nn.Module,
    bindings: Sequence[Binding],
    leaves: Leaves,
    graph: fx.Graph,
    names: set[str],
    conditions: bool,
) -> tuple[fx.Graph, list[Binding]] | None:
    """Return graph and bindings with `names` as arguments, or None where the forward looks at one.

    Names that are arguments already are left as they are.
    """
    values = {b.name: b.value for b in bindings if b.name in names and b.is_constant}
    if not values:
        return None

    def trial(change: Callable[[Binding], Binding]) -> fx.Graph | None:
        changed = [change(b) if b.name in values else b for b in bindings]
        return _trial(root, changed, leaves, conditions)

    free = trial(lambda b: dataclasses.replace(b, is_constant=False))
    if free is None or not _agree(free, graph, values):
        return None
    others = {name: not value for name, value in values.items() if isinstance(value, bool)}
    other = trial(lambda b: _other_value(b))
    if other is None or not _agree(free, other, others):
        return None
    return free, [
        dataclasses.replace(b, is_constant=False) if b.name in values else b for b in bindings
    ]


def _other_value(binding: Binding) -> Binding:
    if isinstance(binding.value, bool):
        # One that was left out is given now.
        given = binding.given or "keyword"
        return dataclasses.replace(binding, value=not binding.value, given=given)
    return dataclasses.replace(binding, is_constant=False, probe=torch.zeros(()))


def _trial(
    root: nn.Module, bindings: list[Binding], leaves: Leaves, conditions: bool
) -> fx.Graph | None:
    own = Leaves(dict(leaves.paths), dict(leaves.classes), dict(leaves.decided))
    try:
        graph = trace_both_modes(root, bindings, own, conditions=conditions)
    except TraceError:
        return None
    return graph if (own.paths, own.classes) == (leaves.paths, leaves.classes) else None


def _agree(free: fx.Graph, bound: fx.Graph, values: Mapping[str, Any]) -> bool:
    """Whether `bound` is `free` with the arguments `values`, all handed on to modules only."""
    ours = list(free.nodes)
    theirs = [node for node in bound.nodes if not _guards(node, values)]
    if len(ours) != len(theirs):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(ours, theirs, strict=True):
        twin[a] = b
        hands_on = values if a.op == "call_module" else {}

        def judge(x: Any, y: Any, hands_on: Mapping[str, Any] = hands_on) -> str:
            if not isinstance(x, fx.Node):
                return compare_constants(x, y)
            name = str(x.target)
            is_handed = x.op == "placeholder" and name in hands_on and y is hands_on[name]
            return "same" if is_handed or twin.get(x) is y else "differs"

        if (a.op, a.target) != (b.op, b.target):
            return False
        if "differs" in compare_arguments((a.args, a.kwargs), (b.args, b.kwargs), judge):
            return False
    return True


def _guards(node: fx.Node, values: Mapping[str, Any]) -> bool:
    return node.target is expect_constant and node.args[0] in values
