"""Small networks and contexts that the tests of the criteria share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import find_blocks
from blockprune.criteria import Batch, ScoringContext
from blockprune.tracing import Call, as_call, copy_model

CLASSES = 3


class Block(nn.Module):
    """`relu(x + bn(conv(relu(bn(conv(x))))))`, every convolution followed by a normalisation."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-12)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """A stem, three blocks, and a linear head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, eps=1e-12)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def pair(size: int = 12) -> tuple[Tensor, Tensor]:
    """Images of `Net` and their labels."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.arange(size) % CLASSES


def context(model: nn.Module, inputs: Any, targets: Any = None, **options: Any) -> ScoringContext:
    """A context of one batch over a copy of `model`; without targets, over no data."""
    call: Call = as_call(model, inputs)
    analysis = find_blocks(model, call)
    batches = None if targets is None else [Batch(call, targets)]
    options.setdefault("analysis", analysis)
    return ScoringContext(copy_model(model).eval(), analysis.blocks, batches, call, **options)
