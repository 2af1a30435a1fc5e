"""Small residual networks with weights that have a use, and a fit of them written out by hand.

The oracle knows nothing of blockprune: it runs modules of its own copy one after the other, and
solves its equations with `torch.linalg.lstsq`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KINDS", "Block", "Net", "built", "by_hand", "images"]

WIDTH = 6


class Scale(nn.Module):
    """A layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """act(x + behind(last(inner(x))))."""

    def __init__(self, inner: nn.Module, last: nn.Module, behind: nn.Module, act: nn.Module):
        super().__init__()
        self.inner, self.last, self.behind, self.act = inner, last, behind, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.behind(self.last(self.inner(x))))


class Net(nn.Module):
    def __init__(self, make: Callable[[], Block], depth: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*[make() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Last(nn.Module):
    """Lets a linear layer work on channels that come first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, **options)


def _inner() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())


KINDS: dict[str, Callable[[], Block]] = {
    "pre-activation": lambda: Block(_inner(), _conv(), nn.Identity(), nn.Identity()),
    "post-activation": lambda: Block(_inner(), _conv(), nn.Identity(), nn.ReLU()),
    "batch norm": lambda: Block(_inner(), _conv(bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
    "norm and scale": lambda: Block(
        _inner(), _conv(1), nn.Sequential(nn.BatchNorm2d(WIDTH), Scale()), nn.Identity()
    ),
    "scale and dropout": lambda: Block(
        _inner(), _conv(1), nn.Sequential(nn.Dropout(0.5), Scale()), nn.Identity()
    ),
    "groups": lambda: Block(_inner(), _conv(groups=2), nn.Identity(), nn.Identity()),
    "depthwise": lambda: Block(_inner(), _conv(groups=WIDTH), nn.Identity(), nn.ReLU()),
    "no bias": lambda: Block(_inner(), _conv(bias=False), nn.Identity(), nn.Identity()),
    "linear": lambda: Block(_inner(), Last(nn.Linear(WIDTH, WIDTH)), nn.Identity(), nn.Identity()),
}


def built(kind: str, depth: int = 5) -> Net:
    """Return a network in float64, its normalisations with statistics of their own."""
    torch.manual_seed(0)
    net = Net(KINDS[kind], depth).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def images(count: int = 24, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def by_hand(net: Net, dense: Net, gone: int, x: Tensor) -> Net:
    """Return a copy of `net` without one block, the last operation of that before it refitted."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        wanted = F.relu(dense.stem(x))
        for block in dense.blocks[:gone]:
            wanted = block(wanted)
        block = dense.blocks[gone]
        wanted = wanted + block.behind(block.last(block.inner(wanted)))
        shortcut = F.relu(net.stem(x))
        for block in net.blocks[: gone - 1]:
            shortcut = block(shortcut)
        block = net.blocks[gone - 1]
        inner = block.inner(shortcut)
        _fit(block, inner, wanted - shortcut)
    net.blocks[gone] = nn.Identity()
    return net


def _fit(block: Block, inner: Tensor, wanted: Tensor) -> None:
    """Let behind(last(inner)) be `wanted` as well as it can, one output at a time."""
    layer = block.last.layer if isinstance(block.last, Last) else block.last
    # behind is y -> factor * y + shift.
    zero, one = (torch.full((1, WIDTH, 1, 1), float(v), dtype=inner.dtype) for v in (0, 1))
    shift = block.behind(zero)
    factor = block.behind(one) - shift
    goal = ((wanted - shift) / factor).permute(0, 2, 3, 1).reshape(-1, WIDTH)
    norm = next((m for m in block.behind.modules() if isinstance(m, nn.BatchNorm2d)), None)
    takes_bias = layer.bias is not None or norm is not None
    for output in range(WIDTH):
        if isinstance(layer, nn.Linear):
            rows = inner.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        else:
            share = WIDTH // layer.groups
            group = output // share
            part = inner[:, group * share : (group + 1) * share]
            rows = F.unfold(part, layer.kernel_size, padding=layer.padding)
            rows = rows.transpose(1, 2).flatten(0, 1)
        if takes_bias:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        found = torch.linalg.lstsq(rows, goal[:, output]).solution
        weight = found[:-1] if takes_bias else found
        layer.weight[output] = weight.view_as(layer.weight[output])
        if layer.bias is not None:
            layer.bias[output] = found[-1]
        elif norm is not None:
            norm.running_mean[output] -= found[-1]
