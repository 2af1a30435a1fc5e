"""One symbolic trace of one module in one mode: an `fx.Tracer` that cannot bake anything in.

`fx.Tracer` silently freezes whatever a forward computes without a proxy. Each of these would give a
wrong ticket, so each is either recorded in the graph or stops the trace of the module it is in:

1. factories (`torch.arange(n)`, `torch.rand(1)`) are recorded as calls;
2. buffers are read through `get_attr`; a tensor from anywhere else stops the trace;
3. setting an attribute of a traced value, which no node can stand for, stops it;
4. an operation under `no_grad` or another autocast state than the trace's own stops it, since a
   graph has no such regions;
5. Python's and numpy's random generators must not move.

A module in which the trace stops becomes a leaf: it is called, not looked into. The trace goes on,
so that one pass finds every such module; `trace_once` then starts again with all of them known.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from blockprune.errors import TraceError
from blockprune.tracing.calls import Binding, expect_constant, is_constant
from blockprune.tracing.conditions import condition_text, decided_by_types, expect_condition
from blockprune.tracing.copying import structural_copy
from blockprune.tracing.places import line_of

__all__ = ["Event", "Leaves", "Trace", "trace_once"]

_FACTORIES = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.normal,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.scalar_tensor,
        torch.tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)


@dataclasses.dataclass
class Leaves:
    """Modules of a region that are called and not looked into, with the reason of each.

    `decided`: conditions in the forward of the region itself, as text, and what they came to.
    """

    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    classes: dict[type[nn.Module], str] = dataclasses.field(default_factory=dict)
    decided: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a trace: a module is entered or left, or a node is recorded."""

    kind: str  # "enter", "exit" or "node"
    path: str = ""
    node: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Trace:
    """A graph, and the order in which modules and nodes came."""

    graph: fx.Graph
    events: tuple[Event, ...]


def trace_once(
    root: nn.Module, bindings: list[Binding], leaves: Leaves, *, train: bool, conditions: bool
) -> Trace:
    """Trace `root` in one mode, adding the modules that stop the trace to `leaves`.

    `conditions`: decide conditions on the types of tensors in the forward of `root` itself.

    Raises:
        TraceError: the forward of `root` itself stops the trace.
    """
    while True:
        tracer = _Tracer(bindings, leaves)
        # A forward may keep proxies in attributes, so each pass has modules of its own.
        module = structural_copy(root).train(train)
        before = _draws()
        try:
            with torch.enable_grad(), _RecordFactories(tracer):
                graph = tracer.trace(module)
        except Exception as error:
            if not (conditions and tracer.decide()):
                raise TraceError(_describe(error)) from error
            continue
        if _draws() != before:
            raise TraceError("draws from Python's or numpy's random generator in its forward")
        if not tracer.stopped:
            return Trace(graph, tuple(tracer.events))


