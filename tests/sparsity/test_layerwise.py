from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockprune.errors import CriterionError
from blockprune.sparsity import Mask, importance_of
from blockprune.sparsity.importances import OF_LAYERS


def values(name: str, weights: list[float], keep: list[bool] | None = None) -> list[float]:
    layer = torch.nn.Linear(len(weights), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
    mask = Mask({"weight": torch.tensor([keep or [True] * len(weights)])})
    found = importance_of(name, layer, mask)["weight"]
    assert found.dtype == torch.float64
    return found[0].tolist()


def by_hand(name: str, survivors: list[float]) -> list[float]:
    """The formulas in plain Python."""
    w = [abs(v) for v in survivors]
    if name == "magnitude":
        return w
    if name == "l1":
        return [v / sum(w) if sum(w) else 0.0 for v in w]
    if name == "l2":
        return [v**2 / sum(u**2 for u in w) if sum(w) else 0.0 for v in w]
    if name == "softmax":
        return [math.exp(v) / math.fsum(math.exp(u) for u in w) for v in w]
    if name == "minmax":
        low, high = min(w), max(w)
        return [(v - low) / (high - low) if high > low else 1.0 for v in w]
    return [v**2 / sum(u**2 for u in w if u >= v) if v else 0.0 for v in w]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [1, 2, 3]),
        ("l1", [1 / 6, 2 / 6, 3 / 6]),
        ("l2", [1 / 14, 4 / 14, 9 / 14]),
        ("minmax", [0, 1 / 2, 1]),
        ("lamp", [1 / 14, 4 / 13, 1]),
    ],
)
def test_numbers(name: str, expected: list[float]) -> None:
    assert values(name, [1.0, -2.0, 3.0]) == pytest.approx(expected, abs=0, rel=1e-12)


@pytest.mark.parametrize("name", OF_LAYERS)
@given(
    pairs=st.lists(
        st.tuples(st.integers(-8, 8).map(lambda n: n / 4), st.booleans()), min_size=1, max_size=8
    )
)
def test_formulas_over_the_survivors(name: str, pairs: list[tuple[float, bool]]) -> None:
    weights, keep = [w for w, _ in pairs], [k for _, k in pairs]
    found = values(name, weights, keep)
    survivors = [w for w, k in pairs if k]
    expected = by_hand(name, survivors) if survivors else []
    assert [f for f, k in zip(found, keep, strict=True) if k] == pytest.approx(expected, rel=1e-9)
    assert all(f == 0 for f, k in zip(found, keep, strict=True) if not k)


def test_the_lower_bound_of_softmax() -> None:
    weights = (torch.randn(5000) * math.sqrt(2 / 5000)).tolist()
    found = values("softmax", weights)
    bound = 1 / math.fsum(math.exp(abs(w)) for w in weights)
    assert min(found) >= bound * (1 - 1e-6)
    assert min(found) == pytest.approx(1 / 5000, rel=0.03)
    assert math.fsum(found) == pytest.approx(1)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_extreme_weights_do_not_overflow_or_vanish(name: str) -> None:
    for scale in (1e-30, 1e30):
        found = values(name, [1 * scale, 2 * scale, 3 * scale])
        assert all(map(math.isfinite, found))
        if name != "softmax":
            assert 0 <= found[0] < found[1] < found[2]


def test_one_and_no_survivor() -> None:
    for name in OF_LAYERS:
        assert values(name, [5.0, 7.0], [False, False]) == [0.0, 0.0]
        alone = values(name, [5.0, 7.0], [False, True])
        assert alone == [0.0, 7.0 if name == "magnitude" else 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_double(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(300, 300).to(dtype)
    found = importance_of("l1", layer, Mask.full(layer))["weight"]
    assert float(found.sum()) == pytest.approx(1)


def test_functions_of_ones_own() -> None:
    layer = torch.nn.Linear(3, 1)
    mask = Mask({"weight": torch.tensor([[True, True, False]])})
    before = layer.weight.detach().clone()

    def rank(weight_abs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        keep.fill_(True)
        return weight_abs.mul_(2)

    found = importance_of(rank, layer, mask)["weight"]
    assert found[0, :2].tolist() == (2 * before.abs().double())[0, :2].tolist()
    assert found[0, 2] == 0
    assert layer.weight.equal(before)
    assert mask.kept == 2
    with pytest.raises(CriterionError, match="returned \\(\\) for weight"):
        importance_of(lambda w, k: w.sum(), layer, mask)
    with pytest.raises(CriterionError, match="failed on weight: ZeroDivisionError"):
        importance_of(lambda w, k: w * (1 // 0), layer, mask)
    with pytest.raises(CriterionError, match="Did you mean magnitude"):
        importance_of("magnitud", layer, mask)
    with pytest.raises(CriterionError, match="not int"):
        importance_of(3, layer, mask)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named() -> None:
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight[0, 1] = torch.nan
    for name in OF_LAYERS:
        with pytest.raises(CriterionError, match="weight is not finite in 1 of the weights"):
            importance_of(name, layer, Mask.full(layer))
        others = Mask({"weight": torch.tensor([[True, False, True]])})
        assert importance_of(name, layer, others)["weight"].isfinite().all()


def test_an_importance_that_is_no_number_is_named() -> None:
    layer = torch.nn.Linear(3, 1)
    mask = Mask({"weight": torch.tensor([[True, False, True]])})

    def undefined(weight_abs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return weight_abs * torch.tensor([torch.nan, torch.nan, 1.0])

    # Of a weight that is gone it does not matter.
    with pytest.raises(CriterionError, match="'undefined' is NaN for 1 weights of weight"):
        importance_of(undefined, layer, mask)
