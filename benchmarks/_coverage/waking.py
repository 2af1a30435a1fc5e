"""Random values for parameters that a fresh model starts with at one constant.

A branch whose last norm starts at zero, or whose layer scale starts at 1e-6, adds next to nothing,
and a ticket without it would equal the dense model whatever was removed.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["wake"]

SPREAD = 0.2


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move the elements of every constant parameter by up to 0.2 each; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                first = parameter.flatten()[0]
                if bool((parameter == first).all()):
                    noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
                    parameter.add_(SPREAD * noise.to(parameter.dtype))
    return model
