"""Names: whose forward does an add, and what its branch is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from blockprune.blocks.flow import Flow
from blockprune.blocks.rule import parameters_read

__all__ = ["NAME_KEY", "Call", "branch_names", "lies_in", "numbered", "owner_call", "owner_of"]

NAME_KEY = "blockprune_name"
"""Key of a node's metadata under which a ticket keeps the dense model's name of a merge."""

Call = str
"""One call of a module in a region: its path, `@k` for a repeated call; "" for the region."""


def owner_call(node: fx.Node) -> Call:
    """Return the innermost module call that `node` was recorded in."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


def owner_of(node: fx.Node, flow: Flow) -> str:
    """Return the qualified name of the module whose forward computes `node`."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()), ("",))[0])
    return flow.region.qualified(path)


def branch_names(branches: Sequence[tuple[Flow, fx.Node, Iterable[fx.Node]]]) -> list[str]:
    """Return a unique name for each (region, merge, nodes of the branch).

    The owner's name where the owner has one branch, else `owner.child` with the child that holds
    most of the branch's parameters, and `#k` where that is not unique. A name that a ticket carries
    over from its dense model is kept.
    """
    owners = [owner_of(merge, flow) for flow, merge, _ in branches]
    count = Counter(owners)
    names = []
    for (flow, merge, nodes), owner in zip(branches, owners, strict=True):
        carried = merge.meta.get(NAME_KEY)
        if carried:
            names.append(str(carried))
        elif owner and count[owner] == 1:
            names.append(owner)
        else:
            names.append(_child(flow, merge, nodes))
    return numbered(names)


def lies_in(name: str, path: str) -> bool:
    """Whether something called `name` is the module at `path`, or lies in it; "" is the root."""
    return path == "" or name == path or name.startswith(path + ".")


def numbered(names: Sequence[str]) -> list[str]:
    """Return the names with `#0`, `#1`, ... on those that occur more than once."""
    count, seen = Counter(names), Counter[str]()
    unique = []
    for name in names:
        unique.append(name if count[name] == 1 else f"{name}#{seen[name]}")
        seen[name] += 1
    return unique


def _child(flow: Flow, merge: fx.Node, nodes: Iterable[fx.Node]) -> str:
    """Return the module called by the owner, or its parameter, that holds most of the branch.

    There is one: a branch reads parameters.
    """
    owner = owner_call(merge)
    weight: Counter[str] = Counter()
    for node in sorted(flow.with_state(nodes), key=flow.index.__getitem__):
        for name, parameter in parameters_read(node, flow):
            stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
            calls = list(stack)
            if owner == "" or owner in calls:
                below = calls[calls.index(owner) + 1 :] if owner else calls
                child = str(stack[below[0]][0]) if below else name
            else:
                child = name
            weight[child] += parameter.numel()
    return flow.region.qualified(weight.most_common(1)[0][0])
