"""The module that a region's graph becomes in a ticket."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

__all__ = ["graph_module"]


def graph_module(path: str, module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a `GraphModule` that runs `graph` with what it needs of `module`, modes kept.

    Code around a region inside a model may ask its module for more than a call (`layer.attention.
    batch_first`). Such a region keeps the plain attributes of `module`, and those of each child
    that went, as plain values: no module and no weight stays behind.
    """
    result = fx.GraphModule(module, graph, class_name=type(module).__name__)
    if path:
        _keep_attributes(module, result)
    for name, part in result.named_modules():
        original = module.get_submodule(name)
        part.training = original.training
        for buffer in part._buffers:
            if buffer in original._non_persistent_buffers_set:
                part._non_persistent_buffers_set.add(buffer)
    return result


def _keep_attributes(module: nn.Module, result: fx.GraphModule) -> None:
    kept = {
        name: value for name, value in vars(_outline(module)).items() if not hasattr(result, name)
    }
    # Under this key a deep copy of a GraphModule takes attributes along.
    result.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = kept
    for name, value in kept.items():
        setattr(result, name, value)


def _outline(module: nn.Module) -> SimpleNamespace:
    """Return what a module's own code has set on it: children as outlines, tensors as None."""
    outline = SimpleNamespace()
    for name, value in vars(module).items():
        if name not in vars(nn.Module()) and not isinstance(value, Tensor) and not callable(value):
            setattr(outline, name, value)
    for name in (*module._parameters, *module._buffers):
        setattr(outline, name, None)
    for name, child in module.named_children():
        setattr(outline, name, _outline(child))
    return outline
