"""The block rule: the one definition of "removable residual block".

A merge is an add of two tensors, m = s + b. With b multiplied by zero, m is s, whoever else reads
what b was computed from: so replacing m by s is exact. What goes is the *part* of b that only m
needs. The merge closes a removable block when

1. s is the *shortcut*: an activation x, or a sum that has x as a term;
2. b is the *branch*: it depends on x and reads parameters;
3. its part, what nobody needs but m, reads parameters too;
4. nothing writes into the memory of s between s and m;
5. s and m have the same shape and dtype.

The order of the adds decides nothing. In (x + a) + b the outer merge has the shortcut x + a, which
has x as a term. In x + (a + b) the branch is a sum, and is taken apart where one forward does both
adds, a and b each meet condition 2, and neither is a shortcut around the other. Then a is the
branch of the merge a + b, which without it is b, and likewise b; without both, x + (a + b) is x. A
dropout may stand around the sum, since it turns zeros into zeros.

Where a condition fails, the answer is a `Refusal` with the reason, and that is data, not an error.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from blockprune.blocks.flow import Flow, input_of, owner_call
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
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_FUNCTIONS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout}
)


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
        position: of `branch` among the operands.
        entry: the activation that the branch starts from.
        nodes: the branch itself, from `entry` (exclusive) to `branch` (inclusive).
        part: those of `nodes` that nobody needs but `merge`, so that they go.
        within: the branch that is `merge` as a whole, if `merge` is a sum that was taken apart; it
            is cut when both operands of `merge` are.
        is_exact: False for the bypass of a whole layer, whose output is what `merge` is then: its
            replacement by `shortcut` is no zeroed branch but an approximation.
    """

    merge: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    position: int
    entry: fx.Node
    nodes: frozenset[fx.Node]
    part: frozenset[fx.Node] = frozenset()
    within: Branch | None = None
    is_exact: bool = True

    @property
    def joins(self) -> fx.Node:
        """The merge at which the branch joins the stream: `merge`, or one behind it."""
        return self.merge if self.within is None else self.within.joins

    @property
    def stream(self) -> fx.Node:
        """What the branch is added to there."""
        return self.shortcut if self.within is None else self.within.stream


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A branch that stays, or a merge that has none."""

    merge: fx.Node
    reason: Reason
    detail: str
    branch: Branch | None = None


def merge_of(node: fx.Node, flow: Flow) -> Merge | None:
    """Return `node` as a merge, or None where it adds no two tensors, or whole numbers."""
    is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not is_add or node.kwargs.get("out") is not None:
        return None
    named = [node.kwargs[key] for key in _ADD_OPERANDS if key in node.kwargs]
    a, b = (*node.args, *named, None, None)[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    found = flow.fact(node)
    if flow.fact(a) is None or flow.fact(b) is None or found is None:
        return None
    if not (found.dtype.is_floating_point or found.dtype.is_complex):
        return None
    return Merge(node, (a, b), node.kwargs.get("alpha", 1))


def examine(flow: Flow) -> list[Branch | Refusal]:
    """Put every merge of a region to the rule, and return what it says of each branch."""
    verdicts: list[Branch | Refusal] = []
    taken_apart: set[fx.Node] = set()
    for node in reversed(flow.nodes):
        merge = merge_of(node, flow)
        if merge is None or node in taken_apart:
            continue
        for verdict in _examine(merge, flow):
            verdicts.append(verdict)
            taken_apart.update(_sums_around(verdict))
    return verdicts


def _sums_around(verdict: Branch | Refusal) -> Iterator[fx.Node]:
    branch: Branch | None = verdict if isinstance(verdict, Branch) else verdict.branch
    while branch is not None:
        yield branch.merge
        branch = branch.within


def _examine(merge: Merge, flow: Flow) -> list[Branch | Refusal]:
    branch = _branch_of(merge, flow)
    if branch is None:
        return [_explain(merge, flow)]
    refusal = _unfit(branch, flow)
    if refusal is not None:
        return [refusal]
    return [_judge(term, flow) for term in _terms(branch, flow)]


def _branch_of(merge: Merge, flow: Flow) -> Branch | None:
    """Return the branch that `merge` adds to a shortcut around it, whether or not it can go."""
    orders = [(0, 1)] if merge.alpha != 1 else [(0, 1), (1, 0)]
    for stays, goes in orders:
        shortcut, branch = merge.operands[stays], merge.operands[goes]
        entry, nodes = _entry(flow.current(shortcut, merge.node), branch, flow)
        if entry is not None:
            return Branch(merge.node, shortcut, branch, goes, entry, frozenset(nodes))
    return None


def parameters_read(node: fx.Node, flow: Flow) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what `node` brings in: its module's, or the one it fetches."""
    if node.op == "call_module":
        module = flow.region.module.get_submodule(str(node.target))
        yield from module.named_parameters(prefix=str(node.target))
    elif node.op == "get_attr":
        value = _attribute(flow.region.module, str(node.target))
        if isinstance(value, nn.Parameter):
            yield str(node.target), value


