"""ResNet18 for small images: torchvision's, with a stem that keeps their size."""

from __future__ import annotations

from typing import Any

from torch import nn

from blockprune.models.initial import check_sizes, he_normal

__all__ = ["resnet18"]


def resnet18(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Return ResNet18 with a stem of 3x3 and stride 1 without pooling: CIFAR, Tiny ImageNet.

    Stages of 64, 128, 256 and 512 filters, two blocks each: 11.17 million parameters. Some papers
    call the network of 16, 32 and 64 filters by this name; that is `resnet20`.

    Args:
        num_classes: size of the last axis of the output.
        in_channels: channels of the images.
        image_size: side of the images that figures are for; every size from 1 on works.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> from blockprune.models import resnet18
        >>> sum(p.numel() for p in resnet18().parameters())
        11173962

    Source: He et al., "Deep residual learning for image recognition", 2016.
    """
    from torchvision.models import resnet18 as for_large_images

    check_sizes(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    model: Any = for_large_images(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.image_size = image_size
    small: nn.Module = model.apply(he_normal)
    return small
