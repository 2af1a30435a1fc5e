"""The module that a region's graph becomes in a ticket."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.surgery.remnants import Dissolved, GoneTensor, GraphRemnant, Remnant, remnant_of

__all__ = ["GONE_KEY", "graph_module"]

GONE_KEY = "blockprune_gone"
"""Key of the output node's metadata for the names of what only removed branches read."""

_OF_MODULES = frozenset((*vars(nn.Module()), "forward", "_call_impl", "_compiled_call_impl"))
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_OF_GRAPHS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - _OF_MODULES
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OF_REMNANTS = frozenset(("remnant_aside", "remnant_place"))


def graph_module(path: str, module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a `GraphModule` that runs `graph` with what it needs of `module`, modes kept.

    It is an instance of the class of `module` too, and keeps its plain attributes; so do the
    modules inside that the graph dissolves. Modules that the graph calls stay what they are.
    Code around a region inside a model may read what its graph does not: there all parameters,
    buffers and children stay but those that only removed branches read.
    """
    result: fx.GraphModule = _Rebuilding(path, module, graph).carried_out()
    return result


class _Rebuilding:
    """One module that is rebuilt around a graph."""

    def __init__(self, path: str, module: nn.Module, graph: fx.Graph) -> None:
        self.path, self.module, self.graph = path, module, graph
        nodes = list(graph.nodes)
        self.called = {str(node.target) for node in nodes if node.op == "call_module"}
        self.read = {str(node.target) for node in nodes if node.op == "get_attr"}
        # A module that one mode alone calls is read, and called by a function.
        modules = {name for name in self.read if _is_module(module, name)}
        self.called |= modules
        self.read -= modules
        self.gone = _with_outer(nodes[-1].meta.get(GONE_KEY, ()))
        # A module is there as long as something of it is, even if that is no module.
        owners = {
            str(place[0])
            for node in nodes
            for place in node.meta.get("nn_module_stack", {}).values()
        }
        self.left = _with_outer((*self.called, *self.read, *owners))
        # Modules and tensors of before, by identity, to what stands for them.
        self.twins: dict[int, Any] = {}
        self.rebuilt: list[tuple[nn.Module, Remnant]] = []

    def carried_out(self) -> Any:
        for name in self.called:
            self._keep(self.module.get_submodule(name))
        for name in self.read:
            owner, _, key = name.rpartition(".")
            value = getattr(self.module.get_submodule(owner), key)
            if isinstance(value, Tensor):
                self.twins[id(value)] = value
        result = remnant_of(self.module, GraphRemnant)
        self._rebuild(result, self.module, "", is_gone=False)
        for old, remnant in self.rebuilt:
            self._carry_attributes(old, remnant)
        result.take_graph(self.graph)
        return result

    def _keep(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            for one in (part, *part.parameters(recurse=False), *part.buffers(recurse=False)):
                self.twins[id(one)] = one
        return module

    def _rebuild(self, remnant: Remnant, old: nn.Module, name: str, *, is_gone: bool) -> None:
        self.twins[id(old)] = remnant
        self.rebuilt.append((old, remnant))
        remnant.training = old.training
        remnant.remnant_place = (_joined(self.path, name), is_gone)
        remnant.remnant_aside = dict(vars(old).get("remnant_aside", {}))
        for key, child in old._modules.items():
            twin, stays = self._child(child, _joined(name, key), is_gone=is_gone)
            # Code around may count what is in a list.
            is_counted = bool(self.path) and isinstance(old, _LISTS)
            (remnant._modules if stays or is_counted else remnant.remnant_aside)[key] = twin
        for registry in ("_parameters", "_buffers"):
            for key, tensor in vars(old)[registry].items():
                path = _joined(name, key)
                if tensor is None or (not is_gone and self._stays(tensor, path)):
                    vars(remnant)[registry][key] = tensor
                else:
                    gone = GoneTensor.of(_joined(self.path, path), tensor)
                    remnant.remnant_aside[key] = self.twins.get(id(tensor), gone)
        remnant._non_persistent_buffers_set = old._non_persistent_buffers_set & set(
            remnant._buffers
        )

    def _child(
        self, child: nn.Module | None, name: str, *, is_gone: bool
    ) -> tuple[nn.Module | None, bool]:
        """Return what stands for a child, and whether it stays one."""
        if child is None:
            return None, True
        if not is_gone and name in self.called:
            return child, True
        stays = not is_gone and name in self.left
        if id(child) in self.twins:
            twin: nn.Module = self.twins[id(child)]
            return twin, stays
        if not is_gone and not stays and self.path and name not in self.gone:
            return self._keep(child), True
        # A scripted module is compiled code: nothing of it can be left but the name.
        left = nn.Module() if isinstance(child, torch.jit.ScriptModule) else child
        remnant = remnant_of(left, Dissolved)
        self._rebuild(remnant, left, name, is_gone=not stays)
        self.twins[id(child)] = remnant
        return remnant, stays

    def _stays(self, tensor: Tensor, name: str) -> bool:
        if name in self.read:
            return True
        # Outside a graph a tensor that is a plain attribute is a buffer of this kind.
        is_attribute = name in self.module._non_persistent_buffers_set
        return (bool(self.path) or is_attribute) and name not in self.gone

    def _carry_attributes(self, old: nn.Module, remnant: Remnant) -> None:
        """Give a remnant what was set on its module, and the hooks where it is called."""
        was_graph, is_graph = isinstance(old, fx.GraphModule), isinstance(remnant, GraphRemnant)
        if is_graph:
            for name in _HOOKS:
                vars(remnant)[name] = vars(old)[name]
        for name, value in vars(old).items():
            if name in _OF_MODULES or name in _OF_REMNANTS or (was_graph and name in _OF_GRAPHS):
                continue
            is_taken = is_graph and name in _OF_GRAPHS
            (remnant.remnant_aside if is_taken else vars(remnant))[name] = self._translated(value)

    def _translated(self, value: Any, above: tuple[int, ...] = ()) -> Any:
        """Return an attribute with what is left of modules and tensors in their place."""
        if id(value) in self.twins and isinstance(value, nn.Module | Tensor):
            return self.twins[id(value)]
        if isinstance(value, types.MethodType) and id(value.__self__) in self.twins:
            return types.MethodType(value.__func__, self.twins[id(value.__self__)])
        if type(value) not in (list, tuple, set, dict, functools.partial) or id(value) in above:
            return value
        inner = functools.partial(self._translated, above=(*above, id(value)))
        if isinstance(value, functools.partial):
            parts = [value.func, *value.args, *value.keywords.values()]
        else:
            parts = list(value.values() if isinstance(value, dict) else value)
        found = [inner(part) for part in parts]
        # What is the same object for several modules is to stay so.
        if all(a is b for a, b in zip(found, parts, strict=True)):
            return value
        if isinstance(value, dict):
            return dict(zip(value, found, strict=True))
        if isinstance(value, functools.partial):
            function, *given = found
            named = dict(zip(value.keywords, given[len(value.args) :], strict=True))
            return functools.partial(function, *given[: len(value.args)], **named)
        if isinstance(value, list):
            return found
        return tuple(found) if isinstance(value, tuple) else set(found)


def _is_module(module: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key in module.get_submodule(owner)._modules


def _with_outer(names: Iterable[str]) -> frozenset[str]:
    """Return the names and those of the modules around them."""
    return frozenset(
        ".".join(parts[:end])
        for parts in (name.split(".") for name in names)
        for end in range(1, len(parts) + 1)
    )


def _joined(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
