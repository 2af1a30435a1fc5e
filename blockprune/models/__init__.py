"""The networks of the paper, so that its figures can be reproduced to the unit."""

from __future__ import annotations

from blockprune.models.resnet import (
    BasicBlock,
    ResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)

__all__ = ["BasicBlock", "ResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
