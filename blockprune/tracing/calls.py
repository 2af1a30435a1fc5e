"""How a module is called: example inputs, and the arguments that a trace binds.

A tensor argument becomes a placeholder. A plain constant (None, a number, a string) is bound to the
value it had in the example call, since a forward branches on such values; the placeholder stays, so
that the signature is the dense model's, and a guard refuses any other value later on.
Any other object (a cache, a configuration) passes through as it comes; since a forward may write
into it, each run of ours is given a copy of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import TraceError
from blockprune.tracing.places import line_of, module_of
from blockprune.tracing.values import TensorFact, holds_tensor, map_tensors, tensors_in

__all__ = [
    "Binding",
    "Call",
    "as_call",
    "bind",
    "constants_of",
    "copy_of_state",
    "is_constant",
    "refused",
]


_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, enum.Enum)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def described(self) -> Call:
        """Return the call with each tensor replaced by its `TensorFact`."""
        return self.map(TensorFact.of)

    def map(self, change: Any, kind: type = Tensor, *, copy_state: bool = True) -> Call:
        """Return the call with `change` applied to each tensor (or another `kind`).

        Objects that hold state of their own, such as caches, are copied unless told otherwise.
        """
        other = copy_of_state if copy_state else _as_it_is
        return Call(
            map_tensors(self.args, change, kind, other),
            {name: map_tensors(value, change, kind, other) for name, value in self.kwargs.items()},
        )


@dataclasses.dataclass(frozen=True)
class Binding:
    """One parameter of a forward: an argument of the graph, which may be bound to a constant.

    Attributes:
        name, kind, default: as in the signature.
        value: what the call gives it, else the default.
        given: how the call gives it: "position", "keyword", or "" where it does not.
        is_constant: whether the graph is bound to its value.
    """

    name: str
    kind: inspect._ParameterKind
    value: Any
    default: Any
    given: str
    is_constant: bool


def as_call(model: nn.Module, example_inputs: Any) -> Call:
    """Return example inputs (a Tensor, a tuple of arguments, a dict of keywords) as a `Call`.

    Raises:
        TraceError: another type, or arguments that the model's forward does not take.
    """
    if isinstance(example_inputs, Call):
        call = example_inputs
    elif isinstance(example_inputs, Tensor):
        call = Call((example_inputs,), {})
    elif isinstance(example_inputs, tuple):
        call = Call(example_inputs, {})
    elif isinstance(example_inputs, Mapping):
        call = Call((), dict(example_inputs))
    else:
        raise TraceError(
            "example_inputs must be a Tensor, a tuple of positional arguments or a dict of "
            f"keyword arguments; got {type(example_inputs).__name__}. A single argument that is "
            "itself a list goes into a tuple: example_inputs=(images,)."
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        if isinstance(example_inputs, Mapping):
            # A forward that takes one dictionary is given that dictionary.
            try:
                signature.bind(example_inputs)
                return Call((example_inputs,), {})
            except TypeError:
                pass
        raise TraceError(
            f"{type(model).__name__}.forward{signature} does not take the example inputs "
            f"({error}). Pass a Tensor, a tuple of positional arguments or a dict of keywords."
        ) from error
    return call


def bind(module: nn.Module, call: Call) -> list[Binding]:
    """Return the parameters of `module.forward` with what `call` gives each of them.

    Raises:
        TraceError: its signature is not what it is called by, as behind some decorators.
    """
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*call.args, **call.kwargs)
    except (TypeError, ValueError) as error:
        raise TraceError(f"its forward has a signature that cannot be bound ({error})") from error
    by_position = set(list(bound.arguments)[: len(call.args)])
    given = {name: "position" if name in by_position else "keyword" for name in bound.arguments}
    bound.apply_defaults()
    bindings = []
    for name, parameter in signature.parameters.items():
        value = bound.arguments[name]
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        bindings.append(
            Binding(
                name=name,
                kind=parameter.kind,
                value=value,
                default=parameter.default,
                given=given.get(name, ""),
                is_constant=not variadic and is_constant(value),
            )
        )
    return bindings


def is_constant(value: Any) -> bool:
    """Whether an argument is a plain constant, or a container of nothing else."""
    return _is_plain(value) and not holds_tensor(value) and not holds_tensor(value, TensorFact)


def refused(module: nn.Module, call: Call, error: Exception) -> TraceError:
    """Return the error for a module that does not run on a call, quoting its own."""
    given = (call.args, call.kwargs)
    found = [*tensors_in(given), *tensors_in(given, TensorFact)]
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found) or "(none)"
    reason = str(error).strip().partition("\n")[0]
    inside, line = module_of(error), line_of(error)
    where = (f" in module {inside!r}" if inside else "") + (f" at {line}" if line else "")
    return TraceError(
        f"{type(module).__name__} does not run on inputs of shape {shapes}: "
        f"{type(error).__name__}{where}: {reason}. "
        "Pass example_inputs that the model's own forward accepts."
    )


def constants_of(bindings: list[Binding]) -> list[tuple[str, Any]]:
    """Return what a trace under these bindings takes for granted, to compare two calls by."""
    fixed: list[tuple[str, Any]] = []
    for binding in bindings:
        if binding.is_constant:
            fixed.append((binding.name, binding.value))
        elif binding.kind is inspect.Parameter.VAR_POSITIONAL:
            fixed.append((binding.name, [_known(value) for value in binding.value]))
        elif binding.kind is inspect.Parameter.VAR_KEYWORD:
            named = sorted(binding.value.items())
            fixed.append((binding.name, [(key, _known(value)) for key, value in named]))
    return fixed


def _known(value: Any) -> Any:
    """Return a constant as it is, and one placeholder for whatever is none."""
    return value if is_constant(value) else ...


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return isinstance(value, _PLAIN)


def _as_it_is(value: Any) -> Any:
    return value


def copy_of_state(value: Any) -> Any:
    """Return a copy of an object that a forward may write into; anything else as it is."""
    if isinstance(value, (*_PLAIN, Tensor, TensorFact, nn.Module)):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        # A lock, a file, a generator: there is one, and all runs share it.
        return value
