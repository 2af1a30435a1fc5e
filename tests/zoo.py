"""Tiny networks, each with the truth about its residual blocks written by hand.

One network is one way of writing a residual connection, or one trap. An `Entry` says
which branches can be removed, what they are called, which parameters go with each, and
which merges must be refused and why. The nets themselves say, through `oracle.branch`,
which value is a branch's output; that is all that the eager reference needs.

Where design.md leaves a name or a reason open, the truth is None, and not a guess.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.oracle import Hook, Inputs, Tap, branch

C = 4  # channels of every image net
S = 8  # its side
D = 8  # width of every token net
T = 5  # its tokens
V = 11  # its vocabulary


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Branch:
    """One removable branch.

    `drops` are the prefixes of the parameters that vanish when it goes alone; the default
    is everything below its tap's path. `name` is None where design.md leaves it open. A
    branch that is not `required` may be refused: design.md gives two answers for it.
    """

    zero: Tap | Hook
    name: str | None = None
    owner: str | None = None
    drops: tuple[str, ...] | None = None
    required: bool = True

    @property
    def dropped(self) -> tuple[str, ...]:
        return (self.zero.path + ".",) if self.drops is None else self.drops


@dataclass(frozen=True)
class Entry:
    """A net and its truth.

    `layers` names the blocks of granularity "layer" (None: as the branches). `rejections`
    counts the refused merges by reason (None: open; "opaque" is counted only where it is
    named). `contains` maps a branch to those nested in it.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    branches: tuple[Branch, ...] = ()
    rejections: Mapping[str, int] | None = None
    layers: tuple[str, ...] | None = None
    contains: Mapping[str, tuple[str, ...]] | None = None
    salts: tuple[int, ...] = (0,)  # seeds under which random nets are compared
    unused: tuple[str, ...] = ()  # prefixes of parameters that the forward never reads

    def build(self) -> nn.Module:
        """Return the net with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            net = self.factory()
            for module in net.modules():
                # Statistics as after some training: eval and train mode then differ.
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_(0.0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
            return net

    def example(self, batch: int = 2) -> Inputs:
        """Return example inputs of `batch` samples, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch)
            return self.inputs(batch)

    @property
    def zeros(self) -> dict[str, Tap | Hook]:
        """The branches whose names are fixed."""
        return {b.name: b.zero for b in self.branches if b.name is not None}


def named(*paths: str, owner: str | None = None) -> tuple[Branch, ...]:
    """Branches that are the whole of their owner: block, owner and tap share one name."""
    return tuple(Branch(Tap(path), path, owner=path if owner is None else owner) for path in paths)


# ---------------------------------------------------------------- inputs


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, S, S),)


def maps(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, C, S, S),)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, T, D),)


def indices(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, V, (batch, T)),)


# ---------------------------------------------------------------- parts


def conv(c_in: int = C, c_out: int = C, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


def conv_bn(c_in: int = C, c_out: int = C, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, stride), nn.BatchNorm2d(c_out))


