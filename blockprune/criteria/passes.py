"""Forward passes over a model's graphs: what flows through each block, what comes out without it.

A criterion on activations wants every block's input and output, a criterion on outputs what the
model returns with one block left out. Both follow the graphs that the blocks were found in, node
by node.

**One block left out.** Without a block the network computes the same as with it up to the merge
that the block ends in, and from there on its *tail*. So one dense pass runs from start to end and
keeps what is alive at each such merge, and each block then costs its tail alone: over N blocks of
equal cost about N/2 forward passes in place of N. What is kept are copies, since both the tail and
the dense pass may write in place. Where they exceed `max_cache_bytes`, a second dense pass is made
that stops at each remaining block to run its tail: whatever the bound, no more than one forward
pass is added, and the numbers are the same.

Where the root of the model does not trace, no graph leads from a block to the output. Each block
then costs a forward pass of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.blocks import BlockAnalysis, Cut, Flow, ResidualBlock
from blockprune.blocks.naming import lies_in
from blockprune.criteria.nonlinear import is_nonlinear
from blockprune.errors import raise_if_out_of_memory
from blockprune.randomness import RngState, rng_state, set_rng_state
from blockprune.tracing import (
    Call,
    CallInterpreter,
    Followed,
    assemble,
    bound_values,
    structural_copy,
    tensors_in,
)

__all__ = ["Passes"]

See = Callable[[ResidualBlock, Tensor, Tensor], None]
"""Is given a block, its input and its output, each time that the block has run."""


class Passes:
    """Forward passes of one model that see its blocks, or leave one out.

    Attributes:
        model: a module that follows the graphs; it shares the parameters of the model given.
    """

    def __init__(
        self, model: nn.Module, analysis: BlockAnalysis, blocks: Iterable[ResidualBlock]
    ) -> None:
        self._analysis = analysis
        self._blocks = tuple(blocks)
        self._setting = _Setting()
        self._absences = {block.name: self._absence(block) for block in self._blocks}
        self._tracks = {
            flow.region.path: _Track(flow, self._absences.values()) for flow in analysis.cuts.flows
        }
        graphs = {path: track.flow.region.graph for path, track in self._tracks.items()}
        self.model = assemble(structural_copy(model), graphs, self._follow)
        for block in self._blocks:
            span = self._span(block)
            self._setting.starts.setdefault(span.first, []).append(span)
            self._setting.ends.setdefault(span.last, []).append(span)

    def run(self, call: Call, without: ResidualBlock | None = None) -> Any:
        """Return what the model returns; what only the block left out needs is not run."""
        inputs = _own(call)
        with self._leaving_out(without):
            return self.model(*inputs.args, **inputs.kwargs)

    @torch.no_grad()
    def observe(self, call: Call, see: See) -> Any:
        """Run the model, and show each block's input and output as soon as both are there.

        The input is what the block's shortcut carries, the output what those behind it read: the
        merge, or the activation that alone reads the merge. A block in a module that is called
        several times is shown as often. Neither tensor may be changed, or kept without a copy.
        """
        self._setting.see = see
        try:
            return self.run(call)
        finally:
            self._setting.see = None
            self._setting.entered.clear()

    @torch.no_grad()
    def leave_one_out(
        self, call: Call, max_cache_bytes: int
    ) -> Iterator[tuple[ResidualBlock | None, Any]]:
        """Yield None and what the model returns, then each block and what it returns without it.

        Blocks come in order of execution, and the outputs one at a time.
        """
        if isinstance(self.model, Followed):
            yield from self._by_tails(self.model.module, call, max_cache_bytes)
            return
        yield None, self.run(call)
        for block in self._blocks:
            yield block, self.run(call, without=block)

    def _by_tails(
        self, root: nn.Module, call: Call, max_cache_bytes: int
    ) -> Iterator[tuple[ResidualBlock | None, Any]]:
        leaves = {block: self._leaves_at(block) for block in self._blocks}
        order = sorted(self._blocks, key=leaves.__getitem__)
        start = rng_state()
        saved: dict[ResidualBlock, _State] = {}
        walk = self._walk(root, call)
        room = max_cache_bytes
        for block in order:
            walk.advance(leaves[block])
            dead = self._absences[block.name].dead
            room -= walk.size(dead)
            if room < 0:
                break
            saved[block] = walk.state(dead)
        yield None, walk.finish()
        end = rng_state()
        again: _Interpreter | None = None
        for block in order:
            following = saved.pop(block, None)
            if following is None:
                if again is None:
                    set_rng_state(start)
                    again = self._walk(root, call)
                again.advance(leaves[block])
                following = again.state(self._absences[block.name].dead)
            here = rng_state()
            with self._leaving_out(block):
                output = self._walk(root, call).tail(following)
            yield block, output
            set_rng_state(here)
        set_rng_state(end)

    def _walk(self, root: nn.Module, call: Call) -> _Interpreter:
        walk = _Interpreter(root, self._tracks[""].flow.region.graph, self._setting, self._tracks)
        walk.begin(_own(call))
        return walk

    def _leaves_at(self, block: ResidualBlock) -> int:
        """Return the position in the root's graph at which the block's absence is first felt."""
        absence = self._absences[block.name]
        inner = [path for path in absence.paths if path]
        return next(
            position
            for position, node in enumerate(self._tracks[""].nodes)
            if node in absence.replaced
            or (node.op == "call_module" and any(lies_in(p, str(node.target)) for p in inner))
        )

    # --- absences and spans -----------------------------------------------------------------------

    @contextmanager
    def _leaving_out(self, block: ResidualBlock | None) -> Iterator[None]:
        if block is not None:
            self._setting.absence = self._absences[block.name]
        try:
            yield
        finally:
            self._setting.absence = _NOTHING

    def _absence(self, block: ResidualBlock) -> _Absence:
        by_flow = self._analysis.cuts.replacements(self._cuts(block))
        dead = self._analysis.cuts.dead_nodes(self._cuts(block))
        return _Absence(
            {node: source for replaced in by_flow.values() for node, source in replaced.items()},
            frozenset[fx.Node]().union(*dead.values()),
            frozenset(flow.region.path for flow in by_flow),
        )

    def _cuts(self, block: ResidualBlock) -> list[Cut]:
        return self._analysis.cuts.of_blocks([block.name], self._analysis.granularity)

    def _span(self, block: ResidualBlock) -> _Span:
        cuts = self._cuts(block)
        first, last = cuts[0], cuts[-1]
        end = last.branch.joins
        if len(end.users) == 1 and is_nonlinear(next(iter(end.users)), last.flow):
            end = next(iter(end.users))
        return _Span(block, first.flow, first.branch.stream, first.branch.joins, end)

    def _follow(self, path: str, module: nn.Module, graph: fx.Graph) -> nn.Module:
        return Followed(
            module, graph, partial(_Interpreter, setting=self._setting, tracks=self._tracks)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Absence:
    """What a pass does differently where one block is left out.

    Attributes:
        replaced: merges, and activations that are idle without it, and what stands for them.
        dead: nodes that are not run, those included.
        paths: of the regions in which something is replaced.
    """

    replaced: Mapping[fx.Node, fx.Node]
    dead: frozenset[fx.Node]
    paths: frozenset[str]


_NOTHING = _Absence({}, frozenset(), frozenset())


@dataclasses.dataclass(frozen=True, eq=False)
class _Span:
    """A block from what enters its first merge, `shortcut`, to what leaves it, `last`."""

    block: ResidualBlock
    flow: Flow
    shortcut: fx.Node
    first: fx.Node
    last: fx.Node

    def is_overwritten(self) -> bool:
        """Whether what entered may be changed by the time that the block has run."""
        memory = self.flow.storages(self.shortcut)
        return any(True for _ in self.flow.writers_after(memory, self.flow.index[self.first] - 1))


class _Setting:
    """What the interpreters of all regions share: what to leave out, and whom to show what."""

    def __init__(self) -> None:
        self.absence = _NOTHING
        self.see: See | None = None
        self.starts: dict[fx.Node, list[_Span]] = {}
        self.ends: dict[fx.Node, list[_Span]] = {}
        self.entered: dict[str, Tensor] = {}


class _Track:
    """The nodes of one region, and which values nobody reads behind each, whatever is absent."""

    def __init__(self, flow: Flow, absences: Iterable[_Absence]) -> None:
        self.flow = flow
        self.nodes = flow.nodes
        readers = {node: list(node.users) for node in flow.nodes}
        for node in flow.nodes:
            known = flow.stand_in(node) if flow.has_stand_in(node) else None
            if known is not None:
                readers[known] += [node, *node.users]
        for absence in absences:
            for node, source in absence.replaced.items():
                if node in readers:
                    readers[source].append(node)
        self.last_read: dict[fx.Node, list[fx.Node]] = {}
        for node, found in readers.items():
            last = max(found, key=flow.index.__getitem__, default=node)
            self.last_read.setdefault(last, []).append(node)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """A pass that stopped before the node at `position`: values still needed, and generators."""

    position: int
    values: dict[fx.Node, Any]
    random: RngState


class _Interpreter(CallInterpreter):
    """Follows the graph of one region, leaves out what is absent, shows the blocks it comes by."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        setting: _Setting,
        tracks: Mapping[str, _Track],
    ) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.setting = setting
        self.track = next(track for track in tracks.values() if track.flow.region.graph is graph)

    def run_call(self, call: Call) -> Any:
        self.begin(call)
        return self.finish()

    def begin(self, call: Call) -> None:
        """Stand before the first node of a pass."""
        self._bound = bound_values(self.graph, call)
        self.env = {}
        self.position = 0

    def finish(self) -> Any:
        """Run what is left, and return the output."""
        return self.advance(len(self.track.nodes))

    def advance(self, position: int) -> Any:
        """Run up to the node at a position, and return the value of the last node run."""
        value = None
        for node in self.track.nodes[self.position : position]:
            value = self.env[node] = self.run_node(node)
            for read in self.track.last_read.get(node, ()):
                self.env.pop(read, None)
        self.position = max(self.position, position)
        return value

    def size(self, dead: frozenset[fx.Node]) -> int:
        """Return the bytes that `state` would copy: each memory once, weights not counted."""
        weights = {id(parameter) for parameter in self.module.parameters()}
        values = [value for node, value in self.env.items() if self._is_kept(node, dead)]
        memory = [t.untyped_storage() for t in tensors_in(values) if id(t) not in weights]
        return sum({part.data_ptr(): part.nbytes() for part in memory}.values())

    def state(self, dead: frozenset[fx.Node]) -> _State:
        """Return a copy of where things stand, without the values of `dead` nodes."""
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self.module.parameters()}
        kept = {node: value for node, value in self.env.items() if self._is_kept(node, dead)}
        values = {node: _copied(value, memo) for node, value in kept.items()}
        return _State(self.position, values, rng_state())

    def _is_kept(self, node: fx.Node, dead: frozenset[fx.Node]) -> bool:
        # An item with a stand-in has its value, and may be read behind the block.
        return node not in dead or self.track.flow.has_stand_in(node)

    def tail(self, state: _State) -> Any:
        """Run on from a state, which is used up, and return the output."""
        self.env, self.position = state.values, state.position
        set_rng_state(state.random)
        return self.finish()

    def run_node(self, n: fx.Node) -> Any:
        absence = self.setting.absence
        if n in absence.replaced:
            return self._replacement(n, absence.replaced[n])
        if n in absence.dead:
            known = self.track.flow.stand_in(n) if self.track.flow.has_stand_in(n) else None
            return None if known is None else self.env[known]
        if self.setting.see is None:
            return super().run_node(n)
        self._note_entries(n)
        value = super().run_node(n)
        for span in self.setting.ends.get(n, ()):
            self.setting.see(span.block, self.setting.entered.pop(span.block.name), value)
        return value

    def _replacement(self, node: fx.Node, source: fx.Node) -> Any:
        """Return the shortcut's values, in memory of their own where the merge's were."""
        flow = self.track.flow
        value = self.env[source]
        return value if flow.storages(node) & flow.storages(source) else value.clone()

    def _note_entries(self, node: fx.Node) -> None:
        for span in self.setting.starts.get(node, ()):
            value = self.env[span.shortcut]
            self.setting.entered[span.block.name] = (
                value.clone() if span.is_overwritten() else value
            )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy; under one memo, values that share memory go on sharing it."""
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise_if_out_of_memory(error)
        # A lock, a file, a generator: there is one, and all passes share it.
        return value


def _own(call: Call) -> Call:
    """Return the call with tensors of its own: a forward may write into its inputs."""
    return call.map(lambda tensor: tensor.clone())
