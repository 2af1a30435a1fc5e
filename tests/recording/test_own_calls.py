"""Modules whose class has a `__call__` of its own, which does more than to call the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import VerificationError
from tests.recording.law import Trial, right
from tests.recording.nets import WIDTH, features


class Layer(nn.Module):
    """Has one linear map, and reads a number of a tensor where it is told to."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(WIDTH, WIDTH), reads

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        if self.reads and x.abs().sum().item() > 1e9:
            return x
        return self.linear(x) * scale


class HandingOn(Layer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Doubling(Layer):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


class Normalising(Layer):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x / int(x.abs().max() + 1))


class Pairing(Layer):
    def __call__(self, x: Tensor) -> Any:
        return {"output": super().__call__(x)}


class Scaling(Layer):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x, scale=3.0)


class Repeating(Layer):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(super().__call__(x))


class Counting(Layer):
    calls = 0

    def __call__(self, x: Tensor) -> Any:
        self.calls += 1
        return super().__call__(x) * (1 + self.calls % 2)


class Inheriting(Doubling):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + 1


KINDS = [HandingOn, Doubling, Normalising, Pairing, Scaling, Repeating, Counting, Inheriting]


class Block(nn.Module):
    def __init__(self, kind: type[Layer], reads: bool) -> None:
        super().__init__()
        self.layer, self.f = kind(reads), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return x + self.f(torch.relu(y["output"] if isinstance(y, dict) else y))


class Net(nn.Sequential):
    def __init__(self, kind: type[Layer], reads: bool) -> None:
        blocks = [Block(kind, reads) for _ in range(3)]
        super().__init__(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, 2))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_call_does_around_the_forward_is_done_once(kind: type[Layer], reads: bool) -> None:
    before = vars(kind)["__call__"]
    trials = [Trial(features(count), train) for count in (1, 5) for train in (False, True)]
    right(Net(kind, reads), features(), trials, cut="2", zero="2.f")
    assert vars(kind)["__call__"] is before


class Around(nn.Module):
    """A layer of blocks, to which its `__call__` adds an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.f = Block(HandingOn, False), nn.Linear(WIDTH, WIDTH)

    def __call__(self, x: Tensor) -> Any:
        return x + super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.block(x))


def test_what_is_inside_is_seen_and_what_is_not_is_said() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Around(), Around())
    analysis = blockprune.find_blocks(model, features())
    assert analysis.names == ("1.block", "2.block")
    assert "more in its __call__ than" in analysis.traced.opaque["1"]
    trials = [Trial(features(5), train) for train in (False, True)]
    right(model, features(), trials, cut="1.block", zero="1.block.f")


class Root(Net):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2 + 1


def test_a_root_with_a_call_of_its_own_is_kept_or_refused() -> None:
    model = Root(HandingOn, False)
    with pytest.raises(VerificationError, match="preserve_root"):
        blockprune.remove_blocks(model, "2", features())
    trials = [Trial(features(5), train) for train in (False, True)]
    right(model, features(), trials, cut="2", zero="2.f", preserve_root=True)
