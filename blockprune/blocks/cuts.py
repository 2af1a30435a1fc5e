"""Cutting a set of branches: what is replaced by what, and what dies.

`Cuts` holds every removable branch of a model by name, so that the analysis, the costs and the
surgery share one answer to what goes when a set of branches goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from blockprune.blocks.activations import clamped_range, is_already_applied
from blockprune.blocks.flow import Flow, input_of
from blockprune.blocks.naming import lies_in
from blockprune.blocks.rule import Branch

__all__ = ["Cut", "Cuts"]


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """One removable branch, where it is and what it is called."""

    name: str
    flow: Flow
    branch: Branch
    dead: frozenset[fx.Node]


class Cuts:
    """The removable branches of a model.

    Attributes:
        branches: name to cut, in order of execution.
        layers: name of a layer block to the names of its branches.
        bypasses: name of a layer that only goes as an approximation to the ways around it.
        flows: of all regions, also of such as hold no branch.

    """

    def __init__(
        self,
        branches: Mapping[str, Cut],
        layers: Mapping[str, tuple[str, ...]],
        bypasses: Mapping[str, tuple[Cut, ...]],
        flows: Sequence[Flow],
    ) -> None:
        self.flows = tuple(flows)
        self.branches = dict(branches)
        self.layers = dict(layers)
        self.bypasses = dict(bypasses)
        self._by_region: dict[str, list[Cut]] = {}
        for cut in self.branches.values():
            self._by_region.setdefault(cut.flow.region.path, []).append(cut)
        self._by_merge = {cut.branch.merge: cut for cut in self.branches.values()}

    def of_blocks(self, names: Iterable[str], granularity: str) -> list[Cut]:
        """Return the cuts that remove these blocks, without those that lie in another of them.

        A name that a branch and a layer share means the one that is a block of `granularity`.
        """
        wanted = [cut for name in dict.fromkeys(names) for cut in self._parts(name, granularity)]
        gone = {name for cut in wanted for name in self.nested_in(cut)}
        kept = [cut for cut in dict.fromkeys(wanted) if cut.name not in gone]
        return sorted(
            kept, key=lambda cut: (cut.flow.region.order, cut.flow.index[cut.branch.merge])
        )

    def _parts(self, name: str, granularity: str) -> Sequence[Cut]:
        if name in self.bypasses:
            return self.bypasses[name]
        if name in self.layers and (granularity != "branch" or name not in self.branches):
            return [self.branches[part] for part in self.layers[name]]
        return [self.branches[name]]

    def inner_nodes(self, cuts: Iterable[Cut]) -> frozenset[fx.Node]:
        """Return what goes in regions of their own, inside modules that only these cuts call."""
        gone = [path for cut in cuts for path in cut.flow.modules_gone(cut.dead)]
        return frozenset(
            node
            for flow in self.flows
            if any(lies_in(flow.region.path, path) for path in gone)
            for node in flow.nodes
        )

    def nested_in(self, outer: Cut) -> list[str]:
        """Return the names of the branches that lie inside `outer`, and go when it goes.

        Also those in a module that `outer` calls, looked into as a region of its own.
        """
        by_merge = self._by_merge
        inner = [by_merge[node] for node in outer.dead if node in by_merge]
        for path in outer.flow.modules_gone(outer.dead):
            for region, cuts in self._by_region.items():
                if lies_in(region, path):
                    inner += cuts
        return [cut.name for cut in inner if cut is not outer]

    def replacements(self, cuts: Iterable[Cut]) -> dict[Flow, dict[fx.Node, fx.Node]]:
        """Return, by region, what each merge and each idle activation is replaced by."""
        by_flow: dict[Flow, list[Branch]] = {}
        for cut in cuts:
            by_flow.setdefault(cut.flow, []).append(cut.branch)
        return {flow: replacements_in(flow, branches) for flow, branches in by_flow.items()}

    def dead_nodes(self, cuts: Iterable[Cut]) -> dict[str, frozenset[fx.Node]]:
        """Return, by region path, the nodes that go with these cuts."""
        return {
            flow.region.path: frozenset(flow.dead_without(replaced))
            for flow, replaced in self.replacements(cuts).items()
        }


def replacements_in(flow: Flow, branches: Iterable[Branch]) -> dict[fx.Node, fx.Node]:
    """Return what cutting `branches`, all of one region, replaces: node to what it becomes."""
    replaced: dict[fx.Node, fx.Node] = {}
    for branch in sorted(branches, key=lambda branch: flow.index[branch.merge]):
        replaced[branch.merge] = branch.shortcut
        pending = [branch.merge]
        while pending:
            value = pending.pop()
            for reader in value.users:
                if flow.passes_on(reader) is value:
                    pending.append(reader)
                elif (
                    clamped_range(reader, flow) is not None
                    and input_of(reader) is value
                    and is_already_applied(reader, flow, replaced)
                ):
                    replaced[reader] = value
    return replaced
