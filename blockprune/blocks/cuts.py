"""Cutting a set of branches: what is replaced by what, and what dies.

`Cuts` holds every removable branch of a model by name, so that the analysis, the costs and the
surgery share one answer to what goes when a set of branches goes. That is more than the sum of what
goes with each: a beginning that several branches share goes with the last of them, and a sum whose
terms all go is cut as one branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import fx

from blockprune.blocks.activations import clamped_range, is_already_applied
from blockprune.blocks.flow import Flow, input_of
from blockprune.blocks.naming import lies_in
from blockprune.blocks.rule import Branch

__all__ = [
    "Cut",
    "Cuts",
    "by_flow",
    "cut_together",
    "replacements_in",
    "still_added",
    "unread_without",
]


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
        stateful: paths of modules whose forward changes state of Python's.
        refused: name of each merge that was refused to where it is.
    """

    def __init__(
        self,
        branches: Mapping[str, Cut],
        layers: Mapping[str, tuple[str, ...]],
        bypasses: Mapping[str, tuple[Cut, ...]],
        flows: Sequence[Flow],
        refused: Mapping[str, tuple[Flow, fx.Node]],
        stateful: Collection[str] = (),
    ) -> None:
        self.flows = tuple(flows)
        self.stateful = frozenset(stateful)
        self.refused = dict(refused)
        self.branches = dict(branches)
        self.layers = dict(layers)
        self.bypasses = dict(bypasses)
        self._by_region: dict[str, list[Cut]] = {}
        for cut in self.branches.values():
            self._by_region.setdefault(cut.flow.region.path, []).append(cut)
        self._by_end = {cut.branch.branch: cut for cut in self.branches.values()}

    def of_blocks(self, names: Iterable[str], granularity: str) -> list[Cut]:
        """Return the cuts that remove these blocks, without those that lie in another of them.

        A name that a branch and a layer share means the one that is a block of `granularity`.
        """
        wanted = dict.fromkeys(
            cut for name in dict.fromkeys(names) for cut in self._parts(name, granularity)
        )
        kept = wanted if len(wanted) == 1 else wanted.keys() - self._needless(wanted)
        return sorted(kept, key=lambda cut: (*cut.flow.region.order, *_place(cut)))

    def _needless(self, cuts: Iterable[Cut]) -> set[Cut]:
        """Return the cuts whose merges are gone with the others."""
        gone = self.modules_gone(cuts)
        found = {cut for cut in cuts if any(lies_in(cut.flow.region.path, path) for path in gone)}
        for flow, group in by_flow(cuts).items():
            tops = cut_together(cut.branch for cut in group)
            dead = unread_without(flow, group)
            found |= {cut for cut in group if tops[cut.branch].merge in dead}
        return found

    def _parts(self, name: str, granularity: str) -> Sequence[Cut]:
        if name in self.bypasses:
            return self.bypasses[name]
        if name in self.layers and (granularity != "branch" or name not in self.branches):
            return [self.branches[part] for part in self.layers[name]]
        return [self.branches[name]]

    def modules_gone(self, cuts: Iterable[Cut]) -> list[str]:
        """Return the names of the modules that nobody calls without these branches."""
        return [
            path
            for flow, group in by_flow(cuts).items()
            for path in flow.modules_gone(_dead_in(flow, group))
        ]

    def inner_nodes(self, cuts: Iterable[Cut]) -> frozenset[fx.Node]:
        """Return what goes in regions of their own, inside modules that only these cuts call."""
        gone = self.modules_gone(cuts)
        return frozenset(
            node
            for flow in self.flows
            if any(lies_in(flow.region.path, path) for path in gone)
            for node in flow.nodes
        )

    def lying_in(self, cuts: Iterable[Cut]) -> list[str]:
        """Return the names of the other branches that go when all of these go.

        These lie inside one of them, or in a beginning that only these share; also in a module that
        is called there, looked into as a region of its own.
        """
        outer = set(cuts)
        dead = frozenset[fx.Node]().union(
            *(unread_without(flow, group) for flow, group in by_flow(outer).items())
        )
        inner = [self._by_end[node] for node in dead if node in self._by_end]
        for path in self.modules_gone(outer):
            for region, within in self._by_region.items():
                if lies_in(region, path):
                    inner += within
        return [cut.name for cut in inner if cut not in outer]

    def replacements(self, cuts: Iterable[Cut]) -> dict[Flow, dict[fx.Node, fx.Node]]:
        """Return, by region, what each merge and each idle activation is replaced by."""
        return {
            flow: replacements_in(flow, (cut.branch for cut in group))
            for flow, group in by_flow(cuts).items()
        }

    def dead_nodes(self, cuts: Iterable[Cut]) -> dict[str, frozenset[fx.Node]]:
        """Return, by region path, the nodes that go with these cuts."""
        return {flow.region.path: _dead_in(flow, group) for flow, group in by_flow(cuts).items()}


def cut_together(branches: Iterable[Branch]) -> dict[Branch, Branch]:
    """Return what is cut for each of `branches`: itself, or the sum whose terms all go."""
    tops = {branch: branch for branch in branches}
    gone = {(branch.merge, branch.branch) for branch in tops}
    is_grown = True
    while is_grown:
        is_grown = False
        for branch, top in tops.items():
            if top.within is not None and (top.merge, top.shortcut) in gone:
                tops[branch] = top.within
                gone.add((top.within.merge, top.within.branch))
                is_grown = True
    return tops


def still_added(branch: Branch, gone: Iterable[Branch]) -> Branch:
    """Return what adds `branch` without `gone`: itself, or the sum that it alone is left of."""
    places = {(one.merge, one.branch) for one in gone}
    while branch.within is not None and (branch.merge, branch.shortcut) in places:
        branch = branch.within
    return branch


def replacements_in(flow: Flow, branches: Iterable[Branch]) -> dict[fx.Node, fx.Node]:
    """Return what cutting `branches`, all of one region, replaces: node to what it becomes."""
    replaced: dict[fx.Node, fx.Node] = {}
    tops = set(cut_together(branches).values())
    for branch in sorted(tops, key=lambda branch: flow.index[branch.merge]):
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


def unread_without(flow: Flow, cuts: Sequence[Cut]) -> frozenset[fx.Node]:
    """Return what nobody needs without `cuts`, all of one region, directly or handed on.

    A merge that is replaced is none of that where its replacement is read.
    """
    replaced, dead = replacements_in(flow, (cut.branch for cut in cuts)), _dead_in(flow, cuts)
    return dead - {node for node in replaced if not flow.is_unread(node, replaced, dead)}


def by_flow(cuts: Iterable[Cut]) -> dict[Flow, list[Cut]]:
    """Return the cuts of each region, in their order."""
    found: dict[Flow, list[Cut]] = {}
    for cut in cuts:
        found.setdefault(cut.flow, []).append(cut)
    return found


def _dead_in(flow: Flow, cuts: Sequence[Cut]) -> frozenset[fx.Node]:
    """Return what dies with cuts of one region."""
    if len(cuts) == 1:
        return cuts[0].dead
    return frozenset(flow.dead_without(replacements_in(flow, (cut.branch for cut in cuts))))


def _place(cut: Cut) -> tuple[int, int]:
    """Return where a branch joins its stream, and where it ends itself."""
    return cut.flow.index[cut.branch.joins], cut.flow.index[cut.branch.branch]
