"""Modes: forwards that do something else in training than in evaluation.

What the two modes hold in common is found and can go; what differs stays as it is, in both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from tests.recording.law import Trial, right, right_or_refused
from tests.recording.nets import WIDTH, Block, features

LATER = [
    Trial(features(3, 4, seed=1), train=True),
    Trial(features(3, 4, seed=1)),
    Trial(features(4, 2, seed=2), train=True, calls=2),
]


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Return the rows of a batch, some of them zero, as functional stochastic depth does."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
    return x * keep / (1 - p)


class Functional(Block):
    """Stochastic depth as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return x + drop_path(self.f(x), 0.4, self.training)


class InTraining(Block):
    """A statement of its own for training; both modes hold the same merge."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = functional.dropout(y, 0.3)
        return x + y


class InEvaluation(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y = y * torch.sigmoid(x) if self.training else y.clamp(-0.2, 0.2)
        return x + y


class TwoMerges(Block):
    """Each mode has an add of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + functional.dropout(self.f(x), 0.3)
        return x + self.f(x)


class Early(Block):
    """Evaluation returns first, as in ConvNeXt's older code."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.f(x)
        mask = torch.rand(x.shape[0], 1, 1) < 0.6
        return x + self.f(x) * mask / 0.6


class Noisy(Block):
    """Adds noise to what its branch reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.randn_like(x) * 0.3 if self.training else x
        return x + self.f(y)


class Dropped(Block):
    """The functional dropout of `self.training`, given by position or by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.dropout(self.f(x), 0.5, self.training)
        return functional.dropout(x, p=0.2, training=self.training)


class Given(Block):
    """Hands its mode to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.batch_norm(
            x.flatten(0, 1), self.mean, self.var, training=self.training, momentum=0.3
        )
        y = functional.alpha_dropout(y, 0.2, training=self.training)
        return x + self.f(y.view_as(x))


class ChosenByMode(Block):
    """Reads a number that depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        p = 0.5 if self.training else 0.0
        return x + functional.dropout(self.f(x), p, training=True) * (2 if self.training else 3)


class Everywhere(Block):
    """Asks a child for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.dropout.training and self.dropout.p > 0:
            y = self.dropout(y) * 2
        return x + y


SAME_MERGE = [Functional, InTraining, InEvaluation, Dropped, Given, Noisy, ChosenByMode, Everywhere]
BLOCKS = [*SAME_MERGE, TwoMerges, Early]


def net(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, 3))


@pytest.mark.parametrize("kind", SAME_MERGE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_merge_that_both_modes_hold_can_go(kind: type[Block], train: bool) -> None:
    model = net(kind(), kind(), kind()).train(train)
    assert blockprune.find_blocks(model, features()).names == ("1", "2", "3")
    ticket = right(model, features(), LATER, cut="2", zero="2.f")
    assert ticket.training is True or not train


@pytest.mark.parametrize("kind", [TwoMerges, Early], ids=lambda kind: kind.__name__)
def test_a_merge_of_each_mode(kind: type[Block]) -> None:
    right_or_refused(net(kind(), kind()), features(), LATER, cut="1", zero="1.f")


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_plain_block_beside_it_can_go(kind: type[Block], preserve_root: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), Plain(), kind())
    right(model, features(), LATER, cut="2", zero="2.f", preserve_root=preserve_root)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Projects(nn.Module):
    """Blocks of one class, of which only some differ by mode."""

    def __init__(self, how: str | None) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.how = how
        self.shortcut = nn.Linear(WIDTH, WIDTH) if how == "projection" else None
        self.p = 0.5 if how == "drops" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.shortcut is not None:
            if self.training:
                x = x.contiguous() * 1.0
            x = self.shortcut(x)
        if self.p > 0 and self.training:
            y = functional.dropout(y, self.p)
        if self.how == "counts":
            self.how = "counts"
            y = y * (2 if self.training else 1)
        return x + y


@pytest.mark.parametrize("how", ["projection", "drops", "counts"])
def test_one_instance_that_differs_hides_no_other(how: str) -> None:
    model = net(*[Projects(None) for _ in range(3)], Projects(how), Projects(None))
    found = blockprune.find_blocks(model, features()).names
    assert {"1", "2", "3", "5"} <= set(found)
    right(model, features(), LATER, cut=["2", "5"], zero=["2.f", "5.f"])


class LastOnly(nn.Module):
    """A root that returns something else in each mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Functional(), Plain(), Functional()])
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 4)])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        boxes = self.heads[0](x)
        if self.training:
            return {"boxes": boxes, "classes": self.heads[1](x)}
        return boxes.sigmoid(), self.heads[1](x).softmax(-1)


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("cut", ["blocks.0", "blocks.1"])
def test_a_root_that_returns_something_else_in_each_mode(cut: str, preserve_root: bool) -> None:
    right(LastOnly(), features(), LATER, cut=cut, zero=f"{cut}.f", preserve_root=preserve_root)


class Auxiliary(nn.Module):
    """A head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()
        self.auxiliary = nn.Sequential(Plain(), nn.Linear(WIDTH, 2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        auxiliary = self.auxiliary(x) if self.training else None
        x = self.head(self.second(x))
        return (x, auxiliary) if self.training else x


@pytest.mark.parametrize("cut", ["first", "second"])
def test_a_head_for_training_only(cut: str) -> None:
    right(Auxiliary(), features(), LATER, cut=cut, zero=f"{cut}.f")


def test_parts_in_different_modes() -> None:
    """A frozen part that stays in evaluation while the rest trains."""
    model = net(Dropped(), Dropped(), Dropped()).train()
    model[1].eval()
    trial = Trial(features(3), True, prepare=lambda module: module.get_submodule("0").eval())
    right(model, features(), [trial], cut="2", zero="2.f")
    ticket = blockprune.remove_blocks(model, "2", features())
    assert ticket.training
