"""From a model to its regions: the modules that recordings of it could make graphs of.

The whole model is one region where its own forward can be held by a graph. Where it cannot, and
inside every module that a graph has to call, each child is tried as a region of its own, from the
same recordings; what remains is reported as opaque, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from blockprune.errors import TraceError, close_names, raise_if_out_of_memory
from blockprune.randomness import seed_rng
from blockprune.tracing.agreed import Agreement
from blockprune.tracing.calls import Call, as_call
from blockprune.tracing.copying import (
    copy_graph,
    isolated,
    mark_as_writing,
    structural_copy,
    writes_weights,
)
from blockprune.tracing.facts import Facts, gather_facts
from blockprune.tracing.graphs import drop_unused
from blockprune.tracing.leaks import uncached
from blockprune.tracing.placing import Followed, assemble
from blockprune.tracing.runs import Runs
from blockprune.tracing.state import surroundings_kept
from blockprune.tracing.values import tensors_in

__all__ = ["COMPILED", "NOT_EXECUTED", "LeafModules", "Region", "TracedModel", "trace_model"]

LeafModules = str | type[nn.Module] | Iterable[str | type[nn.Module]]
"""Modules that are not to be looked into: classes, names of classes, patterns of names."""

_STRAY = "replacing this module by its graph changes the output of the model around it"
COMPILED = "it was compiled, so nothing inside can be seen: cut before you compile"
_OPERATION = "it has no modules inside and no merge: it is called as it is"
_COMPILED_KINDS = (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)
NOT_EXECUTED = "not executed by the example inputs"


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
        stateful: modules whose forward changes state of Python's, a generator's for one.
    """

    root: nn.Module
    call: Call
    regions: tuple[Region, ...]
    opaque: dict[str, str]
    may_merge: frozenset[str] = frozenset()
    leaf_modules: tuple[str, ...] = ()
    stateful: frozenset[str] = frozenset()


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
    with isolated(), surroundings_kept(model), uncached():
        walk = _Walk(structural_copy(model), call, asked)
        if preserve_root:
            walk.descend("", ())
        else:
            walk.attempt("", ())
        walk.give_up_strays()
        walk.note_unused()
    if writes_weights(walk.root):
        mark_as_writing(model)
    regions = sorted(walk.regions, key=lambda region: region.order)
    names = tuple(entry if isinstance(entry, str) else entry.__name__ for entry in leaf_modules)
    return TracedModel(
        root=walk.root,
        call=call,
        regions=tuple(regions),
        opaque=walk.opaque,
        may_merge=walk.opaque_with_merges(),
        leaf_modules=names,
        stateful=frozenset(
            path for path, why in walk.runs.stopped().items() if why.startswith("changes ")
        ),
    )


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


def _output(model: nn.Module, call: Call) -> list[Tensor]:
    """Return the tensors that a copy of a model, which is put in eval mode, returns."""
    inputs = call.map(lambda tensor: tensor.detach().clone())
    seed_rng(0)
    output = model.eval()(*inputs.args, **inputs.kwargs)
    return [tensor.detach() for tensor in tensors_in(output)]


