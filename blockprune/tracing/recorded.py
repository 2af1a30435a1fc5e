"""What a recording is made of: values that are known by their origin, steps and invocations."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from blockprune.tracing.calls import Call
from blockprune.tracing.values import TensorFact, like_tuple

__all__ = [
    "Argument",
    "Attribute",
    "Built",
    "Event",
    "Field",
    "Invocation",
    "Known",
    "Memory",
    "Origin",
    "Recording",
    "Step",
    "decoded",
    "knowns",
    "paired",
]

Memory = frozenset[int]
"""Storages, by numbers that no two of one recording share."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Where a parameter or buffer comes from: its qualified name in the recorded model."""

    name: str


@dataclasses.dataclass(frozen=True)
class Argument:
    """Where an argument of the recorded model comes from: its place in the call."""

    name: str


@dataclasses.dataclass(frozen=True)
class Field:
    """A key: the field of a dataclass."""

    name: str


Origin = tuple[Any, tuple[Any, ...]]
"""A step, invocation, attribute or argument, and the keys that lead to an item of its value."""


@dataclasses.dataclass(eq=False)
class Known:
    """A tensor, size, device or object of the run, and where it can be had from, oldest first.

    Attributes:
        fact: a `TensorFact`, a number, or the name of the class of an object.
        memory: the storages that a tensor lies in.
        active: whether it depends on an argument of the model.
        counted: whether its shape may depend on the numbers in a tensor.
        same_as: what an invocation that returned one of its arguments was given.
    """

    fact: Any = None
    memory: Memory = frozenset()
    origins: list[Origin] = dataclasses.field(default_factory=list)
    active: bool = False
    counted: bool = False
    same_as: Known | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether it is one."""
        return isinstance(self.fact, TensorFact)


@dataclasses.dataclass(frozen=True)
class Built:
    """An object that is made anew by calling its class: a dataclass, an output of a library."""

    kind: type
    items: dict[str, Any]


@dataclasses.dataclass(eq=False)
class Event:
    """What a step and an invocation have in common; nested values hold `Known`s.

    Attributes:
        within: the invocation that it was recorded in.
        result: what it returned.
        written: the memory that it wrote into.
    """

    within: Invocation | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    result: Any = None
    written: Memory = frozenset()


@dataclasses.dataclass(eq=False)
class Step(Event):
    """A call of a function.

    Attributes:
        kind: "call", "read" (of a dtype or device), "state" (of grad or autocast is asked for) or
            "leave" (what `result` is goes out to Python).
        func: the function, or the name of what is read.
        text: for messages: what left the record.
        line: of the user's code, where something left the record.
        no_grad: whether it ran without gradients where the model around it has them.
        merges: whether it adds two tensors of one shape that depend on the arguments, and are no
            whole numbers.
    """

    kind: str = "call"
    func: Any = None
    text: str = ""
    line: str = ""
    no_grad: bool = False
    merges: bool = False


@dataclasses.dataclass(eq=False)
class Invocation(Event):
    """A call of a module.

    Attributes:
        path: of the module in the recorded model.
        key: of the call, `path@k` for a repeated one.
        kind: class of the module.
        is_leaf: whether it is one operation whatever happens, and was not looked into.
        call: the arguments as they were, tensors as `TensorFact`s.
        events: what was recorded within, in order.
        given: while it runs, the tensors among its arguments, and their versions.
        grad, autocast, saving: whether gradients are on where it is called, for which devices
            autocast is, and the hooks under which autograd saves tensors.
    """

    path: str = ""
    key: str = ""
    kind: type[nn.Module] = nn.Module
    is_leaf: bool = False
    call: Call | None = None
    events: list[Step | Invocation] = dataclasses.field(default_factory=list)
    given: list[tuple[Tensor, int]] = dataclasses.field(default_factory=list)
    grad: bool = True
    autocast: tuple[bool, ...] = ()
    saving: Any = None

    def invocations(self) -> Iterator[Invocation]:
        """Yield it, and all within."""
        yield self
        for event in self.events:
            if isinstance(event, Invocation):
                yield from event.invocations()


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one run of a model has shown.

    Attributes:
        top: the call of the model itself.
        stopped: path of a module to what in its own forward a graph cannot hold.
        output: the tensors returned, where asked for.
    """

    top: Invocation
    stopped: dict[str, str]
    output: list[Tensor]


def knowns(value: Any) -> Iterator[Known]:
    """Yield the `Known`s in an encoded value."""
    if isinstance(value, Known):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from knowns(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from knowns(item)
    elif isinstance(value, Built):
        yield from knowns(value.items)
    elif isinstance(value, slice):
        yield from knowns((value.start, value.stop, value.step))


def decoded(value: Any, given: Mapping[int, Any]) -> Any:
    """Return an encoded value with tensors that look like those in it; objects are lost.

    `given`: what to use for a `Known` that was handed through, by identity.
    """
    if isinstance(value, Known):
        if id(value.same_as) in given:
            return given[id(value.same_as)]
        if value.is_tensor:
            return value.fact.example()
        return None if isinstance(value.fact, str) else value.fact
    if isinstance(value, Built):
        items = {key: decoded(item, given) for key, item in value.items.items()}
        return OrderedDict(items) if value.kind is OrderedDict else value.kind(**items)
    if isinstance(value, tuple):
        return like_tuple(value, (decoded(item, given) for item in value))
    if isinstance(value, list):
        return [decoded(item, given) for item in value]
    if isinstance(value, dict):
        return {key: decoded(item, given) for key, item in value.items()}
    return value


def paired(encoded: Any, value: Any) -> Iterator[tuple[Known, Any]]:
    """Yield each `Known` in an encoded value with what stands in its place in another value."""
    if isinstance(encoded, Known):
        yield encoded, value
    elif isinstance(encoded, tuple | list) and isinstance(value, tuple | list):
        for one, other in zip(encoded, value, strict=False):
            yield from paired(one, other)
    elif isinstance(encoded, dict) and isinstance(value, dict):
        for key in encoded.keys() & value.keys():
            yield from paired(encoded[key], value[key])
