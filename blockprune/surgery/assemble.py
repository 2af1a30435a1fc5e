"""Putting graphs back into a model: regions become modules again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx, nn

__all__ = ["assemble", "graph_module"]


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


def graph_module(path: str, module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a `GraphModule` that runs `graph` with what it needs of `module`, modes kept."""
    result = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for name, part in result.named_modules():
        original = module.get_submodule(name)
        part.training = original.training
        for buffer in part._buffers:
            if buffer in original._non_persistent_buffers_set:
                part._non_persistent_buffers_set.add(buffer)
    return result
