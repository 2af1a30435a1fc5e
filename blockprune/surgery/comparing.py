"""Comparing two computations of one function: outputs, buffers, gradients.

Numbers may differ by a few units in the last place, which is what another order of summation gives.
Of numbers in half precision that would be some percent, and a wrong ticket could pass: where a
network has such, its numbers are to be equal first, and are compared in float64 where they are not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.tracing import Call, storage_of, tensors_in

__all__ = [
    "SEED",
    "Differs",
    "Outcome",
    "compare",
    "compare_outcomes",
    "fresh",
    "given_back",
    "gradients_of",
    "is_coarse",
    "snapshot",
]

SEED = 20240229
OUTPUT_ULPS = 4.0
GRADIENT_ULPS = 32.0
COARSE = 1e-5


class Differs(Exception):
    """Two computations differ; says how.

    Attributes:
        may_be_rounding: finite numbers alone differ, so that more precision may be the end of it.
        is_of_outputs: it is not in a gradient or a buffer alone.
    """

    def __init__(self, what: str, *, may_be_rounding: bool = False, is_of_outputs: bool = True):
        super().__init__(what)
        self.may_be_rounding = may_be_rounding
        self.is_of_outputs = is_of_outputs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one run of a model.

    Attributes:
        outputs: what it returned, and what the modules that were listened to returned.
        buffers: as the run left them, by name.
        gradients: of a fixed random projection of the outputs, by the name of the parameter; None
            where there was no backward pass.
        given: numbers of the tensors it returned that lie in the memory of an input.
    """

    outputs: Any
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None
    given: frozenset[int] = frozenset()


def fresh(call: Call) -> Call:
    """Return the call with tensors of its own: a forward may write into its inputs."""
    return call.map(lambda tensor: tensor.detach().clone())


def given_back(outputs: Any, call: Call) -> frozenset[int]:
    """Return the numbers of the outputs that lie in the memory of an argument."""
    inputs = {_address(tensor) for tensor in tensors_in((call.args, call.kwargs))} - {0}
    return frozenset(
        i for i, tensor in enumerate(tensors_in(outputs)) if _address(tensor) in inputs
    )


def _address(tensor: Tensor) -> int:
    storage = storage_of(tensor)
    return 0 if storage is None else storage.data_ptr()


def snapshot(value: Any) -> Any:
    """Return the value with tensors that a later in-place operation cannot reach."""
    return fresh(Call((value,), {})).args[0]


def is_coarse(module: nn.Module) -> bool:
    """Whether a module has numbers of so few digits that their last place says little."""
    tensors = (*module.parameters(), *module.buffers())
    return any(t.is_floating_point() and torch.finfo(t.dtype).eps > COARSE for t in tensors)


def compare_outcomes(
    found: Outcome, expected: Outcome, names: Callable[[str], str], room: float
) -> None:
    """Compare what came of two models; what only the second has is not looked at.

    Args:
        found, expected: of the two models.
        names: turns a name of the first into the name in the second.
        room: how many times a few units in the last place numbers may differ.

    Raises:
        Differs: names the first difference.
    """
    compare(found.outputs, expected.outputs, room)
    if found.given - expected.given:
        raise Differs("what it returns is an input itself, or lies in the memory of one")
    for name, buffer in found.buffers.items():
        wanted = expected.buffers.get(names(name))
        if wanted is not None:
            _compare_behind(f"the buffer {name!r}", buffer, wanted, room * OUTPUT_ULPS)
    if expected.gradients is None:
        return
    scale: float | None = None
    for name, gradient in (found.gradients or {}).items():
        wanted = expected.gradients.get(names(name), torch.zeros_like(gradient))
        if scale is None and not torch.equal(gradient, wanted):
            # A gradient may be zero but for rounding (a bias before batch normalisation), and
            # rounding is that of the whole backward pass.
            scale = max((_largest(_finite(g)) for g in expected.gradients.values()), default=0.0)
        what = f"the gradient of {name!r}"
        _compare_behind(what, gradient, wanted, room * GRADIENT_ULPS, scale)


def compare(found: Any, expected: Any, room: float = 1.0) -> None:
    """Compare two nested values: types, tensors, and the numbers and texts beside them.

    Raises:
        Differs: says what is different first.
    """
    one, other = _outline(found), _outline(expected)
    if one != other:
        raise Differs(f"it gives {one} instead of {other}")
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        _compare_tensors(a, b, room * OUTPUT_ULPS)


def _compare_behind(what: str, found: Tensor, expected: Tensor, *bounds: Any) -> None:
    try:
        _compare_tensors(found, expected, *bounds)
    except Differs as error:
        text = f"{what} differs: {error}"
        rounding = error.may_be_rounding
        raise Differs(text, may_be_rounding=rounding, is_of_outputs=False) from None


def _compare_tensors(a: Tensor, b: Tensor, ulps: float, scale: float | None = None) -> None:
    """Let numbers differ by `ulps` units in the last place of `scale`, else of the largest one.

    In float64 a thousand times that is still nothing that a wrong ticket would pass.
    """
    a, b = _dense(a), _dense(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Differs(f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}")
    if b.is_meta or torch.equal(a, b):
        return  # a tensor of the meta device has a shape and no values
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        raise Differs(f"{int((a != b).sum())} elements of a {a.dtype} tensor differ")
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
        raise Differs("infinities or NaNs at other places")
    size = _largest(b[finite]) if scale is None else scale
    gap = _largest((a - b)[finite])
    room = 1000.0 if b.dtype == torch.float64 else 1.0
    # Not "gap > bound": a NaN where the reference is finite must not pass.
    if not gap <= room * ulps * torch.finfo(b.dtype).eps * size:
        text = f"largest difference {gap:.3g} on values up to {size:.3g}"
        raise Differs(text, may_be_rounding=math.isfinite(gap))


def _outline(value: Any) -> Any:
    """Return the types in a nested value, and the numbers and texts beside its tensors."""
    if isinstance(value, Tensor):
        return "Tensor"
    # NaN is not equal to itself.
    if isinstance(value, bool | int | str) or (isinstance(value, float) and value == value):
        return value
    name = type(value).__name__.removeprefix("immutable_")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return name, {key: _outline(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return name, [_outline(item) for item in value]
    return name


def _dense(tensor: Tensor) -> Tensor:
    # Embeddings may have sparse gradients, which little can be done with.
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _finite(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor[tensor.isfinite()]


def _largest(tensor: Tensor) -> float:
    has_values = tensor.numel() and not tensor.is_meta
    return float(tensor.detach().abs().max()) if has_values else 0.0


def gradients_of(outputs: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of a fixed random projection of the outputs, by name of parameter.

    It is zero where nothing of a parameter reaches the outputs.
    """
    heads = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    # A tied weight has several names, and the ticket may have lost the first of them.
    every = module.named_parameters(remove_duplicate=False)
    named = {name: parameter for name, parameter in every if parameter.requires_grad}
    if not (heads and named):
        return {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    generator = torch.Generator().manual_seed(SEED)
    cotangents = [
        torch.rand(t.shape, generator=generator).to(device=t.device, dtype=t.dtype) - 0.5
        for t in heads
    ]
    found = torch.autograd.grad(heads, list(named.values()), cotangents, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else _dense(gradient)
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }
