"""Which of two equally long ways around is called the shortcut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from blockprune import Reason


class Sum(nn.Module):
    """One convolution, and something else as long, added."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.other(x)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda x: x * 0.5, Reason.SCALED_SHORTCUT),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), Reason.PROJECTION_SHORTCUT),
        (lambda x: x.mean((2, 3), keepdim=True), Reason.SHAPE_CHANGE),
        (nn.Conv2d(4, 4, 1), Reason.PROJECTION_SHORTCUT),
    ],
    ids=["scaled", "pooled", "averaged", "convolved"],
)
def test_the_reason_is_that_of_the_shortcut(
    other: Callable[[Tensor], Tensor], reason: Reason
) -> None:
    analysis = blockprune.find_blocks(nn.Sequential(Sum(other)), torch.rand(2, 4, 8, 8))
    assert [rejection.reason for rejection in analysis.rejections] == [reason]


class Written(nn.Module):
    """A branch of two convolutions, and a merge written in some way."""

    def __init__(self, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1))
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.f(x))


@pytest.mark.parametrize(
    ("merge", "reason", "detail"),
    [
        (lambda x, y: y + x.relu(), Reason.INDEPENDENT_OPERANDS, "the shorter one goes through"),
        (lambda x, y: y * (x + x), Reason.NO_PARAMETERS, "reads no parameter"),
        (lambda x, y: (x + y) + y, Reason.BRANCH_ESCAPES, "also read by"),
    ],
    ids=["an activation on the shortcut", "doubled", "added twice"],
)
def test_a_sum_that_no_branch_leaves_exactly_is_refused(
    merge: Callable[[Tensor, Tensor], Tensor], reason: Reason, detail: str
) -> None:
    analysis = blockprune.find_blocks(Written(merge), torch.rand(2, 4, 8, 8))
    assert analysis.blocks == ()
    assert [(r.reason, detail in r.detail) for r in analysis.rejections][:1] == [(reason, True)]


@pytest.mark.parametrize(
    "merge",
    [
        lambda x, y: torch.add(x, other=y),
        lambda x, y: torch.add(other=x, input=y),
        lambda x, y: torch.add(x, x2=y),
        lambda x, y: torch.add(x1=y, x2=x),
        lambda x, y: x.add(other=y),
        lambda x, y: (x + y).reshape(x.shape[:2] + x.shape[2:]),
        lambda x, y: (x + y)[:, : x.size(1) + x.size(2)],
    ],
    ids=["other", "input and other", "x2", "x1 and x2", "method", "sizes joined", "sizes added"],
)
def test_an_add_is_a_merge_however_its_operands_are_given_and_only_of_tensors(
    merge: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model, images = Written(merge), torch.rand(2, 4, 8, 8)
    analysis = blockprune.find_blocks(model, images)
    assert (len(analysis.blocks), analysis.rejections) == (1, ())
    ticket = blockprune.remove_blocks(model, analysis.names, images)
    assert torch.equal(ticket(images), images)
    assert not list(ticket.parameters())
