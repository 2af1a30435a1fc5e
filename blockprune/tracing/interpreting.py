"""An `fx.Interpreter` that is called the way the traced module was."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict

from blockprune.tracing.calls import Call

__all__ = ["CallInterpreter", "bound_values"]


class CallInterpreter(fx.Interpreter):
    """Interpret a graph on a `Call`: placeholders are bound by name, `*args` and defaults too."""

    def run_call(self, call: Call) -> Any:
        """Return what the graph returns for this call."""
        self._bound = bound_values(self.graph, call)
        return self.run(enable_io_processing=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # A graph keeps lists immutable; the function it calls may write into its own.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(args), _thawed(kwargs)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._bound[target]


def _thawed(value: Any) -> Any:
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: _thawed(item) for key, item in value.items()}
    return value


def bound_values(graph: fx.Graph, call: Call) -> dict[str, Any]:
    """Return what each placeholder of `graph` stands for in a call, by its target."""
    positional, keywords = list(call.args), dict(call.kwargs)
    bound: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            bound[name] = keywords
        elif name.startswith("*"):
            bound[name], positional = tuple(positional), []
        elif positional:
            bound[name] = positional.pop(0)
        elif name in keywords:
            bound[name] = keywords.pop(name)
        else:
            bound[name] = node.args[0]
    return bound