class Trunk(nn.Module):
    """Stem, body, global pooling and a linear head; the stem ends in `act`."""

    def __init__(self, *body: nn.Module, act: nn.Module | None = None, width: int = C) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.act = nn.Identity() if act is None else act
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.act(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """The block of ResNet v1: activation after the merge, in place."""

    def __init__(self, c_in: int = C, c_out: int = C, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = conv_bn(c_in, c_out, stride) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = branch(self, self.bn2(self.conv2(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Plain(nn.Module):
    """x + f(x) with nothing behind the merge."""

    def __init__(self, f: nn.Module | None = None) -> None:
        super().__init__()
        self.f = conv_bn() if f is None else f

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.f(x))


class Post(nn.Module):
    """act(x + f(x)) for any activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.f = conv_bn()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + branch(self, self.f(x)))


# ---------------------------------------------------------------- shortcuts


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, C)
        self.bn1 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(C, 2 * C, 2), Block(2 * C, 2 * C))
        self.fc = nn.Linear(2 * C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, zero channels appended."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn(C, 2 * C, 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, C // 2, C // 2))
        return F.relu(shortcut + branch(self, self.f(x)))


class PreAct(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace)
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        # The ReLU works in place on the norm's output: the shortcut is not touched.
        return x + branch(self, self.conv(self.relu(self.bn(x))))


class PreActMutating(nn.Module):
    """The ReLU comes first and in place, so that the shortcut is the rectified x."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.f(self.relu(x)))


class ViewMutating(nn.Module):
    """The shortcut is written through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        flat.relu_()
        return x + branch(self, self.f(flat.view(x.shape)))


class ScaledShortcut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.f = conv_bn()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        out = branch(self, self.f(x))
        if self.how == "product":
            return x * 0.5 + out
        if self.how == "alpha":
            return torch.add(out, x, alpha=0.5)
        return x / 2 + out


class AlphaBranch(nn.Module):
    """A scale on the branch is part of the branch."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.f = conv_bn()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        out = branch(self, self.f(x))
        return x.add(out, alpha=2) if self.method else torch.add(x, out, alpha=0.3)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()
        self.gamma = nn.Parameter(torch.full((C, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.gamma * self.f(x))


class NormFree(nn.Module):
    """NFNet: the branch's input is scaled down, its output has a learned gain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(F.gelu(x) * 0.9)
        return branch(self, out.mul_(self.gain) * 0.2) + x


class IdentityShortcut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.f = conv_bn()
        self.shortcut = nn.Identity()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x) if self.how == "module" else x.clone()
        return shortcut + branch(self, self.f(x))


class BroadcastBranch(nn.Module):
    """A bias per channel, computed from the pooled input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.fc(x.mean((2, 3), keepdim=True)))


class BroadcastShortcut(nn.Module):
    """The shortcut is a vector per channel; the sum is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, C)
        self.up = nn.ConvTranspose2d(C, C, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stem(x).mean((2, 3), keepdim=True)
        return pooled + branch(self, self.up(pooled))


class DtypeChange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return (x + branch(self, self.f(x).double())).mean((2, 3))


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, F.avg_pool2d(x, 3, 1, 1))


# ---------------------------------------------------------------- merges


class Merge(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.f = conv_bn()
        self.how = how
        self.float_add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        out = branch(self, self.f(x))
        if self.how == "operator":
            return operator.add(out, x)
        if self.how == "iadd":
            out += x
            return out
        if self.how == "torch.add":
            return torch.add(input=x, other=out)
        if self.how == "add":
            return x.add(out)
        if self.how == "add_":
            return out.add_(x)
        if self.how == "shortcut.add_":
            return x.add_(out)
        if self.how == "float_functional":
            return self.float_add.add(x, out)
        if self.how == "float_functional_relu":
            return self.float_add.add_relu(x, out)
        return torch.add(out, x, alpha=1)


MERGES = (
    "operator",
    "iadd",
    "torch.add",
    "add",
    "add_",
    "float_functional",
    "float_functional_relu",
    "alpha_one",
)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn()
        self.b = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.a(x), "a") + branch(self, self.b(x), "b")


class SummedBranches(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x + (branch(self, self.a(x), "a") + branch(self, self.b(x), "b"))


class LongSkip(nn.Module):
    """The whole body is itself a branch of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.body = nn.Sequential(Plain(), conv(), Plain())
        self.head = conv(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + branch(self, self.body(x)))


class EscapesByReturn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = branch(self, self.f(x))
        return x + out, out


class EscapesByUse(nn.Module):
    """A value inside the branch, not its last one, is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()
        self.g = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.f(x)
        return (x + branch(self, self.g(inner))) * torch.sigmoid(inner)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + self.f(b)


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(T, D))
        self.block = Plain(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.position)


class DropLast(nn.Module):
    """The shortcut is not rectified, and is read again by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.block = Post(nn.ReLU(inplace=True))
        self.head = conv(2 * C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x)
        return self.head(torch.cat([x, y], 1))


class WriteBehindRead(nn.Module):
    """The sum is rectified in place and read by its old name too; x must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.a = Plain()
        self.b = Plain()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        y = self.a(x)
        z = self.b(y.relu_())
        w = z.view(z.shape[0], -1)
        F.relu(z, inplace=True)
        return x * 1, y * 1, z, w


class StatementInPlace(nn.Module):
    """The result of the merge is not used as a value: the shortcut itself was changed."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        x.add_(branch(self, self.f(x.clone())))
        return x


class ViewInPlace(nn.Module):
    """The merge writes through a view; the tensor behind it is what goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(S * S, S * S)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        flat.add_(branch(self, self.f(flat.clone())))
        return x


class NormAfterMerge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + branch(self, self.f(x)))


# ---------------------------------------------------------------- sharing


class SharedFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + branch(self, self.f(x))
        return x + branch(self, self.f(x))


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.block = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x)))


class SharedWeight(nn.Module):
    """Two blocks, each with a norm of its own, read one convolution weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.a = Plain()
        self.b = Plain()
        self.b.f[0].weight = self.a.f[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)))


class Aliased(nn.Module):
    """One block under two names, called once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.first = Plain()
        self.second = self.first
        self.last = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.stem(x)))


class AliasedCalls(nn.Module):
    """One block under two names, called through both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.first = Plain()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


class EmptyShortcut(nn.Module):
    """Writes its identity shortcut as a Sequential of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.shortcut = conv_bn(), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return branch(self, self.f(x)) + self.shortcut(x)


class Frozen(Trunk):
    def __init__(self) -> None:
        super().__init__(Plain(), Plain())
        self.stem.requires_grad_(False)
        self.body[0].f[0].requires_grad_(False)
        self.body[1].f[1].requires_grad_(False)


class Unused(Trunk):
    def __init__(self) -> None:
        super().__init__(Plain(), Plain())
        self.spare = nn.Linear(3, 3)


# ---------------------------------------------------------------- state


class PlainTensor(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(0.5, 1.5, C).view(C, 1, 1)
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.scale * self.f(x))


class TransientBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, C).view(C, 1, 1), persistent=False)
        self.block = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x * self.scale)


class Counter(nn.Module):
    """Counts its forward passes, and scales by a running mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("average", torch.ones(C, 1, 1))
        self.f = conv_bn()
        self.g = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.g(x)
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)).view(C, 1, 1), alpha=0.1)
        x = x * self.average.clone() + self.calls.clone()
        return x + branch(self, self.f(x))


