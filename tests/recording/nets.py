"""Small residual nets with room for one piece of code to try: an act.

An act is a function of a stream of features (batch, tokens, WIDTH) and a mask (batch, tokens) that
returns features of the same shape. A host puts it somewhere: into a block that stays, one that
goes, a child of a block, the root. In each, the law is that of `tests.recording.law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recording.law import Trial, right_where

__all__ = [
    "HOSTS",
    "WIDTH",
    "Act",
    "Block",
    "Host",
    "Net",
    "features",
    "hold",
    "nothing",
    "on_hosts",
    "ones",
    "padded",
]

WIDTH = 8
Act = Callable[[Tensor, Tensor], Tensor]


def nothing(x: Tensor, mask: Any = None) -> Tensor:
    """Return the features as they are."""
    return x


class Block(nn.Module):
    """A residual branch that ends in the layer `f`, behind an act."""

    def __init__(self, act: Callable[..., Tensor] = nothing) -> None:
        super().__init__()
        self.act = act
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(self.act(x, mask))


class OnStream(Block):
    """Acts on the stream before its branch leaves it."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.act(x, mask)
        return x + self.f(x)


class Child(nn.Module):
    """Holds a layer and an act, and no merge."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        self.g = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        return self.act(self.g(x), mask)


class WithChild(Block):
    """The act happens in a child of the branch."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.child = Child(act)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(self.child(x, mask))


class Net(nn.Module):
    """Blocks between a stem and a head; the root may act as well."""

    def __init__(self, *blocks: nn.Module, act: Act = nothing) -> None:
        super().__init__()
        self.act = act
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = self.act(self.stem(x), mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


@dataclasses.dataclass(frozen=True)
class Host:
    """Where an act stands.

    Attributes:
        build: makes the net.
        cut: the block that goes; its branch ends in its layer `f`.
        preserve_root: whether the root stays a module of its class.
        must: whether the ticket has to be right however little of the act can be followed. It is
            where no block is lost when the module that acts is only called.
    """

    build: Callable[[Act], nn.Module]
    cut: str = "blocks.1"
    preserve_root: bool = False
    must: bool = False


HOSTS = {
    "block": Host(lambda act: Net(Block(act), Block())),
    "removed": Host(lambda act: Net(Block(act), Block()), cut="blocks.0"),
    "stream": Host(lambda act: Net(OnStream(act), Block())),
    "child": Host(lambda act: Net(WithChild(act), Block()), must=True),
    "root": Host(lambda act: Net(Block(), Block(), act=act)),
    "kept_root": Host(lambda act: Net(Block(), Block(), act=act), preserve_root=True, must=True),
}


def on_hosts(acts: Iterable[Act], *hosts: str) -> Callable[[Any], Any]:
    """Parametrise a test with `act` and `host`: every act, at all of the hosts or those named."""
    names = hosts or tuple(HOSTS)
    at_hosts = pytest.mark.parametrize("host", [HOSTS[name] for name in names], ids=names)
    with_acts = pytest.mark.parametrize("act", list(acts), ids=lambda act: act.__name__)
    return lambda test: at_hosts(with_acts(test))


def hold(
    act: Act, host: Host, trials: Iterable[Trial], example: Any = None, *, demand: str
) -> None:
    """Hold a ticket to the law; `demand` is "right" or "right_or_refused"."""
    right_where(
        host.must or demand == "right",
        host.build(act),
        (features(), ones()) if example is None else example,
        trials,
        cut=host.cut,
        zero=f"{host.cut}.f",
        preserve_root=host.preserve_root,
    )


def features(batch: int = 2, tokens: int = 5, seed: int = 0) -> Tensor:
    """Return random features; the same ones for the same arguments."""
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def ones(batch: int = 2, tokens: int = 5) -> Tensor:
    """Return a mask that masks nothing."""
    return torch.ones(batch, tokens, dtype=torch.long)


def padded(batch: int = 2, tokens: int = 5) -> Tensor:
    """Return a mask of which each row masks some of the last tokens, the first row two."""
    lengths = torch.tensor([tokens - 2, *[tokens - 1 - i % 2 for i in range(1, batch)]])
    return (torch.arange(tokens) < lengths[:, None]).long()
