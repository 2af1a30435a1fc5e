"""Linear operations: which calls of torch they are, and what they look like as one matrix product.

Each is written as Y = Z P + b for every group of channels by itself: the rows of Z and Y are
samples and positions, the columns of Z are what the operation reads for one output (for a
convolution all of its window), and P is its weight.

    linear      Y = Z W^T + b       W: (outputs, inputs)
    addmm       Y = Z W + b         W: (inputs, outputs), as `Conv1D` of transformers has it
    attention   the output projection of `nn.MultiheadAttention`, a linear operation
    convolution Y = unfold(X) W^T + b, in as many groups as it has
    channels    Y = n(X) w + b, weight and bias of a layer norm: each channel is a group

The last is looked for only where statistics of norms are held (see `norms`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from blockprune.recovery.norms import HELD, NORMS, HeldStatistics, normalised
from blockprune.tracing import tensors_in

__all__ = ["LinearCall", "NormCall", "Watching"]

Layout = Literal["inputs last", "outputs last", "convolution", "channels"]

_AT_ONCE = 2**20
"""How many numbers of Z are written out at once."""
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LOOKING = frozenset({"__get__", "__len__", "dim", "is_floating_point", "numel", "size"})
"""Functions that look at a tensor and not at its numbers."""
_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Attributes that are the numbers themselves."""


