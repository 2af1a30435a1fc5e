"""Names: whose forward does an add, and what its branch is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from blockprune.blocks.flow import Flow, owner_call
from blockprune.blocks.rule import Branch, Refusal, parameters_read
from blockprune.blocks.types import Reason

__all__ = [
    "NAMES_KEY",
    "branch_names",
    "carried_names",
    "carry_name",
    "lies_in",
    "numbered",
    "owner_of",
]

NAMES_KEY = "blockprune_names"
"""Key of a merge's metadata under which a ticket keeps the dense model's names of its operands."""

_BRANCHES_THAT_STAY = (Reason.BRANCH_ESCAPES, Reason.MUTATES_SHORTCUT)


def carried_names(merge: fx.Node) -> dict[int, str]:
    """Return the dense model's names of the branches that `merge` adds, by operand."""
    return dict(merge.meta.get(NAMES_KEY, {}))


def carry_name(merge: fx.Node, position: int, name: str) -> None:
    """Note what the dense model calls the branch that is one operand of `merge`."""
    merge.meta[NAMES_KEY] = {**carried_names(merge), position: name}


def owner_of(node: fx.Node, flow: Flow) -> str:
    """Return the qualified name of the module whose forward computes `node`."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()), ("",))[0])
    return flow.region.qualified(path)


def branch_names(
    branches: Sequence[tuple[Flow, Branch]], refusals: Iterable[tuple[Flow, Refusal]]
) -> list[str]:
    """Return a unique name for each branch.

    The owner's name if the owner merges no other branch and this one goes as a whole; else
    `owner.child` with the child that holds most of what goes, and `#k` where that is not unique. A
    name that a ticket carries over from its dense model is kept.
    """
    owners = [owner_of(branch.merge, flow) for flow, branch in branches]
    count = Counter(owners)
    count.update(
        owner_of(refusal.merge, flow)
        for flow, refusal in refusals
        if refusal.reason in _BRANCHES_THAT_STAY
    )
    names = []
    for (flow, branch), owner in zip(branches, owners, strict=True):
        carried = carried_names(branch.merge).get(branch.position)
        if carried:
            names.append(carried)
        elif owner and count[owner] == 1 and branch.part == branch.nodes:
            names.append(owner)
        else:
            names.append(_child(flow, branch))
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


def _child(flow: Flow, branch: Branch) -> str:
    """Return the module called by the owner, or its parameter, that holds most of what goes.

    There is one: what goes reads parameters.
    """
    owner = owner_call(branch.merge)
    weight: Counter[str] = Counter()
    for node in sorted(flow.with_state(branch.part), key=flow.index.__getitem__):
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
