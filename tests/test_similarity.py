from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from blockprune.similarity import linear_cka


def hsic_cka(x: Tensor, y: Tensor) -> float:
    """The definition by Gram matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, m = (centre @ (f.numpy() @ f.numpy().T) @ centre for f in (x.double(), y.double()))
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


@pytest.mark.parametrize(("samples", "width"), [(4, 9), (9, 4), (6, 6), (3, 1)])
def test_both_ways_of_computing_it_give_the_definition(samples: int, width: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, width, generator=generator)
    y = torch.randn(samples, 5, generator=generator) + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(hsic_cka(x, y), rel=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-9)


def test_rotation_scale_and_shift_do_not_matter() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x @ torch.diag(torch.arange(6.0).double())) < 0.99


def test_independent_features_are_biased_upwards() -> None:
    found = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(64, 20, generator=generator) for _ in range(2))
        found.append(linear_cka(x, y))
    assert sum(found) / 5 == pytest.approx(0.23, abs=0.03)


def test_constant_features_are_like_nothing() -> None:
    x = torch.randn(5, 3)
    assert math.isnan(linear_cka(x, torch.full((5, 2), 0.1)))


@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((4,), (4, 2)), ((4, 2, 2), (4, 2))])
def test_shapes_that_are_no_features(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="as many samples"):
        linear_cka(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
