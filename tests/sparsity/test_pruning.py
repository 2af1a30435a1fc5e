from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockprune.errors import CriterionError, MaskError
from blockprune.sparsity import Mask, prune_lowest, random_like, random_mask, weights_to_prune


def sorted_away(
    scores: dict[str, list[float]], keep: dict[str, list[bool]], count: int
) -> set[Any]:
    """What goes, by sorting all survivors in Python."""
    survivors = [
        (score, layer, index)
        for layer, name in enumerate(keep)
        for index, score in enumerate(scores[name])
        if keep[name][index]
    ]
    return {(layer, index) for _, layer, index in sorted(survivors)[:count]}


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, list[float]], dict[str, list[bool]], int]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    # Few different values, so that many are equal.
    value = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, float("inf")])
    # Names out of order: ties go by the order of the layers and not by their names.
    names = [f"layer{9 - place}" for place in range(len(sizes))]
    scores = {
        n: draw(st.lists(value, min_size=s, max_size=s)) for n, s in zip(names, sizes, strict=True)
    }
    keep = {
        n: draw(st.lists(st.booleans(), min_size=s, max_size=s))
        for n, s in zip(names, sizes, strict=True)
    }
    survive = sum(map(sum, keep.values()))
    return scores, keep, draw(st.integers(0, survive))


@given(cases())
def test_prunes_exactly_what_a_sort_would(case: Any) -> None:
    scores, keep, count = case
    mask = Mask({name: torch.tensor(bits) for name, bits in keep.items()})
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    found = prune_lowest(tensors, mask, count)
    assert found.kept == mask.kept - count
    gone = {
        (layer, index)
        for layer, name in enumerate(keep)
        for index in range(len(keep[name]))
        if keep[name][index] and not found.keep[name][index]
    }
    assert gone == sorted_away(scores, keep, count)
    for name in keep:
        assert not (found.keep[name] & ~mask.keep[name]).any()


@given(cases())
def test_layers_share_the_count_and_each_loses_its_lowest(case: Any) -> None:
    scores, keep, count = case
    mask = Mask({name: torch.tensor(bits) for name, bits in keep.items()})
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    found = prune_lowest(tensors, mask, count, scope="layers")
    assert found.kept == mask.kept - count
    for name, layer in mask.layers.items():
        going = layer.kept - found.layers[name].kept
        assert abs(going - count * layer.kept / max(mask.kept, 1)) < 1
        alone = prune_lowest(tensors, Mask({name: mask.keep[name]}), going)
        assert alone.keep[name].equal(found.keep[name])


def test_ties_go_by_the_order_of_layers_and_then_by_index() -> None:
    mask = Mask({"z": torch.ones(2, 2) > 0, "a": torch.ones(3) > 0})
    scores = {"a": torch.zeros(3), "z": torch.zeros(2, 2)}
    found = prune_lowest(scores, mask, 5)
    assert found.keep["z"].tolist() == [[False, False], [False, False]]
    assert found.keep["a"].tolist() == [False, True, True]


def test_a_count_of_each_layer() -> None:
    mask = Mask({"a": torch.ones(3) > 0, "b": torch.ones(3) > 0})
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.1, 0.3, 0.2])}
    found = prune_lowest(scores, mask, 2, scope="layers", per_layer={"a": 2})
    assert found.keep["a"].tolist() == [True, False, False]
    assert found.layers["b"].kept == 3
    for wrong, match in (
        ({"a": 1}, "adds up to 1"),
        ({"a": 4}, "4 weights of a cannot be pruned: 3 survive"),
        ({"c": 2}, "no layer 'c'"),
    ):
        with pytest.raises(MaskError, match=match):
            prune_lowest(scores, mask, 2, scope="layers", per_layer=wrong)
    with pytest.raises(MaskError, match='scope="layers"'):
        prune_lowest(scores, mask, 2, per_layer={"a": 2})
    with pytest.raises(MaskError, match="'global' or 'layers'"):
        prune_lowest(scores, mask, 2, scope="locally")  # type: ignore[arg-type]