def _reads_parameters(nodes: Iterable[fx.Node], flow: Flow) -> bool:
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


def _terms(branch: Branch, flow: Flow) -> list[Branch]:
    """Return the branches that `branch` is the sum of, or itself where it is no such sum."""
    node, reader = branch.branch, branch.merge
    while flow.readers[node] == [reader]:
        merge = merge_of(node, flow)
        if merge is not None:
            parts = _parts(merge, branch, flow)
            return [term for part in parts for term in _terms(part, flow)] or [branch]
        source = flow.passes_on(node) or _thinned(node, flow)
        if source is None:
            break
        node, reader = source, node
    return [branch]


def _parts(merge: Merge, branch: Branch, flow: Flow) -> list[Branch]:
    """Return both operands of `merge`, the sum that `branch` is, if each is a branch of its own."""
    if merge.alpha != 1 or owner_call(merge.node) != owner_call(branch.merge):
        return []
    if _branch_of(merge, flow) is not None:
        return []
    stream = flow.current(branch.stream, branch.joins)
    parts = []
    for position, operand in enumerate(merge.operands):
        entry, nodes = _entry(stream, operand, flow)
        is_branch = entry is not None and _reads_parameters(nodes, flow)
        if entry is None or not is_branch or not flow.same_kind(operand, merge.node):
            return []
        other = merge.operands[1 - position]
        found = frozenset(nodes)
        parts.append(Branch(merge.node, other, operand, position, entry, found, within=branch))
    return parts


def _thinned(node: fx.Node, flow: Flow) -> fx.Node | None:
    """Return the input of a dropout, or None where `node` is none."""
    is_dropout = isinstance(flow.module(node), _DROPOUT_MODULES) or (
        node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS
    )
    return input_of(node) if is_dropout else None


def _unfit(branch: Branch, flow: Flow) -> Refusal | None:
    """Return why the shortcut cannot stand for the merge, if so."""
    merge, shortcut = branch.merge, branch.shortcut
    before, after = flow.fact(shortcut), flow.fact(merge)
    assert before is not None
    assert after is not None
    unlike = flow.unlike_shapes(shortcut, merge)
    if unlike is not None:
        found = "the shortcut has shape {}, the merge {}".format(*unlike)
        return Refusal(merge, Reason.SHAPE_CHANGE, found, branch)
    if before.dtype != after.dtype:
        found = f"the shortcut is {before.dtype}, the merge {after.dtype}"
        return Refusal(merge, Reason.SHAPE_CHANGE, found, branch)
    position = flow.index[merge]
    since = flow.index[flow.current(shortcut, merge)]
    writer = next(flow.writers_after(flow.storages(shortcut), since, position), None)
    if writer is not None:
        found = f"{flow.nodes[writer].name} writes into the shortcut before it is added"
        return Refusal(merge, Reason.MUTATES_SHORTCUT, found, branch)
    return None


def _judge(branch: Branch, flow: Flow) -> Branch | Refusal:
    """Return `branch` with the part of it that goes, or why it stays."""
    merge = branch.merge
    refusal = _unfit(branch, flow)
    if refusal is not None:
        return refusal
    if not _reads_parameters(branch.nodes, flow):
        is_scaled = bool(branch.nodes) and all(_scales(node) for node in branch.nodes)
        if is_scaled and _reads_parameters(flow.between(branch.entry, branch.shortcut), flow):
            # The operand that was looked at as the shortcut is the branch.
            found = f"the shortcut is scaled by {_names(branch.nodes, flow)}"
            return Refusal(merge, Reason.SCALED_SHORTCUT, found, branch)
        return Refusal(merge, Reason.NO_PARAMETERS, "the branch reads no parameter", branch)
    dead = flow.dead_without({merge: branch.shortcut})
    part = branch.nodes & dead
    if _reads_parameters(part, flow):
        return dataclasses.replace(branch, part=part)
    inner = max(branch.nodes - dead, key=flow.index.__getitem__)
    reader = next(reader for reader in flow.readers[inner] if reader not in dead)
    found = f"{inner.name} of the branch is also read by {reader.name}"
    return Refusal(merge, Reason.BRANCH_ESCAPES, found, branch)


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
    unlike = flow.unlike_shapes(ancestor, operand)
    if before is not None and after is not None and unlike is not None:
        found = "the shortcut goes from {} to {}".format(*unlike)
        return Refusal(node, Reason.SHAPE_CHANGE, f"{found} ({_names(path, flow)})")
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
    are_tensors = flow.fact(ancestor) is not None and flow.fact(operand) is not None
    return 0 if are_tensors and not flow.same_shape(ancestor, operand) else 2


def _scales(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _SCALE_FUNCTIONS) or (
        node.op == "call_method" and node.target in _SCALE_METHODS
    )


def _names(path: Iterable[fx.Node], flow: Flow, limit: int = 4) -> str:
    steps = sorted(path, key=flow.index.__getitem__)
    shown = ", ".join(step.name for step in steps[:limit])
    return shown if len(steps) <= limit else f"{shown}, ..."
