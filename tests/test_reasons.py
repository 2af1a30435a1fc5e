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
