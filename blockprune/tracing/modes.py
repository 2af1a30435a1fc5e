"""One graph that is right in both modes, from a trace in eval mode and one in train mode.

A trace freezes `self.training`. Two traces of one module are therefore compared step by step:

* an argument that is False in eval and True in train (`F.dropout(x, p, self.training)`) becomes a
  reading of the module's own `training` flag, which `.train()` and `.eval()` go on setting;
* any other difference (`if self.training: ...`) lies in the forward of the innermost module open at
  that step. Its class becomes a leaf, and both traces are taken again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from blockprune.errors import TraceError
from blockprune.tracing.calls import Binding
from blockprune.tracing.tracer import Event, Leaves, Trace, trace_once

__all__ = ["compare_arguments", "compare_constants", "trace_both_modes"]

_REASON = "its forward does something else in train mode than in eval mode"


def trace_both_modes(
    root: nn.Module, bindings: list[Binding], leaves: Leaves, *, conditions: bool = False
) -> fx.Graph:
    """Return a graph of `root` whose behaviour follows `.train()` and `.eval()`.

    Modules that had to become leaves are added to `leaves`. `conditions`: whether conditions on
    the types of tensors in the forward of `root` itself may be decided.

    Raises:
        TraceError: the forward of `root` itself cannot be traced, or depends on the mode.
    """
    while True:
        known = len(leaves.paths)
        in_eval = trace_once(root, bindings, leaves, train=False, conditions=conditions)
        in_train = trace_once(root, bindings, leaves, train=True, conditions=conditions)
        if len(leaves.paths) > known:
            continue
        culprit = _merge(in_eval, in_train)
        if culprit is None:
            return in_eval.graph
        if culprit == "":
            raise TraceError(_REASON)
        leaves.classes[type(root.get_submodule(culprit))] = _REASON


def _merge(in_eval: Trace, in_train: Trace) -> str | None:
    """Bind mode-dependent flags in the eval graph; return the module that differs otherwise."""
    twin: dict[fx.Node, fx.Node] = {}
    flags: list[tuple[fx.Node, str]] = []
    open_modules = [""]
    # Both end with the output: where one has ended the other has too, or has differed before.
    for ours, theirs in zip(in_eval.events, in_train.events, strict=True):
        if (ours.kind, ours.path) != (theirs.kind, theirs.path):
            return open_modules[-1]
        if ours.kind == "enter":
            open_modules.append(ours.path)
        elif ours.kind == "exit":
            open_modules.pop()
        else:
            verdict = _compare(ours, theirs, twin)
            if verdict == "differs":
                return open_modules[-1]
            if verdict == "flag" and ours.node is not None:
                flags.append((ours.node, open_modules[-1]))
    for node, path in flags:
        _bind_flag(node, twin[node], path)
    return None


def _compare(ours: Event, theirs: Event, twin: dict[fx.Node, fx.Node]) -> str:
    """Return "same", "flag" (equal but for training flags) or "differs" for two nodes."""
    a, b = ours.node, theirs.node
    assert a is not None
    assert b is not None
    twin[a] = b
    if a.op != b.op or a.target != b.target:
        return "differs"

    def judge(x: Any, y: Any) -> str:
        if isinstance(x, fx.Node):
            return "same" if twin.get(x) is y else "differs"
        return "flag" if _is_flag(x, y) else compare_constants(x, y)

    verdicts = compare_arguments((a.args, a.kwargs), (b.args, b.kwargs), judge)
    if "differs" in verdicts:
        return "differs"
    return "flag" if "flag" in verdicts else "same"


def compare_arguments(a: Any, b: Any, judge: Callable[[Any, Any], str]) -> set[str]:
    """Return what `judge` says of each node and constant in two nested arguments.

    "differs" is among it where the two are not of one structure.
    """
    if isinstance(a, fx.Node):
        return {judge(a, b)}
    if type(a) is not type(b):
        return {"differs"}
    if isinstance(a, tuple | list):
        if len(a) != len(b):
            return {"differs"}
        return set().union(*(compare_arguments(x, y, judge) for x, y in zip(a, b, strict=True)))
    if isinstance(a, dict):
        if list(a) != list(b):
            return {"differs"}
        return set().union(*(compare_arguments(a[key], b[key], judge) for key in a))
    if isinstance(a, slice):
        ours, theirs = (a.start, a.stop, a.step), (b.start, b.stop, b.step)
        return compare_arguments(ours, theirs, judge)
    return {judge(a, b)}


def compare_constants(a: Any, b: Any) -> str:
    """Return "same" or "differs"; NaN is the one constant that differs from itself."""
    return "same" if a == b or (a != a and b != b) else "differs"


def _is_flag(in_eval: Any, in_train: Any) -> bool:
    return in_eval is False and in_train is True


def _bind_flag(node: fx.Node, in_train: fx.Node, path: str) -> None:
    """Replace the arguments of `node` that follow the mode by the module's `training` flag."""
    with node.graph.inserting_before(node):
        flag = node.graph.create_node("get_attr", f"{path}.training".lstrip("."))
        flag.meta = dict(node.meta)

    def bind(a: Any, b: Any) -> Any:
        if isinstance(a, tuple):
            return tuple(bind(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, list):
            return [bind(x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(a, dict):
            return {key: bind(a[key], b[key]) for key in a}
        return flag if _is_flag(a, b) else a

    node.args = bind(node.args, in_train.args)
    node.kwargs = bind(node.kwargs, in_train.kwargs)
