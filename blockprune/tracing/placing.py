"""Putting graphs in the place of the modules they were traced from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from blockprune.tracing.calls import Call
from blockprune.tracing.interpreting import CallInterpreter

__all__ = ["Followed", "assemble"]


class Followed(nn.Module):
    """A module that follows a graph of itself node by node, as `interpreter` does."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        interpreter: Callable[..., CallInterpreter] = CallInterpreter,
    ) -> None:
        super().__init__()
        self.module = module
        self.graph = graph
        self.interpreter = interpreter

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Code around the module may ask what it is.
        return type(self._modules["module"]) if "module" in self._modules else type(self)

    def __getattr__(self, name: str) -> Any:
        # Code around the module may ask it for more than a call.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.interpreter(self.module, graph=self.graph).run_call(Call(args, kwargs))


def assemble(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    build: Callable[[str, nn.Module, fx.Graph], nn.Module],
) -> nn.Module:
    """Return `model`, which is changed, with the module at each path rebuilt from its graph.

    Inner paths go first, so that an outer graph that calls a leaf finds it rebuilt already.
    """
    for path in sorted(graphs, key=lambda path: path.count(".") + bool(path), reverse=True):
        old = model.get_submodule(path)
        new = build(path, old, graphs[path])
        if path == "":
            return new
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return model
