"""From a model to its traced regions.

The whole model is one region where its root traces. Where it does not, and inside every leaf that
a trace had to make, each child that is called is tried as a region of its own; what remains is
reported as opaque, with the reason. A region's inputs are those of one eager forward.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.errors import TraceError, close_names
from blockprune.randomness import seed_rng
from blockprune.tracing.calls import Call, as_call, bind, constants_of, refused
from blockprune.tracing.constants import trace_with_arguments
from blockprune.tracing.copying import copy_graph, isolated, structural_copy
from blockprune.tracing.facts import Facts, gather_facts
from blockprune.tracing.modes import trace_both_modes
from blockprune.tracing.placing import Followed, assemble
from blockprune.tracing.recording import record_calls
from blockprune.tracing.tracer import Leaves
from blockprune.tracing.values import tensors_in

__all__ = ["NOT_EXECUTED", "LeafModules", "Region", "TracedModel", "trace_model"]

LeafModules = str | type[nn.Module] | Iterable[str | type[nn.Module]]
"""Modules that are not to be looked into: classes, names of classes, patterns of names."""

_STRAY = "its graph does not do what it does where it is: it looks at types, or is looked into"
NOT_EXECUTED = "not executed by the example inputs"

_PURE_FUNCTIONS = frozenset({getattr, len, operator.getitem})
_PURE_METHODS = frozenset({"dim", "numel", "size", "stride"})


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """One module of the model as a graph.

    Attributes:
        path: qualified name in the model, "" for the root.
        module: a structural copy of that module, sharing the dense model's parameters.
        graph: its operations; targets are relative to `module`, owners are in the nodes' metadata.
        facts: what running the graph once has shown.
        order: sorts regions, and what is in them, by execution.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    facts: Facts
    order: tuple[int, ...]

    @property
    def values(self) -> dict[fx.Node, Any]:
        """Each node's value, with every tensor replaced by its `TensorFact`."""
        return self.facts.values

    def qualified(self, name: str) -> str:
        """Return the name in the whole model of something named relative to this region."""
        return _joined(self.path, name)


@dataclasses.dataclass(frozen=True, eq=False)
class TracedModel:
    """A model as regions, and the modules that could not be looked into.

    Attributes:
        root: a structural copy of the model.
        call: the example inputs it was traced with.
        regions: in order of execution.
        opaque: module name to reason.
        may_merge: those of the opaque modules in which tensors of one shape were added.
        leaf_modules: as asked for, classes by name.
    """

    root: nn.Module
    call: Call
    regions: tuple[Region, ...]
    opaque: dict[str, str]
    may_merge: frozenset[str] = frozenset()
    leaf_modules: tuple[str, ...] = ()