@dataclasses.dataclass(frozen=True)
class NormCall:
    """A batch normalisation with fixed statistics that reads what a linear operation returned.

    Attributes:
        weight, bias, mean, variance: names of its parameters and buffers; None where it has none.
        eps: what it adds to the variance.
    """

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what it has."""
        found = (self.weight, self.bias, self.mean, self.variance)
        return tuple(name for name in found if name is not None)


@dataclasses.dataclass
class LinearCall:
    """One call of a linear operation whose weight is a parameter.

    Attributes:
        weight, bias: their names; None for a bias that it does not have.
        layout: of the weight.
        groups: of channels.
        window: stride, padding and dilation of a convolution.
        kernel: size of its window.
        given: what it reads, where that was asked for.
        returned: what it returned, as a leaf that can be differentiated, where that was asked for.
        norm: what normalises it.
        node: what autograd knows the result by, where it depends on a leaf.
    """

    weight: str
    bias: str | None
    layout: Layout
    groups: int = 1
    window: tuple[Any, Any, Any] = (1, 0, 1)
    kernel: tuple[int, ...] = ()
    given: Tensor | None = None
    returned: Tensor | None = None
    norm: NormCall | None = None
    node: Any = None

    def inputs(self) -> Tensor:
        """Return Z, as (groups, rows, columns)."""
        assert self.given is not None
        if self.layout == "channels":
            return self.outputs(self.given)
        if self.layout != "convolution":
            return self.given.reshape(1, -1, self.given.shape[-1])
        z = _padded(self.given, self.kernel, *self.window[1:])
        dimensions = len(self.kernel)
        strides, dilations = (_each(v, dimensions) for v in (self.window[0], self.window[2]))
        for axis, size in enumerate(self.kernel):
            span = (size - 1) * dilations[axis] + 1
            z = z.unfold(2 + axis, span, strides[axis])[..., :: dilations[axis]]
        # (samples, channels, *positions, *window) to (groups, samples * positions, columns)
        samples, channels = z.shape[:2]
        z = z.reshape(samples, self.groups, channels // self.groups, *z.shape[2:])
        z = z.movedim((1, 2), (0, 2 + dimensions))
        return z.reshape(self.groups, -1, z.shape[2 + dimensions :].numel())

    def pieces(self, *results: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield Z, and rows of tensors of the shape of the result, a few samples at a time.

        The Z of a whole batch is larger than the batch, by the size of the window.
        """
        assert self.given is not None
        step = max(1, _AT_ONCE // (self.given[0].numel() * math.prod(self.kernel)))
        for given, *own in zip(
            *(torch.split(t, step) for t in (self.given, *results)), strict=True
        ):
            few = dataclasses.replace(self, given=given)
            yield few.inputs(), *map(self.outputs, own)

    def outputs(self, y: Tensor) -> Tensor:
        """Return a tensor of the shape of the result as (groups, rows, outputs of a group)."""
        if self.layout == "convolution":
            y = y.movedim(1, -1)
        y = y.reshape(-1, self.groups, y.shape[-1] // self.groups)
        return y.transpose(0, 1)

    def result(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return what `outputs` turns into `rows`, of the shape of `like`."""
        rows = rows.transpose(0, 1)
        if self.layout != "convolution":
            return rows.reshape(like.shape)
        return rows.reshape(like.movedim(1, -1).shape).movedim(-1, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return P of a weight, as (groups, columns, outputs of a group)."""
        if self.layout == "outputs last":
            return weight.unsqueeze(0)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)

    def weight_of(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return the weight that `matrix` turns into P."""
        if self.layout == "outputs last":
            return matrix.squeeze(0)
        return matrix.transpose(1, 2).reshape(shape)


class Watching(TorchFunctionMode):
    """See the linear operations that a model calls, in order.

    Args:
        names: identity of each parameter and buffer to its name.
        leaves: names of the weights whose calls keep what they read, and return a leaf.
        change: is added to what these return.
        held: norms of positions use these statistics; None: those of what they are given.

    Attributes:
        calls: what was seen.
        uses: how many calls of torch, of any kind, read each of the named tensors.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        leaves: frozenset[str] = frozenset(),
        change: Callable[[Tensor], Tensor] | None = None,
        held: HeldStatistics | None = None,
    ) -> None:
        super().__init__()
        self.names, self.leaves, self.change, self.held = names, leaves, change, held
        self.calls: list[LinearCall] = []
        self.uses: Counter[str] = Counter()
        self._latest: tuple[Tensor, LinearCall] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _only_looks(func):
            own = map(self._name, tensors_in((args, kwargs)))
            self.uses.update({name for name in own if name is not None})
        if func is F.linear or func in _CONVOLUTIONS:
            return self._operation(func, args, kwargs)
        if func in (torch.addmm, Tensor.addmm):
            return self._addmm(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func is F.batch_norm:
            self._note_norm(*args, **kwargs)
        if self.held is not None and func in NORMS:
            return self._norm(func, args, kwargs, self.held)
        if self.held is not None and func in HELD:
            return self.held.of(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight, bias = self._name(given["weight"]), self._name(given.get("bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            return result
        kernel = tuple(given["weight"].shape[2:])
        if given["input"].dim() < 2 + len(kernel):
            return result  # without samples
        if func is F.linear:
            return self._seen(LinearCall(weight, bias, "inputs last"), given["input"], result)
        window = given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)
        call = LinearCall(weight, bias, "convolution", given.get("groups", 1), window, kernel)
        return self._seen(call, given["input"], result)

    def _addmm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if kwargs or len(args) != 3:
            return result
        weight, bias = self._name(args[2]), self._name(args[0])
        if weight is None or bias is None:
            return result
        return self._seen(LinearCall(weight, bias, "outputs last"), args[1], result)

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("weight", "bias")
        places = {"weight": 11, "bias": 12}
        found = {
            name: args[places[name]] if len(args) > places[name] else kwargs[f"out_proj_{name}"]
            for name in names
        }
        weight, bias = self._name(found["weight"]), self._name(found["bias"])
        if weight is None or (bias is None and found["bias"] is not None):
            return func(*args, **kwargs)
        # With the identity in its place, what the projection reads is what comes out.
        own = list(args)
        identity = torch.eye(
            found["weight"].shape[1], dtype=found["weight"].dtype, device=found["weight"].device
        )
        for name, value in (("weight", identity), ("bias", None)):
            if len(own) > places[name]:
                own[places[name]] = value
            else:
                kwargs = {**kwargs, f"out_proj_{name}": value}
        given, *rest = func(*own, **kwargs)
        result = F.linear(given, found["weight"], found["bias"])
        return (self._seen(LinearCall(weight, bias, "inputs last"), given, result), *rest)

    def _note_norm(
        self,
        given: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        if training or self._latest is None or self._latest[0] is not given:
            return
        self._latest[1].norm = NormCall(
            self._name(weight),
            self._name(bias),
            self._name(running_mean),
            self._name(running_var),
            eps,
        )

    def _norm(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], held: HeldStatistics
    ) -> Tensor:
        is_rms = func in (F.rms_norm, torch.rms_norm)
        names = ("input", "normalized_shape", "weight", *(() if is_rms else ("bias",)), "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        z = normalised(func, given, held)
        weight: Any = given.get("weight")
        bias: Any = given.get("bias")
        result = z if weight is None else z * weight
        result = result if bias is None else result + bias
        name, bias_name = self._name(weight), self._name(bias)
        if name is None or (bias_name is None and bias is not None) or z.shape[-1:] != weight.shape:
            return result
        return self._seen(LinearCall(name, bias_name, "channels", len(weight)), z, result)

    def _seen(self, call: LinearCall, given: Tensor, result: Tensor) -> Tensor:
        self.calls.append(call)
        if call.weight in self.leaves:
            call.given = given.detach()
            if self.change is not None:
                result = result + self.change(result)
            call.returned = result.detach().requires_grad_()
            # Code behind may write into it, as into any result.
            result = call.returned.clone()
        call.node = result.grad_fn
        self._latest = result, call
        return result

    def _name(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None else self.names.get(id(tensor))


def _only_looks(func: Callable[..., Any]) -> bool:
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return getattr(func, "__name__", "") in _LOOKING and attribute not in _VIEWS


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * dimensions


def _padded(x: Tensor, kernel: tuple[int, ...], padding: Any, dilation: Any) -> Tensor:
    if padding == "valid":
        return x
    dilations = _each(dilation, len(kernel))

    def around(size: int, dilation: int, index: int) -> tuple[int, int]:
        if padding == "same":
            total = (size - 1) * dilation
            return total // 2, total - total // 2
        return (_each(padding, len(kernel))[index],) * 2

    pads: Iterator[tuple[int, int]] = (
        around(size, dilations[index], index) for index, size in enumerate(kernel)
    )
    return F.pad(x, [number for pair in reversed(list(pads)) for number in pair])
