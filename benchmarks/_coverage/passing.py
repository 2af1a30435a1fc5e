"""Layers of an eager model as pass-throughs: each still runs, and hands on what it was given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from blockprune.blocks import ResidualBlock

from .ancestry import Ancestry, read_by

__all__ = ["PassedThrough"]


class PassedThrough:
    """The modules that are these layer blocks hand an input on, while inside the context.

    It is the first input of the output's shape, unless that one went through parameters of the
    layer on its way from another: a module may be given both what it transforms and what it adds
    that to.
    """

    def __init__(self, model: nn.Module, layers: Iterable[ResidualBlock]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._reads = {
            model.get_submodule(layer.name): {id(parameters[name]) for name in layer.parameters}
            for layer in layers
        }
        self._given: list[list[Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PassedThrough:
        for module in self._reads:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the inputs; the module runs on copies of them, which it may overwrite."""
        given = [value for value in (*args, *kwargs.values()) if _is_activation(value)]
        self._given.append(given)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), (args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        result = next(filter(_is_activation, pytree.tree_leaves(output)), None)
        given = [
            value
            for value in self._given.pop()
            if result is not None and value.shape == result.shape
        ]
        if not given:
            raise TypeError(f"{type(module).__name__} is given nothing that it could pass on")
        return _with_first(output, _passed_on(given, self._reads[module]))


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.is_floating_point(value)


def _passed_on(given: Sequence[Tensor], parameters: set[int]) -> Tensor:
    """Return the first tensor that was not made from another one by the layer's parameters."""
    ancestries = [Ancestry([value]) for value in given]
    for value, mine in zip(given, ancestries, strict=True):
        others = [other for other in ancestries if other is not mine]
        if not any(read_by(mine.computed() - other.nodes) & parameters for other in others):
            return value
    return given[0]


def _with_first(output: Any, value: Tensor) -> Any:
    """Return the output with its first activation exchanged for `value`."""
    leaves, spec = pytree.tree_flatten(output)
    place = next(index for index, leaf in enumerate(leaves) if _is_activation(leaf))
    return pytree.tree_unflatten([*leaves[:place], value, *leaves[place + 1 :]], spec)
