"""What running a graph once tells of it: shapes, shared memory, and who writes into what.

Nothing is guessed from names. The graph is interpreted under `FakeTensorMode` (no numbers, no
memory), or with real tensors where an operation refuses; around every node the version counters of
its arguments tell which of them it wrote into, and storages tell which values share memory.
Both modes are run where they can differ: dropout hands its input through in eval mode only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockprune.errors import TraceError
from blockprune.tracing.calls import Call, refused
from blockprune.tracing.copying import structural_copy
from blockprune.tracing.interpreting import CallInterpreter, bound_values
from blockprune.tracing.values import TensorFact, map_tensors, tensors_in

__all__ = ["Facts", "gather_facts"]

_SAME_IN_BOTH_MODES = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "batchnorm",
        "container",
        "conv",
        "flatten",
        "fold",
        "linear",
        "normalization",
        "padding",
        "pixelshuffle",
        "pooling",
        "sparse",
        "upsampling",
    )
)
_PLAIN_ACTIVATIONS = (
    nn.ELU,
    nn.GELU,
    nn.GLU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softmax,
    nn.Tanh,
)


@dataclasses.dataclass
class Facts:
    """Facts of each node.

    Attributes:
        values: what it computes, tensors as `TensorFact`s; of an argument that holds state (a
            cache), that as the call found it.
        storages: the memory that its value lies in.
        written: the memory that it writes into.
        stand_ins: for an item of what a module returns that is None, or an argument of that module
            handed through: None, or the node of the argument. It is known without the call.
    """

    values: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    storages: dict[fx.Node, frozenset[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    written: dict[fx.Node, frozenset[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    stand_ins: dict[fx.Node, fx.Node | None] = dataclasses.field(default_factory=dict)


def gather_facts(graph: fx.Graph, module: nn.Module, call: Call) -> Facts:
    """Run `graph` over a copy of `module` and return what was seen.

    `call` may hold tensors, or `TensorFact`s to make them from.

    Raises:
        TraceError: the graph cannot be run on these inputs; quotes the error of the model.
    """
    facts = Facts()
    _observe(graph, module, call, facts, train=False)
    if _depends_on_mode(graph, module):
        # A forward may refuse these inputs in train mode (one value a channel in a normalisation);
        # then eval mode's aliases are all there is, and the verification still has its say.
        with contextlib.suppress(TraceError):
            _observe(graph, module, call, facts, train=True)
    return facts


def _observe(graph: fx.Graph, module: nn.Module, call: Call, facts: Facts, *, train: bool) -> None:
    copy = structural_copy(module).train(train)
    for layer in copy.modules():
        # Batch statistics of a single value are refused in train mode; they alias nothing.
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    real = call.map(lambda fact: fact.example(), TensorFact)
    try:
        # Real tensors inside an object cannot be copied under the fake mode.
        own = real.map(lambda tensor: tensor)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            seen = _run(graph, copy, own.map(fake.from_tensor, copy_state=False), train)
    except Exception:
        # Data-dependent shapes, operations without a fake form: real numbers tell.
        copy = structural_copy(module).train(train)
        try:
            seen = _run(graph, copy, real.map(lambda tensor: tensor.detach().clone()), train)
        except Exception as error:
            raise refused(module, call, error) from error
    for name in ("storages", "written"):
        known = getattr(facts, name)
        for node, found in getattr(seen, name).items():
            known[node] = known.get(node, frozenset()) | found
    facts.stand_ins = {
        node: value
        for node, value in seen.stand_ins.items()
        # What holds in one mode only is no fact of the graph.
        if not facts.values or facts.stand_ins.get(node, node) is value
    }
    facts.values = facts.values or _as_found(seen.values, graph, call)


def _as_found(values: dict[fx.Node, Any], graph: fx.Graph, call: Call) -> dict[fx.Node, Any]:
    """Return the values with the arguments as they were: the run has written into its own."""
    bound = bound_values(graph, call)
    for node in values:
        if node.op == "placeholder":
            values[node] = map_tensors(bound[str(node.target)], TensorFact.of)
    return values


def _run(graph: fx.Graph, module: nn.Module, call: Call, train: bool) -> Facts:
    observer = _Observer(module, graph, "train" if train else "eval")
    with torch.no_grad():
        observer.run_call(call)
    return observer.facts


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

    def _storages(self, tensors: list[Tensor]) -> frozenset[tuple[str, int]]:
        found = []
        for tensor in tensors:
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):
                # Sparse and similar layouts share no memory that a view could reach.
                continue
            self._held.append(storage)
            found.append((self.mode, int(storage._cdata)))
        return frozenset(found)


def _depends_on_mode(graph: fx.Graph, module: nn.Module) -> bool:
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).split(".")[-1] == "training":
            return True
        if node.op == "call_module":
            for layer in module.get_submodule(str(node.target)).modules():
                kind = type(layer)
                if kind.__module__ not in _SAME_IN_BOTH_MODES and kind not in _PLAIN_ACTIVATIONS:
                    return True
    return False