class _Walk:
    """The search for regions in one model."""

    def __init__(self, root: nn.Module, call: Call, asked: dict[str, str]) -> None:
        self.root = root
        self.asked = asked
        self.runs = Runs(root, call)
        self.regions: list[Region] = []
        self.opaque: dict[str, str] = {}
        self.called = {
            path: _OPERATION
            for path, module in root.named_modules()
            if path not in self.runs.merging and _is_small(module)
        }
        for path, module in root.named_modules():
            if parametrize.is_parametrized(module):
                self.called[path] = "its weights are parametrized"
        self.called |= self.runs.stopped() | asked
        self._visited: set[int] = set()

    def attempt(self, path: str, order: tuple[int, ...]) -> None:
        """Make a region of the module at `path`, or report it as opaque and look into it."""
        module = self.root.get_submodule(path)
        try:
            if isinstance(module, fx.GraphModule):
                # Already a graph (a ticket, say): it knows its owners and its modes.
                graph, _ = copy_graph(module._graph)
                facts = gather_facts(graph, module, self._call_of(path))
                drop_unused(graph, facts)
            elif self.called.get(path, _OPERATION) != _OPERATION:
                raise TraceError(self.called[path])
            else:
                graph, facts = Agreement(self.runs, module, path, self.called).graph()
                # The copy leaves behind what the graph was made with.
                graph, facts = _copied(graph, facts)
        except TraceError as error:
            self.opaque[path] = str(error)
            self.descend(path, order)
            return
        self.regions.append(Region(path, module, graph, facts, order))
        for index, node in enumerate(graph.nodes):
            if node.op == "call_module":
                self._look_into(_joined(path, str(node.target)), (*order, index))

    def _look_into(self, path: str, order: tuple[int, ...]) -> None:
        """Look for regions in a module that a graph calls."""
        module = self.root.get_submodule(path)
        if id(module) in self._visited or not _may_hold_blocks(module):
            return
        if isinstance(module, (fx.GraphModule, *_COMPILED_KINDS)) or path in self.asked:
            self._try_child(path, order)
            return
        self._visited.add(id(module))
        if path in self.called:
            if self.called[path] != _OPERATION:
                self.opaque[path] = self.called[path]
            self.descend(path, order)
        elif path in self.runs.main.by_path:
            self._try_child(path, order)

    def _call_of(self, path: str) -> Call:
        call = self.runs.main.by_path[path][0].call
        assert call is not None
        return call

    def descend(self, path: str, order: tuple[int, ...]) -> None:
        """Try the children of an opaque module as regions."""
        for name, child in self.root.get_submodule(path).named_children():
            if id(child) not in self._visited and _may_hold_blocks(child):
                self._try_child(_joined(path, name), order)

    def _try_child(self, path: str, order: tuple[int, ...]) -> None:
        self._visited.add(id(self.root.get_submodule(path)))
        by_path = self.runs.main.by_path
        if path in self.asked:
            self.opaque[path] = self.asked[path]
        elif isinstance(self.root.get_submodule(path), _COMPILED_KINDS):
            self.opaque[path] = COMPILED
        elif path in by_path and not self._may_have_graphs(path):
            return
        elif path in by_path:
            self.attempt(path, (*order, list(by_path).index(path)))
        elif any(name.startswith(path + ".") for name in by_path):
            # A ModuleList is never called, its elements are.
            self.descend(path, order)
        else:
            self.opaque[path] = NOT_EXECUTED

    def _may_have_graphs(self, path: str) -> bool:
        """Whether tensors are added in a module or inside, or it was made from a graph."""
        inner = (part for part in self.root.get_submodule(path).modules())
        return self.runs.merges_in(path) or any(isinstance(p, fx.GraphModule) for p in inner)

    def give_up_strays(self) -> None:
        """Undo regions whose graph, in the place of the module, changes what the model computes.

        Code around a region may look into it, with hooks that collect what the layers inside
        return. Children of such a region are tried instead.
        """
        while any(region.path for region in self.regions) and not self._computes(self.regions):
            strays = [region for region in self.regions if not self._computes([region])]
            strays = strays or self.regions
            self.regions = [region for region in self.regions if region not in strays]
            for region in strays:
                self.opaque[region.path] = _STRAY
                self.called[region.path] = _STRAY
                self.descend(region.path, region.order)

    def _computes(self, regions: list[Region]) -> bool:
        """Whether the model returns what it does with graphs in the place of these regions."""
        graphs = {region.path: region.graph for region in regions}
        model = assemble(structural_copy(self.root), graphs, lambda path, m, g: Followed(m, g))
        try:
            with torch.set_grad_enabled(self.runs.grad):
                return _agree(_output(model, self.runs.call), self.runs.expected)
        except Exception as error:
            raise_if_out_of_memory(error)
            # The code around a region may fail where it does not find what it looks for.
            return False

    def note_unused(self) -> None:
        """Report modules that are neither called nor read, and that could hold blocks."""
        read = {*self.opaque, *self.runs.main.by_path} - {""}
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

    def opaque_with_merges(self) -> frozenset[str]:
        """Return the opaque modules in whose own code tensors of one shape were added."""
        known = {*self.opaque, *(region.path for region in self.regions)}
        found = (_innermost(path, known) for path in self.runs.merging)
        return frozenset(found) & self.opaque.keys()


def _copied(graph: fx.Graph, facts: Facts) -> tuple[fx.Graph, Facts]:
    """Return a copy of a graph with the facts of its nodes."""
    copy, twins = copy_graph(graph)
    twins[next(reversed(graph.nodes))] = next(reversed(copy.nodes))

    def moved(values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        return {twins[node]: value for node, value in values.items() if node in twins}

    stand_ins = {
        twins[node]: None if value is None else twins[value]
        for node, value in facts.stand_ins.items()
        if node in twins
    }
    return copy, Facts(
        moved(facts.values),
        moved(facts.elsewhere),
        moved(facts.storages),
        moved(facts.written),
        stand_ins,
    )


def _is_small(module: nn.Module) -> bool:
    """Whether a module of a user's has no modules inside."""
    return not module._modules and not type(module).__module__.startswith("torch.nn")


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
