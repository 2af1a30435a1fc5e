"""VGG for small images, in the form that the lottery literature trains.

Convolutions of 3x3 with bias, each followed by batch normalisation and ReLU, in five groups of 64,
128, 256, 512 and 512 filters; a maximum pooling between two groups; the average over what is left
of the image; one linear layer.

Four poolings halve an image of 32 to 2. A smaller one would vanish, so only as many poolings are
made, from the front, as leave 2 pixels a side: two for an image of 8. Weights do not depend on it.

=======  ====================================  ==========
network  convolutions of the groups            parameters
=======  ====================================  ==========
vgg16    2, 2, 3, 3, 3                         14,728,266
vgg19    2, 2, 4, 4, 4                         20,040,522
=======  ====================================  ==========
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.models.initial import check_sizes, he_normal

__all__ = ["VGG", "vgg16", "vgg19"]

WIDTHS = (64, 128, 256, 512, 512)
SMALLEST = 2


class VGG(nn.Module):
    """A VGG with one linear layer.

    Args:
        depths: convolutions of each of the five groups, at least 1.
        num_classes: size of the last axis of the output.
        in_channels: channels of the images.
        image_size: side of the images that the poolings are made for.

    The forward pass maps images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``, of any
    size that the poolings leave a pixel of.

    Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015; with one linear layer as in Frankle and Carbin, 2019.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        layers: list[nn.Module] = []
        side = image_size
        for group, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            if group and side // 2 >= SMALLEST:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                in_channels = width
        self.image_size = image_size
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def vgg16(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> VGG:
    """Return VGG16 with 13 convolutions; see :func:`vgg19`."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels, image_size)


def vgg19(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> VGG:
    """Return VGG19 with 16 convolutions, drawn from torch's generator.

    Example:
        >>> from blockprune.models import vgg19
        >>> sum(p.numel() for p in vgg19().parameters())
        20040522
    """
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels, image_size)
