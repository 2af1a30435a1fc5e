from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from blockprune.errors import MeasurementError
from blockprune.similarity import MinibatchCKA, linear_cka, minibatch_cka


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


def unbiased_hsic(k: Tensor, m: Tensor) -> float:
    """The formula as it is written: Song et al., "Feature selection via dependence", 2012."""
    n = len(k)
    k, m = (gram.clone().fill_diagonal_(0) for gram in (k, m))
    one = torch.ones(n, dtype=torch.float64)
    return float(
        torch.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ k @ m @ one) / (n - 2)
    ) / (n * (n - 3))


class TestMinibatches:
    @pytest.mark.parametrize("sizes", [(4,), (4, 7), (16, 5, 9)])
    def test_it_is_the_ratio_of_the_mean_unbiased_hsics(self, sizes: tuple[int, ...]) -> None:
        batches = []
        for n in sizes:
            x = torch.randn(n, 6, dtype=torch.float64) + 3
            batches.append((x, torch.randn(n, 4, dtype=torch.float64) + x[:, :1]))
        sums = [0.0, 0.0, 0.0]
        for x, y in batches:
            k, m = x @ x.T, y @ y.T
            for place, pair in enumerate(((k, m), (k, k), (m, m))):
                sums[place] += unbiased_hsic(*pair)
        expected = sums[0] / math.sqrt(sums[1] * sums[2])
        assert minibatch_cka(batches) == pytest.approx(expected, rel=1e-9)

    def test_independent_features_are_not_alike(self) -> None:
        found = [
            minibatch_cka([(torch.randn(64, 20), torch.randn(64, 20)) for _ in range(40)])
            for _ in range(5)
        ]
        assert sum(found) / 5 == pytest.approx(0, abs=0.02)

    def test_the_size_of_the_batches_does_not_matter(self) -> None:
        x = torch.randn(3000, 12, dtype=torch.float64)
        y = x @ torch.randn(12, 8, dtype=torch.float64) + torch.randn(3000, 8)
        whole = minibatch_cka([(x, y)])
        by_20 = minibatch_cka(list(zip(x.split(20), y.split(20), strict=True)))
        assert by_20 == pytest.approx(whole, abs=0.02)
        assert whole == pytest.approx(linear_cka(x, y), abs=0.005)

    def test_rotation_scale_and_shift_do_not_matter(self) -> None:
        x = torch.randn(24, 6, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
        pairs = [(part, 3 * part @ rotation + 500) for part in x.split(8)]
        assert minibatch_cka(pairs) == pytest.approx(1, abs=1e-12)

    def test_many_at_once_equal_one_by_one(self) -> None:
        meter = MinibatchCKA()
        batches = [[torch.randn(8, width) for width in (3, 5, 40)] for _ in range(3)]
        for xs in batches:
            meter.update(xs, xs[:2])
        values = meter.values()
        assert values.shape == (3, 2)
        for row in range(3):
            for column in range(2):
                pairs = [(xs[row], xs[column]) for xs in batches]
                assert float(values[row, column]) == pytest.approx(minibatch_cka(pairs))

    def test_constant_features_are_like_nothing(self) -> None:
        assert math.isnan(minibatch_cka([(torch.randn(5, 3), torch.full((5, 2), 0.1))]))

    def test_what_cannot_be_compared_is_an_error(self) -> None:
        x = torch.randn(4, 2)
        with pytest.raises(MeasurementError, match="no samples"):
            minibatch_cka([])
        with pytest.raises(MeasurementError, match="at least 4 samples; this one has 3"):
            minibatch_cka([(x[:3], x[:3])])
        with pytest.raises(MeasurementError, match=r"got shapes \(4, 2\), \(5, 2\)"):
            minibatch_cka([(x, torch.randn(5, 2))])
        with pytest.raises(MeasurementError, match="got 1 and 0"):
            MinibatchCKA().update([x], [])
        meter = MinibatchCKA()
        meter.update([x], [x])
        with pytest.raises(MeasurementError, match="1 and 2 features, those before 1 and 1"):
            meter.update([x], [x, x])
