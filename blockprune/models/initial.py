"""How the networks here start: He-normal weights, biases at zero."""

from __future__ import annotations

from torch import nn

__all__ = ["check_sizes", "he_normal"]


def he_normal(module: nn.Module) -> None:
    """Draw the weights of a convolution or a linear layer, and put its bias at zero.

    Source: He et al., "Delving deep into rectifiers", 2015.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1.

    Raises:
        ValueError: there is one; it is named.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
