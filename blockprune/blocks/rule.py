"""The block rule: the one definition of "removable residual block".

A merge is an add of two tensors, m = s + b. It closes a removable block when

1. s is the *shortcut*: the block's input x itself, or a sum that has x as a term (parallel
    branches);
2. b is the *branch*: it depends on x, reads parameters, and
3. none of its values is used anywhere but in m;
4. nothing writes into the memory of s between s and m;
5. s and m have the same shape and dtype.

Then m with b multiplied by zero is s, bit for bit, and replacing m by s is exact. Where a condition
fails, the answer is a `Refusal` with the reason, and that is data, not an error.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from blockprune.blocks.flow import Flow
from blockprune.blocks.types import Reason

__all__ = ["Branch", "Merge", "Refusal", "examine", "merge_of", "parameters_read"]

_ADD_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.iadd,
        torch.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add_.Tensor,
    }
)
_ADD_METHODS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
# By name, those of the first operand before those of the second; torch also takes numpy's names.
_ADD_OPERANDS = ("input", "self", "x", "a", "x1", "other", "x2")
_SCALE_FUNCTIONS = frozenset(
    {
        operator.mul,
        operator.imul,
        operator.truediv,
        operator.itruediv,
        operator.neg,
        torch.mul,
        torch.multiply,
        torch.div,
        torch.divide,
        torch.neg,
    }
)
_SCALE_METHODS = frozenset({"mul", "mul_", "div", "div_", "neg", "neg_", "multiply", "divide"})


@dataclasses.dataclass(frozen=True)
class Merge:
    """An add of two tensors; `alpha` multiplies the second."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    alpha: Any = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A merge that passed: cutting `branch` turns `merge` into `shortcut`.

    Attributes:
        merge: the add.
        shortcut: its operand that stays.
        branch: its operand that goes.
        entry: the activation that the branch starts from.
        nodes: the branch itself, from `entry` (exclusive) to `branch` (inclusive).
        is_exact: False for the bypass of a whole layer, whose output is what `merge` is then: its
            replacement by `shortcut` is no zeroed branch but an approximation.
    """

    merge: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    entry: fx.Node
    nodes: frozenset[fx.Node]
    is_exact: bool = True


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A merge that did not pass."""

    merge: fx.Node
    reason: Reason
    detail: str


