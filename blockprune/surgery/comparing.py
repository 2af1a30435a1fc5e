"""Comparing two computations of one function: types, outputs, buffers, gradients.

Numbers may differ by a few units in the last place, which is what another order of summation gives.
Of numbers in half precision that would be some percent, and a wrong ticket could pass: where a
network has such, its numbers are to be equal first, and are compared in float64 where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.tracing import Call, map_tensors, tensors_in

__all__ = [
    "SEED",
    "Difference",
    "Outcome",
    "difference_of",
    "fresh",
    "gradients_of",
    "is_coarse",
    "outcomes_differ",
    "snapshot",
]

SEED = 20240229
OUTPUT_ULPS = 4.0
GRADIENT_ULPS = 32.0
COARSE = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What came of one run of a model.

    Attributes:
        outputs: what it returned.
        taken: what the modules that were listened to returned, in the order of their calls.
        buffers: as the run left them, by name.
        gradients: of a fixed random projection of the outputs and of what was taken, by the name of
            the parameter; None where there was no backward pass.
    """

    outputs: Any
    taken: list[Any]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Difference:
    """How two computations differ.

    Attributes:
        what: in words.
        may_be_rounding: finite numbers alone differ, so that more precision may be the end of it.
        is_behind: it is not in what was computed, but in a gradient or a buffer.
    """

    what: str
    may_be_rounding: bool = False
    is_behind: bool = False

    def __str__(self) -> str:
        return self.what


def fresh(call: Call) -> Call:
    """Return the call with tensors of its own: a forward may write into its inputs."""
    return call.map(lambda tensor: tensor.detach().clone())


def snapshot(value: Any) -> Any:
    """Return the value with tensors that a later in-place operation cannot reach."""
    return Call((value,), {}).map(lambda tensor: tensor.detach().clone()).args[0]


def types_of(value: Any) -> Any:
    """Return the nested type names of an output."""
    if isinstance(value, Tensor):
        return "Tensor"
    name = type(value).__name__.removeprefix("immutable_")
    if isinstance(value, dict):
        return name, {key: types_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return name, [types_of(item) for item in value]
    return name


def is_coarse(module: nn.Module) -> bool:
    """Whether a module has numbers of so few digits that their last place says little."""
    tensors = (*module.parameters(), *module.buffers())
    return any(
        tensor.is_floating_point() and torch.finfo(tensor.dtype).eps > COARSE for tensor in tensors
    )


def outcomes_differ(
    found: Outcome, expected: Outcome, names: Callable[[str], str], room: float
) -> Difference | None:
    """Return the first difference of two outcomes; None if there is none.

    Args:
        found, expected: of two models; what only the second has is not looked at.
        names: turns a name of the first model into the name in the second.
        room: how many times a few units in the last place numbers may differ.
    """
    ulps = room * OUTPUT_ULPS
    difference = difference_of(found.outputs, expected.outputs, ulps)
    difference = difference or difference_of(found.taken, expected.taken, ulps)
    if difference:
        return difference
    types = types_of(found.outputs), types_of(expected.outputs)
    if types[0] != types[1]:
        return Difference(f"it returns {types[0]}, the dense model {types[1]}")
    for name, buffer in found.buffers.items():
        wanted = expected.buffers.get(names(name))
        difference = None if wanted is None else difference_of(buffer, wanted, ulps)
        if difference:
            what = f"the buffer {name!r} has {difference}"
            return Difference(what, difference.may_be_rounding, is_behind=True)
    if expected.gradients is None:
        return None
    return _gradients_differ(found.gradients or {}, expected.gradients, names, room)


def _gradients_differ(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    names: Callable[[str], str],
    room: float,
) -> Difference | None:
    scale: float | None = None
    for name, gradient in found.items():
        wanted = expected.get(names(name))
        wanted = torch.zeros_like(gradient) if wanted is None else wanted
        if torch.equal(gradient, wanted):
            continue
        if scale is None:
            # A gradient may be zero but for rounding (a bias before batch normalisation), and
            # rounding is that of the whole backward pass.
            scale = max((_largest(_finite(g)) for g in expected.values()), default=0.0)
        difference = difference_of(gradient, wanted, room * GRADIENT_ULPS, scale)
        if difference:
            what = f"the gradient of {name!r} differs: {difference}"
            return Difference(what, difference.may_be_rounding, is_behind=True)
    return None


def difference_of(
    found: Any, expected: Any, ulps: float = OUTPUT_ULPS, scale: float | None = None
) -> Difference | None:
    """Return the first difference of two nested values, None where there is none.

    Numbers may differ by `ulps` units in the last place of `scale`, else of the largest expected.
    In float64 a thousand times that is still nothing that a wrong ticket would pass.
    """
    ours, theirs = list(tensors_in(found)), list(tensors_in(expected))
    if len(ours) != len(theirs):
        return Difference(f"{len(ours)} tensors instead of {len(theirs)}")
    plain, wanted = _plain_in(found), _plain_in(expected)
    if plain != wanted:
        return Difference(f"{plain} beside its tensors instead of {wanted}")
    for a, b in zip(map(_dense, ours), map(_dense, theirs), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Difference(f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}")
        if b.is_meta or torch.equal(a, b):
            continue  # a tensor of the meta device has a shape and no values
        if not (a.dtype.is_floating_point or a.dtype.is_complex):
            return Difference(f"{int((a != b).sum())} elements of a {a.dtype} tensor differ")
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
            return Difference("infinities or NaNs at other places")
        size = _largest(b[finite]) if scale is None else scale
        gap = _largest((a - b)[finite])
        # Not "gap > bound": a NaN where the reference is finite must not pass.
        room = 1000.0 if b.dtype == torch.float64 else 1.0
        if not gap <= room * ulps * torch.finfo(b.dtype).eps * size:
            return Difference(
                f"largest difference {gap:.3g} on values up to {size:.3g}", math.isfinite(gap)
            )
    return None


def _plain_in(value: Any) -> list[Any]:
    """Return the numbers and texts that stand beside the tensors of a nested value."""
    found: list[Any] = []

    def keep(item: Any) -> None:
        # NaN is not equal to itself.
        if isinstance(item, bool | int | str) or (isinstance(item, float) and item == item):
            found.append(item)

    map_tensors(value, lambda tensor: tensor, other=keep)
    return found


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
    generator = torch.Generator().manual_seed(SEED)
    cotangents = [
        torch.rand(t.shape, generator=generator).to(device=t.device, dtype=t.dtype) - 0.5
        for t in heads
    ]
    reached = heads and named
    found = (
        torch.autograd.grad(heads, list(named.values()), cotangents, allow_unused=True)
        if reached
        else [None] * len(named)
    )
    return {
        name: torch.zeros_like(parameter) if gradient is None else _dense(gradient)
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }
