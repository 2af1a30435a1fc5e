"""The networks of the papers, so that their figures can be reproduced to the unit."""

from __future__ import annotations

from blockprune.models.lenet import LeNet300, lenet300
from blockprune.models.resnet import (
    BasicBlock,
    ResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from blockprune.models.resnet18_small import resnet18
from blockprune.models.vgg import VGG, vgg16, vgg19

__all__ = [
    "VGG",
    "BasicBlock",
    "LeNet300",
    "ResNet",
    "lenet300",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg16",
    "vgg19",
]
