from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blockprune.criteria import CRITERIA, Criterion
from blockprune.criteria.weights import L1, L2
from tests.criteria.batched import assert_untouched
from tests.criteria.nets import Net, context, pair


class Branch(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


def score(branch: nn.Module, x: Tensor, criterion: Criterion | None = None) -> float:
    (value,) = (criterion or CRITERIA["l1"])(context(Branch(branch), x)).values()
    return value


def test_mean_filter_norm_summed_over_layers() -> None:
    conv, wide = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]).view(4, 2, 1, 1))
        wide.weight.fill_(-0.5)
    expected = (3 + 7 + 11 + 15) / 4 + 4 * 9 * 0.5
    assert score(nn.Sequential(conv, wide), torch.zeros(1, 2, 5, 5)) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_the_filters_of_a_transposed_convolution_are_its_outputs(groups: int) -> None:
    up, down = nn.ConvTranspose1d(2, 6, 2, stride=2, groups=groups), nn.Conv1d(6, 2, 2, stride=2)
    nn.init.ones_(up.weight)
    nn.init.zeros_(down.weight)
    weights_per_output = 2 // groups * 2
    assert score(nn.Sequential(up, down), torch.zeros(1, 2, 4)) == weights_per_output


def test_two_norm_of_filters_summed_over_layers() -> None:
    conv, wide = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([3.0, -4, 6, 8, 0, 0, -5, 12]).view(4, 2, 1, 1))
        wide.weight.fill_(-0.5)
    expected = (5 + 10 + 0 + 13) / 4 + (4 * 9) ** 0.5 * 0.5
    assert score(nn.Sequential(conv, wide), torch.zeros(1, 2, 5, 5), L2()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_the_response_to_an_impulse_shows_a_filter_of_a_transposed_convolution(
    order: int, groups: int, dtype: torch.dtype
) -> None:
    """Its weights are the outputs of one channel to an impulse in each input channel."""
    up = nn.ConvTranspose2d(6, 9, 2, stride=2, groups=groups, bias=False).to(dtype)
    down = nn.Conv2d(9, 6, 2, stride=2).to(dtype)
    nn.init.zeros_(down.weight)
    impulses = torch.eye(6, dtype=dtype).view(6, 6, 1, 1)
    filters = up(impulses).detach().double().transpose(0, 1).flatten(1)
    expected = sum(float(row.abs().pow(order).sum() ** (1 / order)) for row in filters) / 9
    found = score(
        nn.Sequential(up, down), torch.zeros(1, 6, 3, 3, dtype=dtype), (L1, L2)[order - 1]()
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_small_weights_keep_their_two_norm_in_single_precision() -> None:
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, 1e-30)
    assert score(linear, torch.zeros(1, 4), L2()) == pytest.approx(2e-30, rel=1e-6)


def test_linear_rows_and_attention_projections_are_filters() -> None:
    linear = nn.Linear(3, 3)
    nn.init.ones_(linear.weight)
    assert score(linear, torch.zeros(1, 3)) == 3

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
            return out

    model = Attention()
    nn.init.ones_(model.attention.in_proj_weight)
    nn.init.ones_(model.attention.out_proj.weight)
    assert set(CRITERIA["l1"](context(model, torch.zeros(1, 3, 4))).values()) == {4.0 + 4.0}


def test_no_gradient_and_no_data_are_needed() -> None:
    model = Net().requires_grad_(False)
    images, _ = pair(2)
    scores = CRITERIA["l1"](context(model, images))
    expected = {
        f"blocks.{i}": sum(
            float(conv.weight.abs().sum((1, 2, 3)).mean()) for conv in (block.conv1, block.conv2)
        )
        for i, block in enumerate(model.blocks)
    }
    assert scores == pytest.approx(expected, rel=1e-12)
    expected = {
        f"blocks.{i}": sum(
            float(conv.weight.square().sum((1, 2, 3)).sqrt().mean())
            for conv in (block.conv1, block.conv2)
        )
        for i, block in enumerate(model.blocks)
    }
    assert L2()(context(model, images)) == pytest.approx(expected, rel=1e-12)


def test_the_model_is_untouched() -> None:
    for criterion in (L1(), L2()):
        assert_untouched(context(Net(), pair(2)[0]), criterion)