def merge_of(node: fx.Node, flow: Flow) -> Merge | None:
    """Return `node` as a merge, or None where it is not an add of two tensors."""
    is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not is_add or node.kwargs.get("out") is not None:
        return None
    named = [node.kwargs[key] for key in _ADD_OPERANDS if key in node.kwargs]
    a, b = (*node.args, *named, None, None)[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if flow.fact(a) is None or flow.fact(b) is None or flow.fact(node) is None:
        return None
    return Merge(node, (a, b), node.kwargs.get("alpha", 1))


def examine(merge: Merge, flow: Flow) -> Branch | Refusal:
    """Return the branch that `merge` closes, or why it closes none."""
    first, second = merge.operands
    orders = [(first, second)]
    if merge.alpha == 1:
        orders.append((second, first))
    for shortcut, branch in orders:
        entry, nodes = _entry(flow.current(shortcut, merge.node), branch, flow)
        if entry is not None:
            return _judge(merge, shortcut, branch, entry, nodes, flow)
    return _explain(merge, flow)


def parameters_read(node: fx.Node, flow: Flow) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what `node` brings in: its module's, or the one it fetches."""
    if node.op == "call_module":
        module = flow.region.module.get_submodule(str(node.target))
        yield from module.named_parameters(prefix=str(node.target))
    elif node.op == "get_attr":
        value = _attribute(flow.region.module, str(node.target))
        if isinstance(value, nn.Parameter):
            yield str(node.target), value


def _reads_parameters(nodes: set[fx.Node], flow: Flow) -> bool:
    return any(True for node in flow.with_state(nodes) for _ in parameters_read(node, flow))


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _entry(shortcut: fx.Node, branch: fx.Node, flow: Flow) -> tuple[fx.Node | None, set[fx.Node]]:
    """Return the activation that is a term of `shortcut` and that `branch` starts from.

    Terms are tried from the latest on, so that the branch is as short as it can be.
    """
    pending = [(-flow.index[shortcut], shortcut)]
    seen = {shortcut}
    while pending:
        _, term = heapq.heappop(pending)
        if term.op != "get_attr":
            nodes = flow.between(term, branch)
            if nodes:
                return term, nodes
            if term is branch:
                return term, set()
        passed_on = flow.passes_on(term)
        merge = merge_of(term, flow)
        further = (passed_on,) if passed_on else merge.operands if merge else ()
        for operand in further:
            if operand not in seen:
                seen.add(operand)
                heapq.heappush(pending, (-flow.index[operand], operand))
    return None, set()


def _judge(
    merge: Merge,
    shortcut: fx.Node,
    branch: fx.Node,
    entry: fx.Node,
    nodes: set[fx.Node],
    flow: Flow,
) -> Branch | Refusal:
    node = merge.node
    before, after = flow.fact(shortcut), flow.fact(node)
    assert before is not None
    assert after is not None
    if before.shape != after.shape:
        return Refusal(
            node,
            Reason.SHAPE_CHANGE,
            f"the shortcut has shape {before.shape}, the merge {after.shape}",
        )
    if before.dtype != after.dtype:
        return Refusal(
            node, Reason.SHAPE_CHANGE, f"the shortcut is {before.dtype}, the merge {after.dtype}"
        )
    position = flow.index[node]
    since = flow.index[flow.current(shortcut, node)]
    writer = next(flow.writers_after(flow.storages(shortcut), since, position), None)
    if writer is not None:
        return Refusal(
            node,
            Reason.MUTATES_SHORTCUT,
            f"{flow.nodes[writer].name} writes into the shortcut before it is added",
        )
    if not _reads_parameters(nodes, flow):
        return Refusal(node, Reason.NO_PARAMETERS, "the branch reads no parameter")
    dead = flow.dead_without({node: shortcut})
    for inner in sorted(nodes, key=flow.index.__getitem__):
        if inner not in dead:
            reader = next(r for r in flow.readers[inner] if r not in dead)
            return Refusal(
                node,
                Reason.BRANCH_ESCAPES,
                f"{inner.name} of the branch is also read by {reader.name}",
            )
    return Branch(node, shortcut, branch, entry, frozenset(nodes))


def _explain(merge: Merge, flow: Flow) -> Refusal:
    """Say why neither operand of `merge` is a shortcut around the other."""
    node = merge.node
    a, b = merge.operands
    ancestor = flow.common_ancestor(a, b)
    if ancestor is None:
        return Refusal(
            node, Reason.INDEPENDENT_OPERANDS, f"{a.name} and {b.name} share no activation"
        )
    paths = [(flow.between(ancestor, operand), operand) for operand in (a, b)]
    # The shortcut is the shorter way; of two equally long ones, the one that says most.
    path, operand = min(
        paths, key=lambda pair: (len(pair[0]), _rank(ancestor, pair[0], pair[1], flow))
    )
    if merge.alpha != 1 and operand is b and not path:
        return Refusal(node, Reason.SCALED_SHORTCUT, f"the shortcut is multiplied by {merge.alpha}")
    if path and all(_scales(step) for step in path):
        return Refusal(
            node, Reason.SCALED_SHORTCUT, f"the shortcut is scaled by {_names(path, flow)}"
        )
    if _reads_parameters(path, flow):
        return Refusal(
            node,
            Reason.PROJECTION_SHORTCUT,
            f"the shortcut goes through {_names(path, flow)}, which has parameters",
        )
    before, after = flow.fact(ancestor), flow.fact(operand)
    if before is not None and after is not None and before.shape != after.shape:
        return Refusal(
            node,
            Reason.SHAPE_CHANGE,
            f"the shortcut goes from {before.shape} to {after.shape} ({_names(path, flow)})",
        )
    return Refusal(
        node,
        Reason.INDEPENDENT_OPERANDS,
        f"neither operand is the other's input: the shorter one goes through {_names(path, flow)}",
    )


def _rank(ancestor: fx.Node, path: set[fx.Node], operand: fx.Node, flow: Flow) -> int:
    if path and all(_scales(step) for step in path):
        return 0
    if _reads_parameters(path, flow):
        return 1
    before, after = flow.fact(ancestor), flow.fact(operand)
    return 0 if before and after and before.shape != after.shape else 2


def _scales(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _SCALE_FUNCTIONS) or (
        node.op == "call_method" and node.target in _SCALE_METHODS
    )


def _names(path: set[fx.Node], flow: Flow, limit: int = 4) -> str:
    steps = sorted(path, key=flow.index.__getitem__)
    shown = ", ".join(step.name for step in steps[:limit])
    return shown if len(steps) <= limit else f"{shown}, ..."