class Remembers(nn.Module):
    """Leaves a value behind as a plain attribute, which no graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x + branch(self, self.f(x))


class NoGradStem(nn.Module):
    """The stem is trained by nobody, whatever its parameters say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, C)
        self.a = Plain()
        self.b = Plain()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.b(self.a(x))


# ---------------------------------------------------------------- signatures


class Outputs(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.a = Plain()
        self.b = Plain()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.b(self.a(x))
        return self.wrap(x.mean((2, 3)), y)


class Pair(NamedTuple):
    pooled: Tensor
    features: Tensor


@dataclass
class Record:
    pooled: Tensor
    features: Tensor
    note: str = "kept"


class DictInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.block(batch["image"]) * batch["weight"]


class OptionalMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.block = Plain(nn.Linear(D, D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.fc(x)
        if mask is not None:
            x = x * mask
        return self.block(x)


class VarArgs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Plain()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.block(xs[0]) * xs[1]


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + branch(self, self.f(x * mask))


class SideInput(nn.Module):
    """The mask is read by the removable branch alone; the position table by another."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MaskedBlock()
        self.table = nn.Parameter(torch.rand(T, D))
        self.other = MaskedBlock()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.other(self.block(x, mask), self.table)


class Factories(nn.Module):
    """Tensors made inside forward, from the shape of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(T, D)
        self.block = Plain(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = x * self.table(torch.arange(length, device=x.device))
        x = torch.cat([torch.zeros(batch, 1, width, dtype=x.dtype, device=x.device), x], 1)
        return self.block(x) + torch.ones(x.shape[1], 1)


class Asserts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Plain(), Plain())

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == C, "wrong channels"
        if x.dim() != 4:
            raise ValueError("not an image")
        return self.body(x)


# ---------------------------------------------------------------- modes and chance


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, F.dropout(self.f(x), 0.3, training=self.training))


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class DropPathBlock(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.f = conv_bn()
        self.drop_path = DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + branch(self, self.drop_path(self.f(x)))


class Auxiliary(nn.Module):
    """One output in eval mode, two in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.body = nn.Sequential(Plain(), Plain())
        self.aux = conv(C, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.body(x)
        if self.training:
            return y, self.aux(x)
        return y


class ModeScaled(nn.Module):
    """The block itself computes something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        if self.training:
            out = out * 0.5
        return x + branch(self, out)


class LayerDrop(nn.Module):
    """Skips a whole layer by a draw that Python's `if` looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.body = nn.ModuleList([Plain(), Plain()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.body:
            if self.training and torch.rand(1).item() < 0.5:
                continue
            x = layer(x)
        return x


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.body = nn.Sequential(Plain(), Plain())
        self.head = conv(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        if x.sum() > 0:
            x = -x
        return self.head(x)


class Undecided(nn.Module):
    """A module that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 100 else -self.conv(x)


class OpaqueMerge(nn.Module):
    """A merge inside a module that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.f = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if x.mean() < 100 else x


class UntraceableBody(nn.Module):
    """Blocks inside a module that no tracer can follow, and that is called by one that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Plain(), Plain())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return -x if x.mean() > 100 else x


# ---------------------------------------------------------------- attention and tokens


class MultiheadLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + branch(self, y, "attention")
        return x + branch(self, self.mlp(self.norm2(x)), "mlp")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attention = Attention()
        self.drop = nn.Dropout(0.3)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + branch(self, self.drop(self.attention(self.norm1(x))), "attention")
        return x + branch(self, self.drop(self.mlp(self.norm2(x))), "mlp")


class PostNormLayer(nn.Module):
    """The norms stand behind the merges, and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm1 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
        self.norm2 = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + branch(self, self.attention(x), "attention"))
        return self.norm2(x + branch(self, self.mlp(x), "mlp"))


class Tokens(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(D, V)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(index)))


class LoopInRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, C)
        self.blocks = nn.ModuleList(conv_bn() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x + branch(self, block(x), str(i))
        return x


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(3, C)
        self.b = conv_bn(3 + C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x)], 1)
        return torch.cat([x, self.b(x)], 1)


class Generic(nn.Module):
    """x + f(x) for any f, and then again."""

    def __init__(self, stem: nn.Module, f: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.a = Plain(f())
        self.b = Plain(f())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.Sequential(nn.Linear(D, D), layer)


def deep(blocks: int) -> nn.Module:
    """Return a net of `blocks` residual blocks; for tests of size, not of rules."""
    return nn.Sequential(nn.Linear(D, D), *(Plain(nn.Linear(D, D)) for _ in range(blocks)))


# ---------------------------------------------------------------- the zoo


def _layer_branches(path: str) -> tuple[Branch, ...]:
    """The two branches of a pre-norm layer."""
    return (
        Branch(
            Tap(path, "attention"),
            f"{path}.attention",
            path,
            (f"{path}.norm1.", f"{path}.attention."),
        ),
        Branch(Tap(path, "mlp"), f"{path}.mlp", path, (f"{path}.norm2.", f"{path}.mlp.")),
    )


def _post_norm_branches(path: str) -> tuple[Branch, ...]:
    return tuple(
        Branch(Tap(path, key), f"{path}.{key}", path, (f"{path}.{key}.",))
        for key in ("attention", "mlp")
    )


def _functions(*paths: str) -> tuple[Branch, ...]:
    """Blocks of which only the part `f` goes."""
    return tuple(Branch(Tap(path), path, path, (f"{path}.f.",)) for path in paths)


def _body(n: int) -> tuple[Branch, ...]:
    return named(*(f"body.{i}" for i in range(n)))


def _trunk(*body: Callable[[], nn.Module], act: Callable[[], nn.Module] | None = None) -> Any:
    return lambda: Trunk(*(make() for make in body), act=None if act is None else act())


def _with_mask(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, T, D), "mask": torch.rand(batch, T, 1)}


ENTRIES: tuple[Entry, ...] = (
    # --- shortcuts
    Entry(
        "resnet",
        ResNet,
        images,
        named("layer1.0", "layer1.1", "layer2.1"),
        {"projection_shortcut": 1},
    ),
    Entry("resnet_one_by_one", lambda: Trunk(Block(), act=nn.ReLU(True)), images, _body(1), {}),
    Entry(
        "option_a",
        lambda: Trunk(Block(), PadShortcut(), width=2 * C, act=nn.ReLU(inplace=True)),
        images,
        _body(1),
        {"shape_change": 1},
    ),
    Entry("pre_activation", _trunk(PreAct, PreAct), images, _body(2), {}),
    Entry("pre_activation_not_in_place", _trunk(lambda: PreAct(False)), images, _body(1), {}),
    Entry(
        "pre_activation_mutates",
        _trunk(PreActMutating, Plain, PreActMutating),
        images,
        named("body.1"),
        {"mutates_shortcut": 2},
    ),
    Entry(
        # The write stands before the branch's first value: it may be read as the block's own,
        # which is refused, or as something done to x before the block.
        "view_mutates",
        _trunk(ViewMutating, Plain),
        images,
        (Branch(Tap("body.0"), "body.0", "body.0", required=False), *named("body.1")),
    ),
    Entry(
        "scaled_shortcut",
        _trunk(*(lambda how=how: ScaledShortcut(how) for how in ("product", "alpha", "quotient"))),
        images,
        (),
        {"scaled_shortcut": 3},
    ),
    Entry(
        "alpha_on_branch",
        _trunk(lambda: AlphaBranch(False), lambda: AlphaBranch(True)),
        images,
        _body(2),
        {},
    ),
    Entry("layer_scale", _trunk(LayerScale, LayerScale), images, _body(2), {}),
    Entry("norm_free", _trunk(NormFree, NormFree), images, _body(2), {}),
    Entry(
        "identity_shortcut",
        _trunk(lambda: IdentityShortcut("module"), lambda: IdentityShortcut("clone")),
        images,
        _body(2),
        {},
    ),
    Entry("broadcast_branch", _trunk(BroadcastBranch), images, _body(1), {}),
    Entry("broadcast_shortcut", BroadcastShortcut, images, (), {"shape_change": 1}),
    Entry("dtype_change", DtypeChange, maps, (), {"shape_change": 1}),
    Entry(
        "no_parameters", _trunk(NoParameters, Plain), images, named("body.1"), {"no_parameters": 1}
    ),
    # --- merges
    Entry(
        "merge_forms",
        _trunk(*(lambda how=how: Merge(how) for how in MERGES)),
        images,
        _body(len(MERGES)),
        {},
    ),
    Entry(
        "parallel",
        _trunk(Parallel),
        images,
        (
            Branch(Tap("body.0", "a"), "body.0.a", "body.0", ("body.0.a.",)),
            Branch(Tap("body.0", "b"), "body.0.b", "body.0", ("body.0.b.",)),
        ),
        {},
        layers=("body.0",),
    ),
    Entry(
        "summed_branches",
        _trunk(SummedBranches),
        images,
        (
            Branch(Tap("body.0", "a"), "body.0.a", "body.0", ("body.0.a.",)),
            Branch(Tap("body.0", "b"), "body.0.b", "body.0", ("body.0.b.",)),
        ),
        {},
        layers=("body.0",),
    ),
    Entry(
        "nested",
        lambda: Trunk(Plain(nn.Sequential(conv_bn(), Plain(), nn.ReLU(inplace=True), conv()))),
        images,
        named("body.0.f.1", "body.0"),
        {},
        contains={"body.0": ("body.0.f.1",)},
    ),
    Entry(
        "long_skip",
        LongSkip,
        images,
        (*named("body.0", "body.2"), Branch(Tap(""), None, "", ("body.",))),
        {},
    ),
    Entry("escapes_by_return", EscapesByReturn, maps, (), {"branch_escapes": 1}),
    Entry(
        "escapes_by_use",
        _trunk(EscapesByUse),
        images,
        (Branch(Tap("body.0"), "body.0.g", "body.0", ("body.0.g.",)),),
        {},
    ),
    Entry(
        "two_inputs",
        TwoInputs,
        lambda b: (*maps(b), *maps(b)),
        (),
        {"independent_operands": 1},
    ),
    Entry("position", Position, tokens, named("block"), {"independent_operands": 1}),
    Entry("statement_in_place", _trunk(StatementInPlace, Plain), images, _body(2), {}),
    Entry(
        # The backward pass needs what the merge overwrites: such a net can only be run.
        "inference_only",
        _trunk(lambda: Merge("shortcut.add_"), Plain),
        images,
        _body(2),
        {},
    ),
    Entry(
        "view_in_place",
        _trunk(ViewInPlace, Plain),
        images,
        (Branch(Tap("body.0"), "body.0", "body.0", required=False), *named("body.1")),
    ),
    # --- activations behind the merge
    Entry(
        "relu_again",
        _trunk(lambda: Post(nn.ReLU()), lambda: Post(nn.ReLU(inplace=True)), act=nn.ReLU),
        images,
        _body(2),
        {},
    ),
    Entry(
        "relu6_again",
        _trunk(lambda: Post(nn.ReLU6()), lambda: Post(nn.ReLU6(inplace=True)), act=nn.ReLU6),
        images,
        _body(2),
        {},
    ),
    Entry(
        "hardtanh_again",
        _trunk(
            lambda: Post(nn.Hardtanh()), lambda: Post(nn.Hardtanh(inplace=True)), act=nn.Hardtanh
        ),
        images,
        _body(2),
        {},
    ),
    Entry(
        # ReLU6 behind ReLU cuts at 6, GELU and Tanh never repeat: nothing may be dropped.
        "activation_stays",
        _trunk(*(lambda a=a: Post(a()) for a in (nn.ReLU6, nn.GELU, nn.Tanh)), act=nn.ReLU),
        images,
        _functions("body.0", "body.1", "body.2"),
        {},
    ),
    Entry("relu_in_place_on_shared", DropLast, images, _functions("block"), {}),
    Entry("write_behind_read", WriteBehindRead, images, named("a", "b"), {}),
    Entry(
        "norm_after_merge",
        _trunk(NormAfterMerge, NormAfterMerge),
        images,
        _functions("body.0", "body.1"),
        {},
    ),
    # --- sharing
    Entry(
        "shared_function",
        SharedFunction,
        images,
        (Branch(Tap("", call=0), None, "", ()), Branch(Tap("", call=1), None, "", ())),
        {},
    ),
    Entry(
        "shared_block",
        SharedBlock,
        images,
        (
            Branch(Tap("block", call=0), None, "block", ()),
            Branch(Tap("block", call=1), None, "block", ()),
        ),
        {},
    ),
    Entry(
        "shared_weight",
        SharedWeight,
        images,
        (
            Branch(Tap("a"), "a", "a", ("a.f.1.",)),
            Branch(Tap("b"), "b", "b", ("b.f.1.",)),
        ),
        {},
    ),
    Entry(
        "aliased",
        Aliased,
        images,
        (Branch(Tap("first"), None, None, ("first.", "second.")), *named("last")),
        {},
    ),
    Entry(
        "aliased_calls",
        AliasedCalls,
        images,
        (
            Branch(Tap("first", call=0), None, None, ()),
            Branch(Tap("first", call=1), None, None, ()),
        ),
        {},
    ),
    Entry("empty_sequential", _trunk(EmptyShortcut, EmptyShortcut), images, _body(2), {}),
    Entry("frozen", Frozen, images, _body(2), {}),
    Entry("unused", Unused, images, _body(2), {}, unused=("spare.",)),
    # --- state
    Entry("plain_tensor", _trunk(PlainTensor, PlainTensor), images, _body(2), {}),
    Entry("transient_buffer", TransientBuffer, maps, named("block"), {}),
    Entry(
        "counter",
        _trunk(Counter, Counter),
        images,
        (
            Branch(Tap("body.0"), None, "body.0", ("body.0.f.",)),
            Branch(Tap("body.1"), None, "body.1", ("body.1.f.",)),
        ),
    ),
    Entry("remembers", _trunk(Remembers, Plain), images, named("body.1"), {"opaque": 1}),
    Entry("no_grad_stem", NoGradStem, images, named("a", "b"), {}),
    Entry(
        "weight_norm",
        _trunk(
            lambda: Plain(parametrizations.weight_norm(conv())),
            lambda: Plain(nn.Sequential(parametrizations.weight_norm(conv()), nn.ReLU(), conv())),
        ),
        images,
        _body(2),
        {},
    ),
    # --- signatures
    Entry(
        "output_dict", lambda: Outputs(lambda p, f: {"p": p, "f": f}), images, named("a", "b"), {}
    ),
    Entry("output_tuple", lambda: Outputs(lambda p, f: (p, f)), images, named("a", "b"), {}),
    Entry("output_list", lambda: Outputs(lambda p, f: [p, None, f]), images, named("a", "b"), {}),
    Entry(
        "output_ordered_dict",
        lambda: Outputs(lambda p, f: OrderedDict([("f", f), ("p", p)])),
        images,
        named("a", "b"),
        {},
    ),
    Entry("output_named_tuple", lambda: Outputs(Pair), images, named("a", "b"), {}),
    Entry("output_dataclass", lambda: Outputs(Record), images, named("a", "b"), {}),
    Entry(
        "input_dict",
        DictInput,
        lambda b: ({"image": maps(b)[0], "weight": torch.rand(1)},),
        named("block"),
        {},
    ),
    Entry("optional_mask_absent", OptionalMask, tokens, named("block"), {}),
    Entry("optional_mask_given", OptionalMask, _with_mask, named("block"), {}),
    Entry("var_args", VarArgs, lambda b: (*maps(b), torch.rand(1)), named("block"), {}),
    Entry(
        "side_input",
        SideInput,
        lambda b: (*tokens(b), torch.rand(b, T, 1)),
        (*named("block"), Branch(Tap("other"), "other", "other", ("other.", "table"))),
        {},
    ),
    Entry("factories", Factories, tokens, named("block")),
    Entry("asserts", Asserts, maps, _body(2), {}),
    # --- modes and chance
    Entry("functional_dropout", _trunk(FunctionalDropout, FunctionalDropout), images, _body(2), {}),
    Entry(
        "dropout_module",
        _trunk(*(lambda: Plain(nn.Sequential(conv_bn(), nn.Dropout(0.3))) for _ in range(2))),
        images,
        _body(2),
        {},
    ),
    Entry(
        "drop_path",
        _trunk(*(lambda p=p: DropPathBlock(p) for p in (0.0, 0.3, 0.5))),
        images,
        _body(3),
        {},
    ),
    Entry("auxiliary_head", Auxiliary, images, _body(2), {}),
    Entry(
        "mode_scaled",
        _trunk(ModeScaled, Plain),
        images,
        (Branch(Tap("body.0"), "body.0", "body.0", required=False), *named("body.1")),
        {},
    ),
    Entry("layer_drop", LayerDrop, images, _body(2), {}, salts=(0, 1, 2, 3, 4)),
    Entry("control_flow", ControlFlow, images, _body(2), {}),
    Entry("untraceable_leaf", _trunk(lambda: Plain(Undecided()), Plain), images, _body(2), {}),
    Entry(
        "untraceable_part",
        _trunk(UntraceableBody, Plain, Plain),
        images,
        named("body.0.body.0", "body.0.body.1", "body.1", "body.2"),
        {},
    ),
    Entry("opaque", _trunk(OpaqueMerge, Plain), images, named("body.1"), {"opaque": 1}),
    # --- attention and tokens
    Entry(
        "multihead",
        lambda: nn.Sequential(MultiheadLayer(), MultiheadLayer()),
        tokens,
        (*_layer_branches("0"), *_layer_branches("1")),
        {},
        layers=("0", "1"),
    ),
    Entry(
        "attention",
        lambda: Tokens(Layer(), Layer()),
        indices,
        (*_layer_branches("layers.0"), *_layer_branches("layers.1")),
        {},
        layers=("layers.0", "layers.1"),
    ),
    Entry(
        "post_norm",
        lambda: Tokens(PostNormLayer(), PostNormLayer()),
        indices,
        (*_post_norm_branches("layers.0"), *_post_norm_branches("layers.1")),
        {},
    ),
    Entry(
        "transformer_encoder_layer",
        lambda: encoder(True),
        tokens,
        (
            Branch(Hook("1.dropout1"), None, "1", ("1.norm1.", "1.self_attn."), False),
            Branch(Hook("1.dropout2"), None, "1", ("1.norm2.", "1.linear1.", "1.linear2."), False),
        ),
    ),
    Entry(
        "loop_in_root",
        LoopInRoot,
        images,
        tuple(Branch(Tap("", str(i)), f"blocks.{i}", "", (f"blocks.{i}.",)) for i in range(3)),
        {},
    ),
    Entry("vgg", lambda: nn.Sequential(conv_bn(3, C), nn.ReLU(), conv_bn()), images, (), {}),
    Entry("densenet", DenseNet, images, (), {}),
    Entry(
        "conv1d",
        lambda: Generic(nn.Conv1d(2, C, 1), lambda: nn.Conv1d(C, C, 3, padding=1)),
        lambda b: (torch.randn(b, 2, 9),),
        named("a", "b"),
        {},
    ),
    Entry(
        "conv3d",
        lambda: Generic(nn.Conv3d(2, C, 1), lambda: nn.Conv3d(C, C, 3, padding=1)),
        lambda b: (torch.randn(b, 2, 3, 4, 4),),
        named("a", "b"),
        {},
    ),
    Entry(
        "embedding",
        lambda: Generic(nn.Embedding(V, D), lambda: nn.Linear(D, D)),
        indices,
        named("a", "b"),
        {},
    ),
)

BY_NAME: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}

_SHARING = ("shared_function", "shared_block", "aliased_calls")
shared_norms_are_told = pytest.mark.filterwarnings(
    "ignore:.*called by a removed branch and by what stays"
)
"""For tests that cut those: branches share a normalisation, and a warning comes with the ticket."""


def cases(entries: Iterable[Entry]) -> list[Any]:
    """Return entries as parameters of a test that cuts them."""
    return [
        pytest.param(
            entry,
            id=entry.name,
            marks=[shared_norms_are_told] if entry.name in _SHARING else [],
        )
        for entry in entries
    ]
