"""Weights and inputs that hide nothing: what the compared models are run on.

A branch that ends in a weight of zero, as many have at initialisation, computes nothing, right or
wrong. Layers that start as copies of one another can be exchanged unseen, and a mask that is all
ones may as well not be applied. So whatever a model is compared with is run on weights and on
inputs that are changed the same way; the models of the user are not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from blockprune.tracing import Call, tensors_in

__all__ = ["changed_weights", "changes_of", "doubled", "other_calls", "shapes_of"]

SAMPLES = 8
# A share of zeros among random numbers that is chance.
FEW = 1e-3


def changes_of(model: nn.Module) -> dict[str, Tensor]:
    """Return noise for each parameter of `model` that could hide a difference, by every name of it.

    These are parameters with many zeros, with one value throughout, or with the values of another.
    """
    noise: dict[int, Tensor] = {}
    known: set[tuple[object, ...]] = set()
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            continue
        if parameter.is_meta or not parameter.numel():
            continue
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // SAMPLES)].tolist()
        identity = (parameter.shape, *sample)
        is_constant = len(set(sample)) == 1 and bool((values == values[0]).all())
        if is_constant or identity in known or _zeros(values) > FEW * values.numel():
            noise[id(parameter)] = _noise(parameter, name)
        known.add(identity)
    every = model.named_parameters(remove_duplicate=False)
    return {name: noise[id(parameter)] for name, parameter in every if id(parameter) in noise}


def changed_weights(
    model: nn.Module, changes: Mapping[str, Tensor], names: Callable[[str], str] = str
) -> nn.Module:
    """Return `model`, whose parameters that `changes` names are replaced by changed ones.

    `names` turns the name of a parameter into that in `changes`.
    """
    new: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        noise = changes.get(names(name))
        if noise is None or noise.shape != parameter.shape:
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, torch.jit.ScriptModule):
            changed = nn.Parameter(_changed(parameter, noise), parameter.requires_grad)
            # Some modules keep a second list of their weights, which follows.
            setattr(module, attribute, new.setdefault(id(parameter), changed))
    return model


def other_calls(call: Call) -> list[list[Call]]:
    """Return calls to try beside `call`: of each list, the first that a model takes.

    They have another batch size, other image or sequence sizes, and other values, masks above all;
    the more of these at once, the sooner they are tried.
    """
    if not all(tensor.layout == torch.strided for tensor in _tensors(call)):
        return []  # A sparse tensor cannot be cut and joined.
    size = next((t.shape[0] for t in _tensors(call) if t.dim()), 0)
    batch, *others = [batch for batch in (2, 1, 3) if batch != size]
    of_batch = _of_batch(call, size, batch)
    ways = [each.map(_other_values) for each in (*_of_other_sizes(of_batch), of_batch)]
    ways += [of_batch.map(_other_mask), of_batch]
    ways += [call.map(_other_values), call.map(_other_mask), *_of_other_sizes(call)]
    besides = [_of_batch(call, size, others[0])] if size > 1 else []
    return [
        [way for way in calls if not all(map(torch.equal, _tensors(way), _tensors(call)))]
        for calls in (ways, besides)
    ]


def _tensors(call: Call) -> Iterator[Tensor]:
    return tensors_in((call.args, call.kwargs))


def doubled(call: Call) -> Call:
    """Return the call with twice the samples: one value a channel cannot be normalised."""

    def twice(tensor: Tensor) -> Tensor:
        has_samples = tensor.dim() > 0 and tensor.layout == torch.strided
        return torch.cat([tensor, tensor]) if has_samples else tensor

    return call.map(twice)


def shapes_of(call: Call) -> str:
    """Return the shapes of the tensors of a call, in words."""
    return ", ".join("x".join(map(str, tensor.shape)) for tensor in _tensors(call))


def _zeros(values: Tensor) -> int:
    return values.numel() - int(values.count_nonzero())


def _noise(tensor: Tensor, name: str) -> Tensor:
    """Return noise of a size that a weight of this shape could have, the same for each `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = 0.25 + 0.5 * torch.rand(tensor.shape, generator=generator)
    sign = torch.rand(tensor.shape, generator=generator) < 0.5
    inputs = tensor[0].numel() if tensor.dim() > 1 else 1
    noise: Tensor = torch.where(sign, -size, size) / inputs**0.5
    return noise.to(tensor.device)


def _changed(tensor: Tensor, noise: Tensor) -> Tensor:
    tensor, noise = tensor.detach(), noise.to(tensor.dtype)
    return torch.where(tensor == 0, noise, tensor * (1 + noise / 2))


def _other_values(tensor: Tensor) -> Tensor:
    """Return another mask, the same numbers at other places, or the tensor with noise."""
    if not tensor.numel() or tensor.is_complex():
        return tensor
    if _is_mask(tensor):
        return _other_mask(tensor)
    if not tensor.is_floating_point():
        return tensor.roll(1, -1) if tensor.dim() else tensor
    noise = _noise(tensor, "inputs") * (tensor[0].numel() if tensor.dim() > 1 else 1) ** 0.5
    return _changed(tensor, noise)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def _other_mask(tensor: Tensor) -> Tensor:
    """Return a mask with its second half along the last dimension turned into its opposite."""
    if not tensor.dim() or not tensor.numel() or not _is_mask(tensor):
        return tensor
    other = tensor.clone()
    half = other[..., (tensor.shape[-1] + 1) // 2 :]
    half.copy_(half == 0)
    return other


def _of_batch(call: Call, size: int, batch: int) -> Call:
    """Return the call with `batch` samples in the place of `size`."""

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size or not size:
            return tensor
        return torch.cat([tensor] * -(-batch // size))[:batch]

    return call.map(change)


def _of_other_sizes(call: Call) -> Iterator[Call]:
    """Yield the call with images, or sequences, of an odd and of an even smaller size."""
    tensors = [tensor for tensor in _tensors(call) if tensor.dim() > 1]
    if not tensors:
        return
    first = tensors[0]
    ways = [first.shape[2:]] if first.dim() > 3 else [first.shape[1:2], first.shape[2:]]
    if first.is_floating_point():
        ways = [way for way in ways if first.dim() > 2]
    for way in ways:
        for odd in (1, 0):
            smaller = {n: n // 2 + (n // 2 + odd) % 2 for n in way if n > 3}
            if smaller:
                yield call.map(lambda tensor, to=smaller: _cut(tensor, to))


def _cut(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Return the start of a tensor along each dimension, but the first, of one of these sizes."""
    for dim, size in enumerate(tensor.shape):
        if dim and size in sizes:
            tensor = tensor.narrow(dim, 0, sizes[size])
    return tensor
