"""Forwards that write into their own weights (max_norm, clamped weights)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blockprune.tracing.values import storage_of, tensors_in

__all__ = ["WritesWeights", "weights_protected"]


class WritesWeights(Exception):
    """An operation was about to write into a weight that is not the copy's own."""


class weights_protected(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise `WritesWeights` before an operation writes into the memory of one of these tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = [storage_of(tensor) for tensor in tensors]
        self._protected = {storage._cdata for storage in self._held if storage is not None}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema  # type: ignore[attr-defined]
        if schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                self._check(argument, value)
            for argument in schema.arguments:
                self._check(argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _check(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata in self._protected:
                raise WritesWeights
