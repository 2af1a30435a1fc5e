"""Values that flow along a traced graph, and the few walks over nested ones that we need.

A forward passes tensors about in tuples, lists, dictionaries, named tuples and dataclasses.
`map_tensors` and `tensors_in` see all of these; everything else is left as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict

__all__ = ["TensorFact", "holds_tensor", "like_tuple", "map_tensors", "storage_of", "tensors_in"]


@dataclasses.dataclass(frozen=True)
class TensorFact:
    """What is known of a tensor without its numbers: shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorFact:
        return cls(tuple(int(size) for size in tensor.shape), tensor.dtype, tensor.device)

    def example(self) -> Tensor:
        """Return a tensor of this description: uniform in [0, 1), or zeros for integers.

        Equal descriptions give equal tensors, and torch's own generator stays as it is.
        """
        if self.dtype.is_floating_point:
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(self.shape, generator=generator)
            return noise.to(device=self.device, dtype=self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def like_tuple(value: tuple[Any, ...], items: Iterable[Any]) -> Any:
    """Return a tuple of items; a named one, of the same class, where `value` is one."""
    kind: Any = type(value)
    # `_make` asks nothing of the items, as the class of a packed sequence does.
    return kind._make(items) if hasattr(value, "_fields") else tuple(items)


def map_tensors(
    value: Any,
    change: Callable[[Any], Any],
    kind: type = Tensor,
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Return `value` with each instance of `kind` in it replaced; containers keep their type.

    `other` is applied to whatever is neither a `kind` nor a container.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return like_tuple(value, (map_tensors(item, change, kind, other) for item in value))
    if isinstance(value, list):
        return [map_tensors(item, change, kind, other) for item in value]
    if isinstance(value, dict):
        named = {key: map_tensors(item, change, kind, other) for key, item in value.items()}
        return named if type(value) in (dict, immutable_dict) else _with_items(value, named)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | TensorFact):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(getattr(value, field.name), change, kind, other)
            object.__setattr__(changed, field.name, item)
        return changed
    return other(value)


def _with_items(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Return a copy of a dictionary of some class of its own (an output of transformers)."""
    changed = copy.copy(value)
    for key, item in items.items():
        changed[key] = item
    return changed


def tensors_in(value: Any, kind: type = Tensor) -> Iterator[Any]:
    """Yield each instance of `kind` in a nested value, in order."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, kind)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, kind)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | TensorFact):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), kind)


def holds_tensor(value: Any, kind: type = Tensor) -> bool:
    """Whether a nested value has a tensor (or another `kind`) in it."""
    return next(tensors_in(value, kind), None) is not None


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a tensor, None where no view could share it (sparse layouts)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