def test_what_has_no_order_is_refused() -> None:
    mask = Mask({"a": torch.tensor([True, True, False])})
    with pytest.raises(CriterionError, match="1 of the importances of a are NaN"):
        prune_lowest({"a": torch.tensor([1.0, torch.nan, 2.0])}, mask, 1)
    # Nobody looks at what is pruned already.
    assert prune_lowest({"a": torch.tensor([1.0, 2.0, torch.nan])}, mask, 1).kept == 1
    with pytest.raises(CriterionError, match="no importances were given for a"):
        prune_lowest({}, mask, 1)
    with pytest.raises(CriterionError, match=r"of a are \(2,\), and its weights \(3,\)"):
        prune_lowest({"a": torch.ones(2)}, mask, 1)
    for count in (3, -1, True, 1.0):
        with pytest.raises(MaskError, match="2 survive"):
            prune_lowest({"a": torch.ones(3)}, mask, count)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_importances_of_any_type(dtype: torch.dtype) -> None:
    mask = Mask({"a": torch.ones(4) > 0})
    found = prune_lowest({"a": torch.tensor([4, 1, 3, 2]).to(dtype)}, mask, 2)
    assert found.keep["a"].tolist() == [True, False, True, False]


def test_twenty_percent_of_the_remaining_a_round() -> None:
    mask = Mask({"a": torch.ones(600) > 0, "b": torch.ones(20, 20) > 0})
    scores = {"a": torch.rand(600), "b": torch.rand(20, 20)}
    counts = [mask.kept]
    for _ in range(3):
        mask = prune_lowest(scores, mask, weights_to_prune(mask, 0.2))
        counts.append(mask.kept)
    assert counts == [1000, 800, 640, 512]


@pytest.mark.parametrize(
    ("survive", "share", "count"),
    [(100, 0.29, 29), (10, 0.25, 2), (4, 0.2, 0), (7, 0.0, 0), (7, 1.0, 7), (3, 1 / 3, 0)],
)
def test_a_share_is_rounded_down_as_the_decimal_it_is(
    survive: int, share: float, count: int
) -> None:
    assert weights_to_prune(Mask({"a": torch.ones(survive) > 0}), share) == count


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_no_share_at_all(share: float) -> None:
    with pytest.raises(MaskError, match="in \\[0, 1\\]"):
        weights_to_prune(Mask({"a": torch.ones(3) > 0}), share)


def test_random_masks_with_the_proportions_of_another() -> None:
    first = Mask({"a": torch.rand(30, 10) < 0.3, "b": torch.rand(50) < 0.8})
    state = torch.get_rng_state()
    control = random_like(first, seed=5)
    assert torch.get_rng_state().equal(state)
    assert control.layers == first.layers
    assert control == random_like(first, seed=5)
    assert control != random_like(first, seed=6)
    later = prune_lowest({"a": torch.rand(30, 10), "b": torch.rand(50)}, first, 60)
    sparser = random_like(later, seed=5)
    assert all(not (sparser.keep[n] & ~control.keep[n]).any() for n in control.keep)


def test_a_random_mask_takes_every_weight_equally_often() -> None:
    mask = Mask({"a": torch.ones(4) > 0, "b": torch.tensor([True, True, False])})
    taken = {name: torch.zeros(keep.shape) for name, keep in mask.keep.items()}
    for seed in range(600):
        found = random_mask(mask, 2, seed)
        assert found.kept == 4
        for name, keep in found.keep.items():
            taken[name] += ~keep
    assert taken["b"][2] == 600
    every = torch.cat([taken["a"], taken["b"][:2]])
    assert ((every > 150) & (every < 250)).all()
    with pytest.raises(MaskError, match="6 survive"):
        random_mask(mask, 7, 0)
