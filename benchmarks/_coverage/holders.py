"""Tensors held by objects that are no tensors, such as the cache that a decoder returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["Entry", "entries_of", "is_holder"]

Entry = dict[str, Tensor]
"""The tensors that one object within a holder holds itself, by name."""


def is_holder(value: Any) -> bool:
    """Whether a leaf of an output is an object whose tensors have to be looked for."""
    return hasattr(value, "__dict__") and not isinstance(value, Tensor | type)


def entries_of(value: Any) -> list[tuple[str, Entry]]:
    """Return what holds tensors within an object, in order, with the way to it."""
    entries: dict[str, Entry] = {}
    for path, tensor in _walk("", value, set()):
        parent, _, name = path.rpartition(".")
        entries.setdefault(parent, {})[name] = tensor
    return list(entries.items())


def _walk(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value.detach()
        return
    if id(value) in seen:
        return
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif is_holder(value):
        items = list(vars(value).items())
    else:
        return
    seen.add(id(value))
    for name, item in items:
        yield from _walk(f"{path}.{name}".lstrip("."), item, seen)
