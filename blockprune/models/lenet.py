"""LeNet-300-100: the fully connected network of the first lottery tickets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.models.initial import check_sizes, he_normal

__all__ = ["LeNet300", "lenet300"]


class LeNet300(nn.Module):
    """``fc3(relu(fc2(relu(fc1(x)))))`` with 300 and 100 hidden units; 266,610 parameters at 784.

    Args:
        in_features: numbers in one input, whatever its shape.
        num_classes: size of the last axis of the output.

    The forward pass maps inputs ``(N, ...)`` of ``in_features`` numbers each to logits
    ``(N, num_classes)``.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, in_features: int, num_classes: int = 10) -> None:
        super().__init__()
        check_sizes(in_features=in_features, num_classes=num_classes)
        self.fc1 = nn.Linear(in_features, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fc1(torch.flatten(x, 1)))
        x = functional.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def lenet300(
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    in_features: int | None = None,
) -> LeNet300:
    """Return LeNet-300-100, drawn from torch's generator.

    Args:
        num_classes: size of the last axis of the output.
        in_channels, image_size: of square images, whose numbers are counted where `in_features` is
            not given.
        in_features: numbers in one input.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> from blockprune.models import lenet300
        >>> sum(p.numel() for p in lenet300().parameters())
        266610
    """
    check_sizes(in_channels=in_channels, image_size=image_size)
    if in_features is None:
        in_features = in_channels * image_size**2
    return LeNet300(in_features, num_classes)
