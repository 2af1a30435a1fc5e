"""What a graph takes for granted of an argument, and the check of it.

A forward may ask anything of what it is given: whether it is None, of which type it is, how many
items it has and in which order, which number or text. None of it is seen in a recording. So an
argument has to be *like* that of the example: tensors may be others, numbers too where a graph
computes with them, and all else is the same. That is written down in plain tuples, which a graph
can hold as text:

- `("tensor",)`: any tensor;
- `("number", "int")`: any number of that type;
- `("given",)`: anything but None;
- `("any",)`: anything;
- `("same", value)`: that constant;
- `(type, keys, items)`: a container of that type, with a likeness for each item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blockprune.errors import TraceError
from blockprune.tracing.calls import is_constant
from blockprune.tracing.recorded import Built, Known

__all__ = ["expect_like", "likeness", "name_of"]

Likeness = tuple[Any, ...]

_NONE: Mapping[str, bool] = {}
_SLICE = ("start", "stop", "step")


def likeness(name: str, value: Any, free: Mapping[str, bool] = _NONE) -> Likeness:
    """Return what has to be true of an argument, from its encoded value in the example.

    `free`: names of arguments that are only handed on, which may also be keys of a `**kwargs`, to
    whether they may be None.

    Raises:
        TraceError: it holds an object that cannot be compared.
    """
    if isinstance(value, Known):
        return _of_known(name, value, free)
    if name in free:
        return ("any",)
    if is_constant(value) and not isinstance(value, dict):
        return ("same", value)
    kind = value.kind if isinstance(value, Built) else type(value)
    items = _items(value)
    if items is None:
        raise TraceError(f"is given a {kind.__name__} in {name!r}, of which a graph knows nothing")
    inner = (likeness(_part(name, key, kind), item, free) for key, item in items.items())
    return name_of(kind), tuple(items), tuple(inner)


def _of_known(name: str, known: Known, free: Mapping[str, bool]) -> Likeness:
    if free.get(name):
        return ("any",)
    if known.is_tensor:
        return ("tensor",)
    if type(known.fact) in (int, float):
        return "number", type(known.fact).__name__
    if name in free:
        return ("given",)
    raise TraceError(f"is given a {known.fact} in {name!r}, of which a graph knows nothing")


def expect_like(name: str, value: Any, like: Likeness) -> None:
    """Refuse an argument that is not like that of the example.

    Raises:
        TraceError: says what differs.
    """
    kind = like[0]
    if kind == "any":
        return
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise _refusal(name, f"a tensor as {name}", value)
    elif kind == "number":
        is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # While torch.jit traces, sizes are tensors.
        if not is_tracing and type(value).__name__ != like[1]:
            raise _refusal(name, f"a number of type {like[1]} as {name}", value)
    elif kind == "given":
        if value is None:
            raise _refusal(name, f"an object as {name}", value)
    elif kind == "same":
        expected = like[1]
        if isinstance(value, Tensor) or not (value is expected or value == expected):
            raise _refusal(name, f"{name}={expected!r}", value)
    else:
        _expect_items(name, value, like)


def _expect_items(name: str, value: Any, like: Likeness) -> None:
    kind, keys, inner = like
    if name_of(type(value)) != kind:
        raise _refusal(name, f"a {kind.rpartition('.')[2]} as {name}", value)
    items = _items(value) or {}
    if tuple(items) != keys:
        if isinstance(value, tuple | list):
            raise _refusal(name, f"{len(keys)} items in {name}", len(items), is_text=True)
        found, expected = (", ".join(map(repr, each)) or "nothing" for each in (items, keys))
        order = ", in that order" if set(items) == set(keys) else ""
        raise _refusal(name, f"{expected} in {name}{order}", found, is_text=True)
    for key, item, each in zip(keys, items.values(), inner, strict=True):
        expect_like(_part(name, key, type(value)), item, each)


def _items(value: Any) -> dict[Any, Any] | None:
    """Return the items of a container by key, None for anything else."""
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return value
    if isinstance(value, Built):
        return value.items
    if isinstance(value, slice):
        return {key: getattr(value, key) for key in _SLICE}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return None


def _part(name: str, key: Any, kind: type) -> str:
    """Return what an item of an argument is called."""
    if name.startswith("**"):
        return str(key)
    is_field = kind is slice or (dataclasses.is_dataclass(kind) and not issubclass(kind, dict))
    return f"{name}.{key}" if is_field else f"{name}[{key!r}]"


def name_of(value: Any) -> str:
    """Return the qualified name of a class or function; that of the class of anything else."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _refusal(name: str, expected: str, found: Any, *, is_text: bool = False) -> TraceError:
    if isinstance(found, Tensor):
        found = f"a tensor of shape {tuple(found.shape)}"
    elif not is_text:
        found = repr(found) if is_constant(found) else f"a {type(found).__name__}"
    return TraceError(
        f"this ticket was cut with {expected} and only knows that case; got {found}. "
        f"Cut it again with example_inputs that pass {name.lstrip('*')} as you call it here."
    )
