"""The CIFAR ResNets of the paper: three stages of 16, 32 and 64 filters.

A network of depth ``6 n + 2`` has ``n`` blocks a stage, each ``conv-bn-relu-conv-bn``
plus its shortcut. Where a stage halves the image, the shortcut is a 1x1 convolution
of stride 2 *without* batch normalisation ("option B" of He et al., 2016, section 3.3);
every convolution has a bias, and weights start He-normal, biases at zero.

=========  ===  ==================================  ====================
network    n    parameters (with BN statistics)     MACs (3 x 32 x 32)
=========  ===  ==================================  ====================
resnet20   3    274,442                             40,813,184
resnet32   5    470,218                             69,124,736
resnet44   7    665,994                             97,436,288
resnet56   9    861,770                             125,747,840
=========  ===  ==================================  ====================

Every block but the first of stages 2 and 3 has an identity shortcut and costs
4,718,592 MACs: twice the channels at half the width and half the height cost the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.models.initial import check_sizes, he_normal

__all__ = ["BasicBlock", "ResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    The shortcut is the identity, or ``downsample`` (a 1x1 convolution of the block's
    stride) where the block changes the shape.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Conv2d(in_channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = functional.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(branch + shortcut)


class ResNet(nn.Module):
    """A CIFAR ResNet of ``6 * blocks_per_stage + 2`` layers with parameters.

    Args:
        blocks_per_stage: ``n``, the blocks of each of the three stages, at least 1.
        num_classes: size of the last axis of the output.
        in_channels: channels of the images.

    The forward pass maps images ``(N, in_channels, H, W)``, H and W at least 4, to
    logits ``(N, num_classes)``. ``image_size`` is the side the paper's figures are for.

    Source: He et al., "Deep residual learning for image recognition", 2016, section 4.2.
    """

    image_size = 32

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_sizes(
            blocks_per_stage=blocks_per_stage, num_classes=num_classes, in_channels=in_channels
        )
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks_per_stage, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks_per_stage, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks_per_stage, stride=2)
        self.fc = nn.Linear(WIDTHS[2], num_classes)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.fc(x)
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return the ResNet20 of the paper, 3 blocks a stage, drawn from torch's generator.

    Example:
        >>> from blockprune.models import resnet20
        >>> sum(p.numel() for p in resnet20().parameters())
        273066
    """
    return ResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return the ResNet32 of the paper, 5 blocks a stage; see :func:`resnet20`."""
    return ResNet(5, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return the ResNet44 of the paper, 7 blocks a stage; see :func:`resnet20`."""
    return ResNet(7, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return the ResNet56 of the paper, 9 blocks a stage; see :func:`resnet20`."""
    return ResNet(9, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """Return the ResNet110 of the paper, 18 blocks a stage; see :func:`resnet20`."""
    return ResNet(18, num_classes, in_channels)
