"""How values flow through one region: who reads whom, through memory as well as through edges.

A graph's edges do not show that an in-place operation changes what a later reader of the same
memory sees. `Flow` adds these orderings: a node also *reads* the last node before it that wrote
into the memory of one of its arguments. Dependence, liveness and escape are then plain
reachability.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from blockprune.tracing import GUARDS, Place, Region, TensorFact, holds_tensor

__all__ = ["Call", "Flow", "input_of", "owner_call"]

Call = str
"""One call of a module in a region: its path, `@k` for a repeated call; "" for the region."""

_IDENTITY_METHODS = frozenset({"clone", "contiguous"})
_RESHAPES = frozenset({"flatten", "reshape", "unflatten", "view", torch.flatten, torch.reshape})
_CAST_METHODS = frozenset({"to", "float", "double", "half", "bfloat16", "type_as"})


class Flow:
    """The dataflow of one region, with the queries that the block rule asks.

    Attributes:
        region: the region.
        nodes: of its graph, in execution order.
        inputs: its placeholders.
        index: position of each node in execution order.
        sources: what each node reads, orderings through memory included.
        readers: the reverse of `sources`.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.nodes: list[fx.Node] = list(region.graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.index: dict[fx.Node, int] = {}
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        self._writers: dict[Place, list[int]] = {}
        self._carries: dict[fx.Node, bool] = {}
        self._activations: set[fx.Node] = set()
        facts = region.facts
        last_writer: dict[Place, fx.Node] = {}
        for position, node in enumerate(self.nodes):
            self.index[node] = position
            self._carries[node] = holds_tensor(facts.values[node], TensorFact)
            self.readers[node] = []
            sources = dict.fromkeys(node.all_input_nodes)
            for source in node.all_input_nodes:
                for storage in facts.storages[source]:
                    if storage in last_writer:
                        sources[last_writer[storage]] = None
            self.sources[node] = list(sources)
            if node.op == "placeholder" or any(
                source in self._activations and self._carries[source] for source in sources
            ):
                self._activations.add(node)
            for source in sources:
                self.readers[source].append(node)
            for storage in facts.written[node]:
                last_writer[storage] = node
                self._writers.setdefault(storage, []).append(position)
        for item, value in facts.stand_ins.items():
            # Who reads the item may come to read what stands for it.
            if value is not None:
                for reader in self.readers[item]:
                    self.readers[value].append(reader)
                    self.sources[reader].append(value)
        self._called = [node for node in self.nodes if node.op == "call_module"]
        self._checks = self._find_checks()

    # --- values ---------------------------------------------------------------------------------

    def fact(self, node: fx.Node) -> TensorFact | None:
        """Return the description of the single tensor that `node` computes, else None."""
        value = self.region.values[node]
        return value if isinstance(value, TensorFact) else None

    def same_shape(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether both compute one tensor each, of the same shape at every batch size seen."""
        return self.unlike_shapes(a, b) is None

    def unlike_shapes(self, a: fx.Node, b: fx.Node) -> tuple[Any, Any] | None:
        """Return the shapes of two values where they were first seen to differ, or None."""
        elsewhere = self.region.facts.elsewhere
        seen = [
            (self.fact(a), self.fact(b)),
            *zip(elsewhere.get(a, ()), elsewhere.get(b, ()), strict=False),
        ]
        for first, second in seen:
            shapes = getattr(first, "shape", None), getattr(second, "shape", None)
            if shapes[0] is None or shapes[0] != shapes[1]:
                return shapes
        return None

    def same_kind(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether both compute one tensor each, of the same shape, dtype and device."""
        first, second = self.fact(a), self.fact(b)
        return (
            self.same_shape(a, b)
            and first is not None
            and second is not None
            and (first.dtype, first.device) == (second.dtype, second.device)
        )

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a call_module node calls, else None."""
        if node.op != "call_module":
            return None
        return self.region.module.get_submodule(str(node.target))

    def passes_on(self, node: fx.Node) -> fx.Node | None:
        """Return the argument that `node` hands on unchanged (Identity, clone), else None."""
        source = input_of(node)
        if source is not None and (
            (node.op == "call_module" and type(self.module(node)) is nn.Identity)
            or (node.op == "call_method" and node.target in _IDENTITY_METHODS)
            or (node.op == "call_function" and node.target is torch.clone)
            or (
                node.op == "call_method"
                and node.target in _CAST_METHODS
                and self.same_kind(node, source)
            )
        ):
            return source
        return None

    def origin(self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """Return the node whose values `node` hands on.

        That is through identities, replacements, and reshapes that end in the shape they had.
        """
        while True:
            following = self._step_back(node, replaced) or self._before_reshapes(node, replaced)
            if following is None:
                return node
            node = following

    def _step_back(
        self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None
    ) -> fx.Node | None:
        return (replaced or {}).get(node) or self.passes_on(node)

    def _before_reshapes(
        self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None
    ) -> fx.Node | None:
        """Return the node that a chain of reshapes ending in `node` has brought back to shape."""
        source: fx.Node | None = input_of(node) if _is_reshape(node) else None
        while source is not None and not self.same_kind(source, node):
            following = self._step_back(source, replaced)
            source = following or (input_of(source) if _is_reshape(source) else None)
        return source

    # --- memory ---------------------------------------------------------------------------------

    def storages(self, node: fx.Node) -> frozenset[Place]:
        """Return the memory that the value of `node` lies in."""
        return self.region.facts.storages[node]

    def writers_after(
        self, storages: Iterable[Place], after: int, before: int | None = None
    ) -> Iterator[int]:
        """Yield positions of nodes in (after, before) that write into any of `storages`."""
        for storage in storages:
            positions = self._writers.get(storage, [])
            for position in positions[bisect.bisect_right(positions, after) :]:
                if before is None or position < before:
                    yield position

    def current(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Return the node that `reader` sees when it reads `node`.

        That is `node` itself, or the last statement (`x.add_(y)`, its result unused) that has
        written into its memory since.
        """
        since, until = self.index[node], self.index[reader]
        last = max(self.writers_after(self.storages(node), since, until), default=None)
        if last is None:
            return node
        writer = self.nodes[last]
        return node if writer.users else writer

    # --- dependence -----------------------------------------------------------------------------

    def is_activation(self, node: fx.Node) -> bool:
        """Whether the data of `node` depends on an input, and not on weights and constants only."""
        return node in self._activations

    def with_state(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return `nodes` with the weights and constants that they are computed from."""
        found = set(nodes)
        pending = list(found)
        while pending:
            for source in self.sources[pending.pop()]:
                if source not in found and source not in self._activations:
                    found.add(source)
                    pending.append(source)
        return found

    def data_sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield what `node` reads that carries tensors."""
        return (source for source in self.sources[node] if self._carries[source])

    def between(self, start: fx.Node, end: fx.Node) -> set[fx.Node]:
        """Return the nodes on data paths from `start` (exclusive) to `end` (inclusive).

        Empty where `end` does not depend on `start`. Only nodes after `start` are visited.
        """
        first = self.index[start]
        if self.index[end] <= first or end not in self._activations:
            return set()
        visited, pending = {end}, [end]
        while pending:
            for source in self.data_sources(pending.pop()):
                if source not in visited and self.index[source] > first:
                    visited.add(source)
                    pending.append(source)
        found: set[fx.Node] = set()
        for node in sorted(visited, key=self.index.__getitem__):
            if any(source is start or source in found for source in self.data_sources(node)):
                found.add(node)
        return found if end in found else set()

    def common_ancestor(self, a: fx.Node, b: fx.Node) -> fx.Node | None:
        """Return the latest activation that both nodes depend on (either may be it), else None."""
        if not (self.is_activation(a) and self.is_activation(b)):
            return None
        marks = {a: 1, b: 2} if a is not b else {a: 3}
        # How many pending nodes lead to a only, to b only, to both.
        waiting = {1: 0, 2: 0, 3: 0}
        for mark in marks.values():
            waiting[mark] += 1
        pending = [(-self.index[node], node) for node in marks]
        heapq.heapify(pending)
        while waiting[3] or (waiting[1] and waiting[2]):
            _, node = heapq.heappop(pending)
            mark = marks[node]
            waiting[mark] -= 1
            if mark == 3:
                return node
            for source in self.data_sources(node):
                if not self.is_activation(source):
                    continue
                if source not in marks:
                    marks[source] = mark
                    waiting[mark] += 1
                    heapq.heappush(pending, (-self.index[source], source))
                elif marks[source] not in (mark, 3):
                    waiting[marks[source]] -= 1
                    marks[source] = 3
                    waiting[3] += 1
        return None

    # --- liveness -------------------------------------------------------------------------------

    def stand_in(self, node: fx.Node) -> fx.Node | None:
        """Return what stands for an item whose module has died: a node, or None for None."""
        return self.region.facts.stand_ins[node]

    def has_stand_in(self, node: fx.Node) -> bool:
        """Whether the value of `node`, an item of what a module returns, is known without it."""
        return node in self.region.facts.stand_ins

    def dead_without(self, replaced: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
        """Return the nodes that nobody reads any more once each key is replaced by its value.

        The replaced nodes themselves are included, and assertions about what has died. So are
        items of dead modules that have a stand-in, which those who read them come to read.
        """
        dead: set[fx.Node] = set()
        pending = [source for node in replaced for source in self.sources[node]]
        while pending:
            node = pending.pop()
            if node in dead or node in replaced or node.op in ("placeholder", "output"):
                continue
            if all(reader in dead for reader in self._readers_given(node, replaced)):
                dead.add(node)
                pending.extend(self.sources[node])
        pending = list(dead)
        while pending:
            for reader in self.readers[pending.pop()]:
                is_left_over = reader in self._checks or self.has_stand_in(reader)
                if is_left_over and reader not in dead:
                    dead.add(reader)
                    if reader in self._checks:
                        pending.append(reader)
        return dead | set(replaced)

    def is_unread(
        self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node], dead: Collection[fx.Node]
    ) -> bool:
        """Whether all that read `node` are `dead`, the nodes that die with those replaced."""
        readers = self._readers_given(node, replaced)
        return bool(self.readers[node]) and all(reader in dead for reader in readers)

    def modules_gone(self, dead: Iterable[fx.Node]) -> list[str]:
        """Return the qualified names of the modules that are called by `dead` nodes only."""
        gone = {str(node.target) for node in dead if node.op == "call_module"}
        kept = {
            str(node.target)
            for node in self._called
            if str(node.target) in gone and node not in dead
        }
        return [self.region.qualified(path) for path in sorted(gone - kept)]

    def _find_checks(self) -> set[fx.Node]:
        """Return the assertions, and what is computed for them alone: they keep nothing alive."""
        checks: set[fx.Node] = set()
        for node in reversed(self.nodes):
            readers = self.readers[node]
            is_assertion = node.op == "call_function" and node.target in GUARDS
            serves_only_them = bool(readers) and checks.issuperset(readers)
            if is_assertion or (serves_only_them and node.op != "placeholder"):
                checks.add(node)
        return checks

    def _readers_given(
        self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node]
    ) -> Iterator[fx.Node]:
        """Yield who reads `node` when a reader that is replaced hands it on, or ignores it."""
        pending = [node]
        while pending:
            value = pending.pop()
            # What comes to be read in place of a node that did not read it before.
            pending += [n for n, new in replaced.items() if new is value and value not in n.args]
            for reader in self.readers[value]:
                if reader in self._checks or self.has_stand_in(reader):
                    continue
                if reader not in replaced:
                    yield reader
                elif self._hands_on(value, replaced[reader]):
                    pending.append(reader)

    def _hands_on(self, value: fx.Node, replacement: fx.Node) -> bool:
        """Whether reading `replacement` is reading `value`, or memory that `value` wrote into."""
        return replacement is value or bool(
            self.region.facts.written[value] & self.storages(replacement)
        )


def owner_call(node: fx.Node) -> Call:
    """Return the innermost module call that `node` was recorded in."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


def input_of(node: fx.Node) -> fx.Node | None:
    """Return the node that an operation on one tensor is given, in place or by name, else None."""
    given = node.args[0] if node.args else node.kwargs.get("input")
    return given if isinstance(given, fx.Node) else None


def _is_reshape(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _RESHAPES
