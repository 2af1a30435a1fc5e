"""What single weights and filters amount to: the MACs that one weight takes part in, filters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from blockprune.modes import in_mode
from blockprune.tracing import as_call, isolated, structural_copy

__all__ = ["filter_count", "macs_per_weight"]


def filter_count(model: nn.Module) -> int:
    """Return the filters (output channels) of all convolutions, shared ones once.

    Example:
        >>> from blockprune.costs import filter_count
        >>> from blockprune.models import resnet32
        >>> filter_count(resnet32())
        1232
    """
    return sum(module.out_channels for module in model.modules() if isinstance(module, _ConvNd))


def macs_per_weight(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Return, for each weight tensor of convolutions and linear layers, the MACs of one weight.

    A weight of a convolution is multiplied once for each position of its output map (of its input
    map, where it is transposed), one of a linear layer once for each row. Calls add up.

    Args:
        model: a copy of it is run in evaluation mode.
        example_inputs: a Tensor, a tuple of arguments or a dict of keywords; costs are of this
            batch.

    Returns:
        Name of the weight in ``state_dict`` to MACs; 0 where the forward does not call the layer,
        or reads its weight past it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.costs import macs_per_weight
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 10))
        >>> macs_per_weight(net, torch.zeros(1, 3, 4, 4))
        {'0.weight': 16, '2.weight': 1}
    """
    call = as_call(model, example_inputs).map(lambda tensor: tensor.detach().clone())
    uses: Counter[nn.Module] = Counter()

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            uses[layer] += output.numel() // layer.out_features
        else:
            maps = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
            channels = maps.shape[-1 - len(layer.kernel_size)]  # type: ignore[arg-type]
            uses[layer] += maps.numel() // channels

    with isolated():
        copied = structural_copy(model)
        layers = {
            f"{name}.weight" if name else "weight": module
            for name, module in copied.named_modules()
            if isinstance(module, _ConvNd | nn.Linear)
        }
        for layer in layers.values():
            layer.register_forward_hook(count)
        with in_mode(False, copied), torch.no_grad():
            copied(*call.args, **call.kwargs)
        # A weight that several layers share is used by all of them.
        return {
            name: sum(
                uses[other]
                for other in layers.values()
                if other is layer or other.weight is layer.weight
            )
            for name, layer in layers.items()
        }
