"""Writing a fitted matrix into the weights that are there: keys and shapes stay.

The operation takes P as its weight, and the last row as its bias. Where it has none, the
normalisation behind it takes that row. That normalisation also gets the statistics of what it will
be given from now on, with its own weight and bias turned so that it computes the same: in training
mode it then does about what it does in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blockprune.recovery.gram import Gram
from blockprune.recovery.operations import LinearCall, NormCall

__all__ = ["folded", "has_bias", "start_of", "tensors_of", "write_into"]


def has_bias(operation: LinearCall) -> bool:
    """Whether something takes a bias: the operation or the normalisation behind it."""
    return operation.bias is not None or (
        operation.norm is not None and operation.norm.bias is not None
    )


def start_of(model: nn.Module, operation: LinearCall) -> Tensor:
    """Return P0, the weight of an operation with its bias as the last row, in float64."""
    matrix = operation.matrix(model.get_parameter(operation.weight).detach().double())
    last = torch.zeros_like(matrix[:, :1])
    if operation.bias is not None:
        bias = model.get_parameter(operation.bias).detach().double()
        last = bias.reshape(operation.groups, 1, -1)
    return torch.cat([matrix, last], dim=1)


def folded(
    model: nn.Module, operation: LinearCall, matrix: Tensor, gram: Gram
) -> dict[str, Tensor]:
    """Return new values, by name, of the parameters and buffers that are to compute `matrix`."""
    tensors = tensors_of(model)
    shape = tensors[operation.weight].shape
    found = {operation.weight: operation.weight_of(matrix[:, :-1], shape)}
    shift = matrix[:, -1].flatten()
    if operation.bias is not None:
        found[operation.bias] = shift
        shift = torch.zeros_like(shift)
    norm = operation.norm
    if norm is not None and norm.weight is not None and norm.bias is not None:
        found |= _renormalised(tensors, operation, norm, matrix, gram, shift)
    return {name: value.to(tensors[name].dtype) for name, value in found.items()}


def _renormalised(
    tensors: Mapping[str, Tensor],
    operation: LinearCall,
    norm: NormCall,
    matrix: Tensor,
    gram: Gram,
    shift: Tensor,
) -> dict[str, Tensor]:
    assert norm.weight is not None
    assert norm.bias is not None
    weight, bias = (tensors[name].detach().double() for name in (norm.weight, norm.bias))
    if norm.mean is None or norm.variance is None:
        return {}
    mean, variance = (tensors[name].detach().double() for name in (norm.mean, norm.variance))
    # What it is given from now on; a bias that it is to take itself is not in there.
    own = matrix.clone()
    if operation.bias is None:
        own[:, -1] = 0
    count = gram.products[:, -1:, -1:]
    new_mean = ((gram.products[:, -1:] @ own) / count).flatten()
    square = ((gram.products @ own) * own).sum(dim=1, keepdim=True) / count
    new_variance = (square.flatten() - new_mean**2).clamp_min(0)
    factor = weight / (variance + norm.eps).sqrt()
    return {
        norm.mean: new_mean,
        norm.variance: new_variance,
        norm.weight: factor * (new_variance + norm.eps).sqrt(),
        norm.bias: bias + factor * (new_mean - mean + shift),
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, one that is shared by each of its."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def write_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