class _RecordFactories(TorchFunctionMode):
    """Record calls that make tensors out of nothing, instead of freezing what they return."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, bindings: list[Binding], leaves: Leaves) -> None:
        super().__init__()
        self.bindings = bindings
        self.leaves = leaves
        self._undecided: tuple[str, fx.Node] | None = None
        self.stopped: dict[str, str] = {}
        self.events: list[Event] = []
        self._state_proxies: dict[int, fx.Proxy] = {}
        self._probes: dict[int, fx.Proxy] = {}

    # --- what a module call becomes -------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves.paths or type(m) in self.leaves.classes:
            return True
        if isinstance(m, fx.GraphModule):
            return True
        # A parametrized module has a class made for it, by torch.
        kind = parametrize.type_before_parametrizations(m)
        is_of_torch = kind.__module__.startswith(("torch.nn", "torch.ao"))
        if parametrize.is_parametrized(m):
            if not is_of_torch:
                self.leaves.paths[module_qualified_name] = "its weights are parametrized"
            return True
        if not is_of_torch:
            return False
        if isinstance(m, nn.Sequential):
            # An empty one is a way of writing the identity.
            return False
        # A torch.nn class that only arranges others (Sequential, TransformerEncoderLayer) is
        # looked into; one with weights of its own (Conv2d, MultiheadAttention) is one operation.
        return not m._modules or bool(m._parameters)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        mark, depth = len(self.events), len(self.module_stack)
        self.events.append(Event("enter", path))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._roll_back(mark, depth)
            self.stopped[path] = self.leaves.paths[path] = _describe(error)
            return super().call_module(m, forward, args, kwargs)
        self.events.append(Event("exit", path))
        return result

    def _roll_back(self, mark: int, depth: int) -> None:
        while len(self.module_stack) > depth:
            self.module_stack.popitem(last=True)
        for event in reversed(self.events[mark:]):
            if event.node is not None:
                self.graph.erase_node(event.node)
        del self.events[mark:]
        alive = set(self.graph.nodes)
        self._state_proxies = {k: p for k, p in self._state_proxies.items() if p.node in alive}

    # --- what a value becomes -------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _execution_state() != self._baseline:
            raise TraceError("changes the grad or autocast mode inside its forward")
        node = super().create_node(*args, **kwargs)
        self.events.append(Event("node", node=node))
        return node

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self._baseline = _execution_state()
        self._names = {
            id(tensor): name for name, tensor in (*root.named_buffers(), *root.named_parameters())
        }
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if isinstance(attr_val, Tensor) and id(attr_val) in self._names:
            return self._state_proxy(attr_val)
        return attr_val

    def to_bool(self, obj: fx.Proxy) -> bool:
        text = None if self.module_stack else condition_text(obj.node)
        if text is None:
            return super().to_bool(obj)
        if text not in self.leaves.decided:
            self._undecided = (text, obj.node)
            return super().to_bool(obj)
        value = self.leaves.decided[text]
        self.create_proxy("call_function", expect_condition, (text, obj, value), {})
        return value

    def decide(self) -> bool:
        """Decide the condition that stopped the trace; return whether types alone could.

        To be asked when the trace is over: while it lasts, no module can be called.
        """
        if self._undecided is None:
            return False
        arguments = {binding.name: binding.value for binding in self.bindings}
        text, condition = self._undecided
        value = decided_by_types(condition, structural_copy(self.root), arguments)
        if value is None:
            return False
        self.leaves.decided[text] = value
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) in self._probes:
            return self._probes[id(a)].node
        if isinstance(a, Tensor):
            if id(a) not in self._names:
                raise TraceError("uses a tensor that is neither an input, a parameter nor a buffer")
            return self._state_proxy(a).node
        if type(a) is OrderedDict:
            return self.create_node(
                "call_function", OrderedDict, (self.create_arg(list(a.items())),), {}
            )
        if isinstance(a, dict) and dataclasses.is_dataclass(a):
            given = {str(key): self.create_arg(value) for key, value in a.items()}
            return self.create_node("call_function", type(a), (), given)
        if (
            isinstance(a, dict)
            and type(a) is not dict
            and not isinstance(a, fx.immutable_collections.immutable_dict)
        ):
            raise TraceError(f"builds a {type(a).__name__}, which a graph cannot hold")
        return super().create_arg(a)

    def _state_proxy(self, tensor: Tensor) -> fx.Proxy:
        if id(tensor) not in self._state_proxies:
            name = self._names[id(tensor)]
            self._state_proxies[id(tensor)] = self.create_proxy("get_attr", name, (), {})
        return self._state_proxies[id(tensor)]

    # --- what an argument of the root becomes ---------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        with_default = False
        for binding in self.bindings:
            # A generated forward has no keyword-only marker, so order is all that counts.
            with_default = with_default or binding.default is not inspect.Parameter.empty
            if binding.kind is inspect.Parameter.VAR_POSITIONAL:
                proxy: Any = self.create_proxy("placeholder", f"*{binding.name}", (), {})
                values = enumerate(binding.value)
                positional.extend(self._item(proxy, index, value) for index, value in values)
                self._guard(f"len(*{binding.name})", self._length(proxy), len(binding.value))
            elif binding.kind is inspect.Parameter.VAR_KEYWORD:
                proxy = self.create_proxy("placeholder", f"**{binding.name}", (), {})
                values = binding.value.items()
                keywords.update({key: self._item(proxy, key, value) for key, value in values})
                self._guard(f"len(**{binding.name})", self._length(proxy), len(binding.value))
            else:
                if with_default and binding.default is inspect.Parameter.empty:
                    raise TraceError(f"has a required keyword-only argument {binding.name!r}")
                value = self._argument(binding)
                # As the call does: a decorator around the forward may tell these apart.
                if binding.given == "position":
                    positional.append(value)
                elif binding.given == "keyword" or not binding.is_constant:
                    keywords[binding.name] = value

        # `self.root.forward` and not `type(root).forward`: an instance may carry its own.
        return (lambda: self.root.forward(*positional, **keywords)), []

    def _argument(self, binding: Binding) -> Any:
        default = () if binding.default is inspect.Parameter.empty else (binding.default,)
        proxy = self.create_proxy("placeholder", binding.name, default, {})
        if binding.probe is not None:
            self._probes[id(binding.probe)] = proxy
            return binding.probe
        if not binding.is_constant:
            return proxy
        self._guard(binding.name, proxy, binding.value)
        return binding.value

    def _item(self, proxy: Any, key: Any, value: Any) -> Any:
        """Return one of the arguments in `*args` or `**kwargs`."""
        if not is_constant(value):
            return proxy[key]
        self._guard(str(key), proxy[key], value)
        return value

    def _length(self, proxy: Any) -> fx.Proxy:
        return self.create_proxy("call_function", len, (proxy,), {})

    def _guard(self, name: str, proxy: fx.Proxy, value: Any) -> None:
        self.create_proxy("call_function", expect_constant, (name, proxy, value), {})


class _Proxy(fx.Proxy):
    """A proxy that does not swallow what a forward writes into a value (an output object)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise TraceError(f"sets the attribute {name!r} of a value that it was given")
        super().__setattr__(name, value)


def _draws() -> tuple[Any, ...]:
    """Return the states of the generators that a symbolic trace cannot record."""
    _, keys, *rest = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), tuple(rest)


def _execution_state() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _describe(error: Exception) -> str:
    """Return why a trace stopped, with the line of the user's code that it stopped at."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    line = line_of(error)
    return message.split(". ")[0] + (f" (at {line})" if line else "")
