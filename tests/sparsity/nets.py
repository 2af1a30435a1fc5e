"""Small networks that the tests of single-weight tickets share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.sparsity import Mask

CLASSES = 3


class Small(nn.Module):
    """Convolution, normalisation, two linear layers; images of 1 x 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(48, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(x)))
        return found


class Branching(nn.Module):
    """A root that does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, CLASSES)
        self.two = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(x) if float(x.sum()) > 0 else self.two(x)
        return found


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def batch(size: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=generator), torch.arange(size) % CLASSES


def half_mask(model: nn.Module, seed: int = 2) -> Mask:
    """Half of the weights at random, a layer at a time."""
    generator = torch.Generator().manual_seed(seed)
    full = Mask.full(model)
    keep = {name: torch.rand(k.shape, generator=generator) < 0.5 for name, k in full.keep.items()}
    return Mask(keep, full.aliases)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs, labels = batch(seed=seed)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def masked_are_zero(model: nn.Module, mask: Mask) -> bool:
    state = model.state_dict()
    return all(not state[name][~keep.to(state[name].device)].any() for name, keep in mask.items())
