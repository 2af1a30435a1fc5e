"""What the tests of the lottery name in their specs: a small network, criteria that go wrong."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from blockprune.criteria import ScoringContext
from blockprune.lottery.record import NetworkRecord, RunRecord

SPEC: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "tests.lottery_models:tiny"},
    "data": {"options": {"test_share": 0.8}},
    "recipe": {"epochs": 2, "lr": 0.05, "batch_size": 64},
    "criteria": "snip",
    "p": 1,
    "seeds": 2,
    "min_blocks_per_stage": 1,
}
"""A run of seconds; tests change what they are about."""


def network(record: RunRecord, **case: Any) -> NetworkRecord:
    """Return the one network of a run whose case has these values."""
    [found] = [
        one
        for one in record.networks
        if all(getattr(one.case, name) == value for name, value in case.items())
    ]
    return found


class Block(nn.Module):
    """A residual block with everything that a state holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.relu(self.norm(self.conv(x)))


class Tiny(nn.Module):
    """Three removable blocks of one stage, on grey images."""

    def __init__(self, channels: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(3)))
        self.head = nn.Linear(channels * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).flatten(1))
        return logits


def tiny(channels: int = 4, classes: int = 10) -> Tiny:
    """Build the small network."""
    return Tiny(channels, classes)


ONE = Tiny()


def broken(context: ScoringContext) -> dict[str, float]:
    """Fail, as a user's criterion may."""
    raise RuntimeError("the criterion is broken")


def last_first(context: ScoringContext) -> dict[str, float]:
    """Rank later blocks lower."""
    return {block.name: -float(place) for place, block in enumerate(context.blocks)}


def restless(context: ScoringContext) -> dict[str, float]:
    """Rank by the parity of a count that every epoch moves: masks never agree."""
    batches = int(dict(context.model.named_buffers())["blocks.0.norm.num_batches_tracked"])
    turn = batches // 6 % 2
    names = [block.name for block in context.blocks]
    return {name: float(place % 2 == turn) for place, name in enumerate(names)}


def deadly(context: ScoringContext) -> dict[str, float]:
    """Take the worker down."""
    die()
    return {}


def die() -> None:
    """End the process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(flag: str) -> str:
    """End the process the first time."""
    if not os.path.exists(flag):
        with open(flag, "w"):
            pass
        die()
    return "survived"


def echo(value: str) -> str:
    """Return what is given."""
    return value
