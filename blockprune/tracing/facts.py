"""What runs have shown of the nodes of a graph: shapes, shared memory, and who writes into what.

Nothing is guessed from names. Around every operation the version counters of its arguments tell
which of them it wrote into, and storages tell which values share memory. A recording knows all of
it; a graph that came without one, a ticket to be cut further, is run node by node in both modes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.errors import TraceError
from blockprune.tracing.calls import Call, refused
from blockprune.tracing.copying import structural_copy
from blockprune.tracing.interpreting import CallInterpreter
from blockprune.tracing.values import TensorFact, map_tensors, storage_of, tensors_in

__all__ = ["Facts", "Place", "gather_facts"]

Place = tuple[Any, int]
"""A storage: the run that it was seen in, and its number there."""


@dataclasses.dataclass
class Facts:
    """Facts of each node.

    Attributes:
        values: what it computes, tensors as `TensorFact`s.
        elsewhere: the same in further recordings, at another batch size for one.
        storages: the memory that its value lies in.
        written: the memory that it writes into.
        stand_ins: for an item of what a module returns that is None, or an argument of that module
            handed through: None, or the node of the argument. It is known without the call.
    """

    values: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    elsewhere: dict[fx.Node, list[Any]] = dataclasses.field(default_factory=dict)
    storages: dict[fx.Node, frozenset[Place]] = dataclasses.field(default_factory=dict)
    written: dict[fx.Node, frozenset[Place]] = dataclasses.field(default_factory=dict)
    stand_ins: dict[fx.Node, fx.Node | None] = dataclasses.field(default_factory=dict)


def gather_facts(graph: fx.Graph, module: nn.Module, call: Call) -> Facts:
    """Run a graph that is not of a recording (a ticket's), and return what was seen.

    Args:
        graph: the graph.
        module: what it fetches from.
        call: arguments of the module; tensors as `TensorFact`s to make them from.

    Raises:
        TraceError: the graph cannot be run on these inputs; quotes its error.
    """
    facts = Facts()
    _observe(graph, module, call, facts, train=False)
    # A forward may refuse these inputs in train mode (one value a channel in a normalisation);
    # then eval mode's aliases are all there is, and the verification still has its say.
    with contextlib.suppress(TraceError):
        _observe(graph, module, call, facts, train=True)
    return facts


def _observe(graph: fx.Graph, module: nn.Module, call: Call, facts: Facts, *, train: bool) -> None:
    observer = _Observer(structural_copy(module).train(train), graph, "train" if train else "eval")
    try:
        with torch.no_grad():
            observer.run_call(call.map(lambda fact: fact.example(), TensorFact))
    except Exception as error:
        raise refused(module, call, error) from error
    seen = observer.facts
    for kept, found in ((facts.storages, seen.storages), (facts.written, seen.written)):
        for node, memory in found.items():
            kept[node] = kept.get(node, frozenset()) | memory
    facts.stand_ins = {
        node: value
        for node, value in seen.stand_ins.items()
        # What holds in one mode only is no fact of the graph.
        if not facts.values or facts.stand_ins.get(node, node) is value
    }
    facts.values = facts.values or seen.values


class _Observer(CallInterpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, mode: str) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.mode = mode
        self.facts = Facts()
        # A storage's address may be used again once it is freed; holding on keeps identities apart.
        self._held: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        inputs = [t for source in n.all_input_nodes for t in tensors_in(self.env[source])]
        versions = [t._version for t in inputs]
        value = super().run_node(n)
        written = [t for t, version in zip(inputs, versions, strict=True) if t._version != version]
        self.facts.written[n] = self._storages(written)
        self.facts.storages[n] = self._storages(list(tensors_in(value)))
        self.facts.values[n] = map_tensors(value, TensorFact.of)
        if n.op == "call_function" and n.target is operator.getitem:
            self._note_stand_in(n, value)
        return value

    def _note_stand_in(self, item: fx.Node, value: Any) -> None:
        source = item.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module":
            return
        if value is None:
            self.facts.stand_ins[item] = None
        elif isinstance(value, Tensor):
            for argument in source.all_input_nodes:
                written = self.facts.written[source] & self._storages([value])
                if self.env[argument] is value and not written:
                    self.facts.stand_ins[item] = argument

    def _storages(self, tensors: list[Tensor]) -> frozenset[Place]:
        found = []
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                self._held.append(storage)
                found.append((self.mode, int(storage._cdata)))
        return frozenset(found)
