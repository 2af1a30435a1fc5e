"""One eager run of a model, watched: what each module is called with, and which add tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.tracing.calls import Call, refused
from blockprune.tracing.copying import structural_copy

__all__ = ["record_calls"]

_ADDITIONS = frozenset({"__add__", "__iadd__", "__radd__", "add", "add_"})


def record_calls(root: nn.Module, call: Call) -> tuple[dict[str, tuple[int, list[Call]]], set[str]]:
    """Run `root` once in eval mode; return what is called with what, and where tensors are added.

    That is each module's place in the order with its calls, and the modules in whose own code two
    tensors of one shape were added.

    The run is a real one: an object that is handed from module to module, such as a cache, then
    holds real tensors, and each module's copy of it is as that module found it.
    """
    root = structural_copy(root).eval()
    fresh = call.map(lambda tensor: tensor.detach().clone())
    calls: dict[str, tuple[int, list[Call]]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, (len(calls), []))[1].append(Call(args, kwargs).described())

        return hook

    adds = _Adds()
    for name, module in root.named_modules():
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        module.register_forward_pre_hook(adds.enter(name))
        module.register_forward_hook(adds.leave, always_call=True)
    try:
        with torch.no_grad(), adds:
            root(*fresh.args, **fresh.kwargs)
    except Exception as error:
        raise refused(root, call, error) from error
    return calls, adds.paths


class _Adds(TorchFunctionMode):
    """Notes the modules in whose own code two tensors of one shape are added."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: set[str] = set()
        self._open: list[str] = []

    def enter(self, path: str) -> Any:
        return lambda module, args: self._open.append(path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        shapes = [argument.shape for argument in args[:2] if isinstance(argument, Tensor)]
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS and len(shapes) == 2 and shapes[0] == shapes[1] and self._open:
            self.paths.add(self._open[-1])
        return func(*args, **(kwargs or {}))
