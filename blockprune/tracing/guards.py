"""What a graph takes for granted, and refuses to go on without.

A graph knows one way through a forward. Where that way was chosen by something that the graph does
not compute, the graph holds a check, which raises a `TraceError` for a call that would have gone
another way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from blockprune.errors import TraceError
from blockprune.tracing.likeness import expect_like, name_of

__all__ = [
    "GUARDS",
    "InMode",
    "WithoutGrad",
    "by_mode",
    "expect_device",
    "expect_distinct",
    "expect_dtype",
    "expect_function",
    "expect_grad",
    "expect_rank",
    "expect_setting",
    "expect_size",
    "expect_state",
]


def expect_setting(name: str, value: Any, expected: Any) -> None:
    """Refuse a call for which the attribute `name` of a module has been changed.

    Raises:
        TraceError: the value differs.
    """
    if value != expected:
        raise TraceError(
            f"this ticket was cut with {name}={expected!r}, which its graph was computed with; got "
            f"{value!r}. Set it in the dense model and cut that again."
        )


def expect_function(name: str, value: Any, expected: str) -> None:
    """Refuse a call for which the attribute `name` of a module is another function.

    Raises:
        TraceError: it is.
    """
    expect_setting(name, name_of(value), expected)


def expect_size(
    text: str, value: Any, expected: Any, line: str, known: Sequence[Any], *sizes: Any
) -> None:
    """Refuse a call for which a size, or what was asked of `sizes`, is not what it was.

    `known`: the sizes that the graph was made with.

    Raises:
        TraceError: it differs.
    """
    # While torch.jit traces, sizes are tensors.
    is_tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not is_tracing and value != expected:
        raise TraceError(
            f"this ticket was cut where {text} is {expected!r}{_listed(known)} and only knows that "
            f"case; got {value!r}{_listed(sizes)}. The forward goes by it"
            f"{f' at {line}' if line else ''}. Cut it again with example_inputs like these."
        )


def _listed(sizes: Sequence[Any]) -> str:
    numbers = [str(size) for size in sizes if type(size) in (int, float)]
    return f" (of {', '.join(numbers)})" if numbers else ""


def expect_rank(name: str, value: Any, expected: int) -> None:
    """Refuse a tensor of another number of dimensions than the graph was made with.

    Raises:
        TraceError: it has more or fewer.
    """
    if isinstance(value, Tensor) and value.dim() != expected:
        raise TraceError(
            f"this ticket was cut with {name} of {expected} dimensions and only knows that case; "
            f"got one of shape {tuple(value.shape)}. Cut it again with example_inputs like these."
        )


def expect_dtype(value: Tensor, allowed: Collection[torch.dtype], line: str) -> None:
    """Refuse a call in which a tensor is of a dtype that the graph was not tried with.

    Raises:
        TraceError: it is of another.
    """
    if value.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TraceError(
            f"this ticket was cut where a tensor is {names} and only knows that case; got "
            f"{value.dtype}. The forward asks for it at {line}. Cut it again from a model, and "
            "with example_inputs, of that dtype."
        )


def expect_grad(value: Tensor, name: str, expected: bool, line: str) -> None:
    """Refuse a call in which something else holds of the gradient of a tensor (`requires_grad`).

    Raises:
        TraceError: it does.
    """
    if bool(getattr(value, name)) is not expected:
        raise TraceError(
            f"this ticket was cut where {name} of a tensor is {expected} and only knows that case. "
            f"The forward asks for it at {line}. Cut it again with example_inputs like these."
        )


def expect_device(value: Tensor, allowed: tuple[str, ...], line: str) -> None:
    """Refuse a call on a kind of device that was not tried.

    Raises:
        TraceError: it is on another.
    """
    if value.device.type not in allowed:
        known = " and ".join(map(repr, allowed))
        raise TraceError(
            f"this ticket only knows what the model does on {known}; got a tensor on "
            f"{value.device.type!r}. The forward asks for the device at {line}. Cut it again from "
            "a model, and with example_inputs, on that device."
        )


def expect_state(what: str, expected: bool, line: str) -> None:
    """Refuse a call under another grad, inference or autocast state than the graph was made under.

    Raises:
        TraceError: it is another.
    """
    if what == "grad":
        found = torch.is_grad_enabled()
    elif what == "inference":
        found = torch.is_inference_mode_enabled()
    else:
        found = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if found is not expected:
        raise TraceError(
            f"this ticket was cut with {what} {'on' if expected else 'off'} and only knows that "
            f"case. The forward asks for it{f' at {line}' if line else ''}. Call it the same way, "
            "or keep that module as it is with leaf_modules."
        )


def expect_distinct(one: str, other: str, a: Any, b: Any) -> None:
    """Refuse a call that passes one tensor for two arguments, where the forward tells them apart.

    Raises:
        TraceError: they are one.
    """
    if a is b and isinstance(a, Tensor):
        raise TraceError(
            f"this ticket was cut with two tensors as {one} and {other}, and its forward does "
            "something else where they are one tensor. Pass a copy, or cut it again with "
            "example_inputs that pass one."
        )


class WithoutGrad:
    """A function, or the name of a method of tensors, that is called without gradients."""

    __module__ = __name__

    def __init__(self, func: Callable[..., Any] | str) -> None:
        self.func = func
        self.__name__ = "without_grad"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        with torch.no_grad():
            if isinstance(self.func, str):
                return getattr(args[0], self.func)(*args[1:], **kwargs)
            return self.func(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithoutGrad) and other.func == self.func

    def __hash__(self) -> int:
        return hash(self.func)


class InMode:
    """A function, or the name of a method of tensors, that is called in one mode only.

    Called with the flag that tells the mode in front of its arguments, it returns None in the other
    mode.
    """

    __module__ = __name__

    def __init__(self, func: Callable[..., Any] | str, train: bool) -> None:
        self.func, self.train = func, train
        self.__name__ = "in_train_mode" if train else "in_eval_mode"

    def __call__(self, training: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, None in the other mode."""
        if training is not self.train:
            return None
        if isinstance(self.func, str):
            return getattr(args[0], self.func)(*args[1:], **kwargs)
        return self.func(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMode) and (other.func, other.train) == (self.func, self.train)

    def __hash__(self) -> int:
        return hash((self.func, self.train))


def by_mode(training: bool, in_eval: Any, in_train: Any) -> Any:
    """Return one of two values, as the mode is."""
    return in_train if training else in_eval


GUARDS = frozenset(
    {
        expect_device,
        expect_distinct,
        expect_dtype,
        expect_function,
        expect_grad,
        expect_like,
        expect_rank,
        expect_setting,
        expect_size,
        expect_state,
        InMode(expect_size, False),
        InMode(expect_size, True),
        torch._assert,
        torch._assert_async,
    }
)
"""Functions that return nothing and keep nothing alive."""

for _guard in GUARDS:
    has_side_effect(_guard)  # type: ignore[arg-type]
