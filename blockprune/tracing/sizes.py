"""Sizes that remember how they were computed.

While a model is recorded, `x.shape[0]` is a `SizeInt`: a number for whoever looks (`isinstance(n,
int)` holds), whose arithmetic is written down, so that a graph computes it anew for other inputs.
What only Python can use (a condition, an index, a key, `range(n)`, `int(n)`) leaves the record: the
number is handed out, and the recorder told, which then holds the graph to it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from blockprune.tracing.places import makes_message
from blockprune.tracing.values import like_tuple

__all__ = ["SIZES", "SizeFloat", "SizeInt", "plain", "same_size", "sized"]


class _Recorder(Protocol):
    are_sizes_kept: bool

    def compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], value: Any, text: str
    ) -> Any:
        """Write down a computation with sizes; return its value as a size."""

    def leave(self, func: Callable[..., Any], args: tuple[Any, ...], value: Any, text: str) -> Any:
        """Write down that a forward goes on with the plain `value`; return it."""


class _Node:
    """What torch asks of the node behind a `SymInt` where one reaches it unseen: a constant."""

    def __init__(self, size: Any) -> None:
        self.size = size

    def guard_int(self, *_: Any) -> int:
        return int(self.size)

    def guard_float(self, *_: Any) -> float:
        return float(self.size)

    int_ = guard_int

    def maybe_as_int(self) -> int:
        return int(self.size)

    def is_int(self) -> bool:
        return isinstance(self.size, torch.SymInt)

    def is_float(self) -> bool:
        return not self.is_int()

    def is_bool(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return True

    def has_hint(self) -> bool:
        return True


class _Size:
    """The arithmetic that `SizeInt` and `SizeFloat` share.

    Attributes:
        value: the number.
        text: how it came about, for messages.
        known: what the recorder knows it by.
        recorder: who writes down what is computed with it.
    """

    value: Any
    text: str
    known: Any
    recorder: _Recorder

    def __init__(self, value: Any, text: str, known: Any, recorder: _Recorder) -> None:
        self.value, self.text, self.known, self.recorder = value, text, known, recorder
        self.node = _Node(self)

    def _leave(self, func: Callable[..., Any], text: str) -> Any:
        return self.recorder.leave(func, (self,), func(self.value), text.format(self.text))

    def __index__(self) -> int:
        return int(self._leave(operator.index, "{}"))

    def __int__(self) -> int:
        return int(self._leave(int, "int({})"))

    def __float__(self) -> float:
        return float(self._leave(float, "{}"))

    def __bool__(self) -> bool:
        return bool(self._leave(bool, "bool({})"))

    def __hash__(self) -> int:
        self.recorder.are_sizes_kept = True
        return hash(self._leave(same_size, "{}"))

    def __round__(self, digits: int | None = None) -> Any:
        rounded = round(self.value, digits)
        return self.recorder.leave(round, (self, digits), rounded, f"round({self.text})")

    def __ceil__(self) -> Any:
        return self.recorder.compute(
            math.ceil, (self,), math.ceil(self.value), f"ceil({self.text})"
        )

    def __floor__(self) -> Any:
        value = math.floor(self.value)
        return self.recorder.compute(math.floor, (self,), value, f"floor({self.text})")

    def __trunc__(self) -> Any:
        return self._leave(math.trunc, "int({})")

    def __format__(self, spec: str) -> str:
        return format(self.value if makes_message() else self._leave(same_size, "{}"), spec)

    def __str__(self) -> str:
        return format(self, "")

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> Any:
        return same_size, (self._leave(same_size, "{}"),)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __copy__(self) -> Any:
        return self

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __pos__(self) -> Any:
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._leave(same_size, "{}"), dtype)

    def is_integer(self) -> bool:
        return bool(self._leave(_is_whole, "{} is whole"))


class SizeInt(_Size, torch.SymInt):  # type: ignore[misc]
    """A whole number read from the shape of a tensor, or computed from such."""

    __class__ = property(lambda self: int)
    __hash__ = _Size.__hash__
    __index__ = _Size.__index__


class SizeFloat(_Size, torch.SymFloat):  # type: ignore[misc]
    """A number with a fraction, computed from sizes."""

    __class__ = property(lambda self: float)
    __hash__ = _Size.__hash__
    __index__ = None  # type: ignore[assignment]


SIZES = (SizeInt, SizeFloat)


def same_size(value: Any) -> Any:
    """Return the number as it is: what a size is, where it leaves the record."""
    return value


def _is_whole(value: Any) -> bool:
    return bool(value == int(value))


def plain(value: Any) -> Any:
    """Return a nested value with each size replaced by its number."""
    kind = type(value)
    if kind is SizeInt or kind is SizeFloat:
        return value.value
    if kind is torch.Size:
        return torch.Size([plain(item) for item in value])
    if kind is list:
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return like_tuple(value, (plain(item) for item in value))
    if kind is dict:
        return {key: plain(item) for key, item in value.items()}
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def sized(value: Any, text: str, known: Any, recorder: _Recorder) -> Any:
    """Return a number as a size; anything else as it is."""
    kind = {int: SizeInt, float: SizeFloat}.get(type(value))
    return value if kind is None else kind(value, text, known, recorder)


def _arithmetic(name: str, func: Callable[..., Any], sign: str) -> None:
    def forward(self: _Size, other: Any) -> Any:
        return _binary(self, func, (self, other), sign)

    def reflected(self: _Size, other: Any) -> Any:
        return _binary(self, func, (other, self), sign)

    for kind in SIZES:
        setattr(kind, f"__{name}__", forward)
        setattr(kind, f"__r{name}__", reflected)


def _comparison(name: str, func: Callable[..., Any], sign: str) -> None:
    def compare(self: _Size, other: Any) -> Any:
        value = plain(other)
        if not isinstance(value, int | float):
            return NotImplemented
        text = f"{self.text} {sign} {_text(other)}"
        return self.recorder.leave(func, (self, other), func(self.value, value), text)

    for kind in SIZES:
        setattr(kind, f"__{name}__", compare)


def _unary(name: str, func: Callable[..., Any], sign: str) -> None:
    def compute(self: _Size) -> Any:
        text = f"{sign}({self.text})"
        return self.recorder.compute(func, (self,), func(self.value), text)

    for kind in SIZES:
        setattr(kind, f"__{name}__", compute)


def _binary(size: _Size, func: Callable[..., Any], operands: tuple[Any, Any], sign: str) -> Any:
    if any(isinstance(operand, list | tuple | str) for operand in operands):
        # A sequence repeated, or a text with a size in it, is Python's own.
        return func(*(operator.index(o) if type(o) in SIZES else o for o in operands))
    values = [plain(operand) for operand in operands]
    if not all(isinstance(value, int | float) for value in values):
        return NotImplemented
    text = f"({_text(operands[0])} {sign} {_text(operands[1])})"
    return size.recorder.compute(func, operands, func(*values), text)


def _text(value: Any) -> str:
    return value.text if type(value) in SIZES else repr(value)


for _name, _func, _sign in (
    ("add", operator.add, "+"),
    ("sub", operator.sub, "-"),
    ("mul", operator.mul, "*"),
    ("floordiv", operator.floordiv, "//"),
    ("truediv", operator.truediv, "/"),
    ("mod", operator.mod, "%"),
    ("pow", operator.pow, "**"),
    ("and", operator.and_, "&"),
    ("or", operator.or_, "|"),
    ("xor", operator.xor, "^"),
    ("lshift", operator.lshift, "<<"),
    ("rshift", operator.rshift, ">>"),
):
    _arithmetic(_name, _func, _sign)
for _name, _func, _sign in (
    ("eq", operator.eq, "=="),
    ("ne", operator.ne, "!="),
    ("lt", operator.lt, "<"),
    ("le", operator.le, "<="),
    ("gt", operator.gt, ">"),
    ("ge", operator.ge, ">="),
):
    _comparison(_name, _func, _sign)
_unary("neg", operator.neg, "-")
_unary("abs", operator.abs, "abs")
_unary("invert", operator.invert, "~")