def trace_model(
    model: nn.Module,
    example_inputs: Any,
    *,
    preserve_root: bool = False,
    leaf_modules: LeafModules = (),
) -> TracedModel:
    """Trace `model` into regions, leaving it untouched.

    Args:
        model: any `nn.Module`.
        example_inputs: a Tensor, a tuple of arguments or a dict of keywords that its forward takes.
        preserve_root: keep the root as the module it is, and make its children the regions.
        leaf_modules: modules that are called and not looked into: classes, names of classes, or
            `fnmatch` patterns of qualified names.

    Raises:
        TraceError: the model cannot be copied, or does not run on `example_inputs`; or an entry of
            `leaf_modules` matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{type(model).__name__} is a TorchScript module, which holds compiled code and no "
            "forward to follow. Pass the nn.Module that it was made from."
        )
    call = as_call(model, example_inputs)
    leaf_modules = [leaf_modules] if isinstance(leaf_modules, str | type) else list(leaf_modules)
    asked = _modules_asked_for(model, leaf_modules)
    with isolated():
        expected = _eager_output(model, call)
        walk = _Walk(structural_copy(model), call, asked)
        if preserve_root:
            walk.descend("", ())
        else:
            walk.attempt("", call, ())
        walk.give_up_strays(expected)
        walk.note_unused()
        may_merge = walk.opaque_with_merges()
    regions = sorted(walk.regions, key=lambda region: region.order)
    names = tuple(entry if isinstance(entry, str) else entry.__name__ for entry in leaf_modules)
    return TracedModel(walk.root, call, tuple(regions), walk.opaque, may_merge, names)


def _modules_asked_for(
    model: nn.Module, leaf_modules: Iterable[str | type[nn.Module]]
) -> dict[str, str]:
    """Return the paths of the modules that are to be leaves, with the reason."""
    found: dict[str, str] = {}
    for entry in leaf_modules:
        matches = [path for path, module in model.named_modules() if _is_meant(entry, path, module)]
        if not matches:
            known = {type(module).__name__ for module in model.modules()}
            known |= {path for path, _ in model.named_modules()}
            raise TraceError(
                f"leaf_modules: {entry!r} is no class, and no pattern of a qualified name, of a "
                f"module inside {type(model).__name__}.{close_names(str(entry), known)}"
            )
        found |= dict.fromkeys(matches, f"asked for by leaf_modules ({entry})")
    return found


def _is_meant(entry: str | type[nn.Module], path: str, module: nn.Module) -> bool:
    if not path:
        return False
    if isinstance(entry, type):
        return isinstance(module, entry)
    return fnmatchcase(path, entry) or type(module).__name__ == entry


def _eager_output(model: nn.Module, call: Call) -> list[Tensor]:
    """Run the model once for real, since fake tensors let some wrong inputs pass.

    Raises:
        TraceError: quotes what the model says of the inputs.
    """
    try:
        return _output(structural_copy(model), call)
    except Exception as error:
        raise refused(model, call, error) from error


def _output(model: nn.Module, call: Call) -> list[Tensor]:
    """Return the tensors that a copy of a model, which is put in eval mode, returns."""
    inputs = call.map(lambda tensor: tensor.detach().clone())
    seed_rng(0)
    with torch.no_grad():
        return list(tensors_in(model.eval()(*inputs.args, **inputs.kwargs)))


class _Walk:
    """The search for regions in one model."""

    def __init__(self, root: nn.Module, call: Call, asked: dict[str, str]) -> None:
        self.root = root
        self.call = call
        self.asked = asked
        self.regions: list[Region] = []
        self.opaque: dict[str, str] = {}
        self._visited: set[int] = set()
        self._calls: dict[str, tuple[int, list[Call]]] | None = None
        self._adding: set[str] = set()

    def attempt(self, path: str, call: Call, order: tuple[int, ...]) -> None:
        """Make a region of the module at `path`, or report it as opaque and look into it."""
        module = self.root.get_submodule(path)
        outer = f"{path}." if path else ""
        leaves = Leaves(
            {p.removeprefix(outer): why for p, why in self.asked.items() if p.startswith(outer)}
        )
        try:
            graph = _graph_of(module, path, call, leaves)
        except TraceError as error:
            self.opaque[path] = str(error)
            self.descend(path, order)
            return
        _drop_unused(graph)
        facts = gather_facts(graph, module, call)
        self.regions.append(Region(path, module, graph, facts, order))
        self._look_into_leaves(path, graph, leaves, order)

    def _look_into_leaves(
        self, path: str, graph: fx.Graph, leaves: Leaves, order: tuple[int, ...]
    ) -> None:
        region = self.root.get_submodule(path)
        # A graph of before does not say why a module in it is called and not part of it.
        is_followed = isinstance(region, fx.GraphModule)
        for index, node in enumerate(graph.nodes):
            if node.op != "call_module":
                continue
            name = str(node.target)
            module = region.get_submodule(name)
            qualified = _joined(path, name)
            if id(module) in self._visited:
                continue
            is_unknown = is_followed and _may_hold_blocks(module)
            if isinstance(module, fx.GraphModule) or name in leaves.paths or is_unknown:
                # Called with plain numbers, as a region of its own, it may well trace.
                self._try_child(qualified, (*order, index))
            elif type(module) in leaves.classes:
                self._visited.add(id(module))
                self.opaque[qualified] = leaves.classes[type(module)]
                self.descend(qualified, (*order, index))

    def descend(self, path: str, order: tuple[int, ...]) -> None:
        """Try the children of an opaque module as regions."""
        for name, child in self.root.get_submodule(path).named_children():
            if id(child) not in self._visited and _may_hold_blocks(child):
                self._try_child(_joined(path, name), order)

    def give_up_strays(self, expected: list[Tensor]) -> None:
        """Undo regions whose graph, in the place of the module, changes what the model computes.

        `expected` is what the model returns as it is.

        A forward may ask for the type of what is a proxy in a trace, and a model may look into a
        module while it runs, with hooks that collect what the layers inside return. Children of
        such a region are tried instead.
        """
        while self.regions and not self._computes(self.regions, expected):
            strays = [region for region in self.regions if not self._computes([region], expected)]
            strays = strays or self.regions
            self.regions = [region for region in self.regions if region not in strays]
            for region in strays:
                self.opaque[region.path] = _STRAY
                self.descend(region.path, region.order)

    def note_unused(self) -> None:
        """Report modules that no region and no opaque module reads, and that could hold blocks."""
        read = set(self.opaque)
        for region in self.regions:
            for node in region.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    read.add(region.qualified(str(node.target)))
        around_read = {outer for path in read for outer in _outwards(path)}
        for path, module in self.root.named_modules():
            is_read = path in around_read or any(outer in read for outer in _outwards(path))
            if path and not is_read and _may_hold_blocks(module):
                self.opaque[path] = NOT_EXECUTED
                read.add(path)

    def _computes(self, regions: list[Region], expected: list[Tensor]) -> bool:
        """Whether the model returns what is expected with graphs in the place of these regions."""
        graphs = {region.path: region.graph for region in regions}
        model = assemble(structural_copy(self.root), graphs, lambda path, m, g: Followed(m, g))
        try:
            return _agree(_output(model, self.call), expected)
        except Exception:
            # The code around a region may fail where it does not find what it looks for.
            return False

    def opaque_with_merges(self) -> frozenset[str]:
        """Return the opaque modules in whose own code tensors of one shape were added."""
        if not self.opaque:
            return frozenset()
        self._recorded_calls()
        known = {*self.opaque, *(region.path for region in self.regions)}
        return frozenset(_innermost(path, known) for path in self._adding) & self.opaque.keys()

    def _try_child(self, path: str, order: tuple[int, ...]) -> None:
        self._visited.add(id(self.root.get_submodule(path)))
        if path in self.asked:
            self.opaque[path] = self.asked[path]
            return
        position, calls = self._recorded_calls().get(path, (0, []))
        if not calls:
            # A ModuleList is never called, its elements are.
            if any(name.startswith(path + ".") for name in self._recorded_calls()):
                self.descend(path, order)
            else:
                self.opaque[path] = NOT_EXECUTED
            return
        module = self.root.get_submodule(path)
        try:
            first, *others = (constants_of(bind(module, call)) for call in calls)
            if any(other != first for other in others):
                raise TraceError("called with different constant arguments at different places")
            self.attempt(path, calls[0], (*order, position))
        except TraceError as error:
            self.opaque[path] = str(error)
            self.descend(path, order)

    def _recorded_calls(self) -> dict[str, tuple[int, list[Call]]]:
        if self._calls is None:
            self._calls, self._adding = record_calls(self.root, self.call)
        return self._calls


def _graph_of(module: nn.Module, path: str, call: Call, leaves: Leaves) -> fx.Graph:
    if isinstance(module, fx.GraphModule):
        # Already a graph (a ticket, say): it knows its owners and its modes.
        return copy_graph(module.graph)[0]
    bindings = bind(module, call)
    # A user calls the root as the example does; code around an inner region may vary its call.
    trace = trace_with_arguments if path else trace_both_modes
    try:
        graph = trace(module, bindings, leaves, conditions=False)
    except TraceError as error:
        try:
            graph = trace(module, bindings, leaves, conditions=True)
        except TraceError:
            raise error from None
    # The copy leaves the tracer, and the modules it holds, behind.
    return copy_graph(graph)[0]


def _drop_unused(graph: fx.Graph) -> None:
    """Erase pure nodes that nothing reads, such as the weights of `x, weights = attention(x)`."""
    for node in reversed(graph.nodes):
        is_pure = (
            node.op == "get_attr"
            or (node.op == "call_function" and node.target in _PURE_FUNCTIONS)
            or (node.op == "call_method" and node.target in _PURE_METHODS)
        )
        if is_pure and not node.users:
            graph.erase_node(node)


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two outputs are the same but for rounding; the proof comes with the ticket."""
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_meta:
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        close = torch.isclose(a.to(wide), b.to(wide), rtol=1e-3, atol=1e-3, equal_nan=True)
        if not bool(close.all()):
            return False
    return True


def _may_hold_blocks(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.nn") and (
        not module._modules or module._parameters
    ):
        return False
    return next(module.parameters(), None) is not None


def _joined(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _outwards(path: str) -> Iterator[str]:
    """Yield `path` and the names of the modules around it, the root left out."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _innermost(path: str, known: Container[str]) -> str:
    """Return `path`, or the innermost module around it, that is in `known`; else ""."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path
