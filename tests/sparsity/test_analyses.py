from __future__ import annotations

import pytest
import torch

from blockprune.errors import MaskError
from blockprune.sparsity import (
    Mask,
    angle_degrees,
    common,
    distance,
    flipped,
    layer_sparsity,
    overlap,
    overlap_by_layer,
    partial_reinit,
    random_like,
    sign_flips,
    spread,
)
from tests.sparsity.nets import Tied, half_mask, small

STATE = dict[str, torch.Tensor]


def mask_of(*bits: int) -> Mask:
    return Mask({"w": torch.tensor(bits) > 0})


def state_of(*values: float) -> STATE:
    return {"w": torch.tensor(values)}


def test_sparsity_of_each_layer_and_round() -> None:
    rounds = [
        Mask({"a": torch.ones(4) > 0, "b": torch.ones(2) > 0}),
        Mask({"a": torch.tensor([1, 0, 0, 0]) > 0, "b": torch.zeros(2) > 0}),
    ]
    assert [tuple(row) for row in layer_sparsity(rounds)] == [
        (0, "a", 4, 4, 0.0),
        (0, "b", 2, 2, 0.0),
        (1, "a", 1, 4, 0.75),
        (1, "b", 0, 2, 1.0),
    ]


def test_overlap_of_two_and_of_three() -> None:
    a, b, c = mask_of(1, 1, 1, 0, 0), mask_of(0, 1, 1, 1, 1), mask_of(0, 0, 1, 0, 1)
    two = overlap(a, b)
    # The denominator is the smaller ticket: 3 and not 4.
    assert (two.shared, two.of_all, two.of_surviving) == (2, 2 / 5, 2 / 3)
    assert two.expected_of_all == pytest.approx(3 / 5 * 4 / 5)
    assert two.expected_of_surviving == pytest.approx(4 / 5)
    three = overlap(a, b, c)
    assert (three.shared, three.of_all, three.of_surviving) == (1, 1 / 5, 1 / 2)
    assert three.expected_of_all == pytest.approx(12 / 25 * 2 / 5)
    assert overlap(a, a).of_surviving == 1.0
    nothing = overlap(a, mask_of(0, 0, 0, 0, 0))
    assert (nothing.of_all, nothing.of_surviving, nothing.expected_of_surviving) == (0, 0, 0)
    assert overlap_by_layer(a, b)["w"] == two
    assert common(a, b) == mask_of(0, 1, 1, 0, 0)


def test_random_masks_overlap_as_expected() -> None:
    first = Mask({"w": torch.arange(20000) < 3000})
    found = overlap(first, random_like(first, seed=1))
    assert found.of_surviving == pytest.approx(found.expected_of_surviving, abs=0.02)
    assert found.expected_of_surviving == pytest.approx(0.15)


def test_masks_of_other_networks_are_refused() -> None:
    with pytest.raises(MaskError, match="they differ in w"):
        overlap(mask_of(1, 1), mask_of(1, 1, 1))
    with pytest.raises(MaskError, match="they differ in v, w"):
        overlap(mask_of(1, 1), Mask({"v": torch.ones(2) > 0}))
    a, b = torch.ones(1) > 0, torch.ones(2) > 0
    with pytest.raises(MaskError, match="the order of the layers"):
        overlap(Mask({"a": a, "b": b}), Mask({"b": b, "a": a}))


def test_spread_over_tickets() -> None:
    masks = [mask_of(1, 1, 1, 0, 0), mask_of(1, 1, 0, 0, 1), mask_of(1, 0, 1, 0, 0)]
    states = [
        state_of(1, 1, 5, 9, 9),
        state_of(2, 5, 9, 9, 9),
        state_of(3, 9, 5, 9, 9),
    ]
    found = spread(states, masks)
    assert found.overlapping.tolist() == pytest.approx([(2 / 3) ** 0.5])
    # The second has values in two tickets, so has the third; of the fifth there is one alone.
    assert found.others.tolist() == pytest.approx([2.0, 0.0])
    assert found.mean_others == pytest.approx(1.0)


def test_spread_over_rounds() -> None:
    states = [state_of(1, 2, 7), state_of(3, 2, 9), state_of(5, 8, 1)]
    found = spread(states, [mask_of(1, 1, 0)] * 3, overlapping=mask_of(0, 1, 0))
    assert found.overlapping.tolist() == pytest.approx([8**0.5])
    assert found.others.tolist() == pytest.approx([(8 / 3) ** 0.5])
    alone = spread(states, mask_of(1, 1, 1))
    assert alone.mean_others is None
    assert len(alone.overlapping) == 3
    assert spread(states, mask_of(0, 0, 0)).mean_overlapping is None
    with pytest.raises(MaskError, match="at least 2 states"):
        spread(states[:1], mask_of(1, 1, 1))
    with pytest.raises(MaskError, match="3 states need as many masks, and 1"):
        spread(states, [mask_of(1, 1, 1)])


def test_signs_that_flip() -> None:
    mask = mask_of(1, 1, 1, 1, 0)
    first, last = state_of(1, -1, 0, 1, 1), state_of(-1, -2, -3, 1, -1)
    assert sign_flips(first, last, mask) == 1 / 4
    assert sign_flips(first, last, mask, state_of(0, 0, 4, -1, 0)) == 3 / 4
    assert flipped([first, last], mask).tolist() == [True, False, False, False]
    assert sign_flips(first, first, mask) == 0.0
    assert sign_flips(first, last, mask_of(0, 0, 0, 0, 0)) == 0.0
    with pytest.raises(MaskError, match=r"w is \(2,\), and \(5,\) in the mask"):
        sign_flips(state_of(1, 2), last, mask)
    with pytest.raises(MaskError, match="the weights have no w"):
        sign_flips({}, last, mask)


def test_new_weights_but_for_the_shared_ones() -> None:
    fresh, theta = small(1), small(0)
    mask = half_mask(fresh)
    new, old = fresh.state_dict(), theta.state_dict()
    found = partial_reinit(new, old, mask)
    for name, value in found.items():
        keep = mask.keep.get(name, torch.zeros(value.shape) > 0)
        assert value[keep].equal(old[name][keep])
        assert value[~keep].equal(new[name][~keep])
        assert value.data_ptr() != new[name].data_ptr()


def test_new_weights_where_layers_share_one() -> None:
    fresh, theta = Tied(), Tied()
    mask = half_mask(fresh)
    found = partial_reinit(fresh.state_dict(), theta.state_dict(), mask)
    assert found["first.weight"].equal(found["second.weight"])


def test_the_same_run_twice_is_at_distance_and_angle_zero() -> None:
    mask = half_mask(small())
    for dtype in (torch.float32, torch.float16):
        state = small().to(dtype).state_dict()
        assert distance(state, small().to(dtype).state_dict(), mask) == 0.0
        assert angle_degrees(state, small().to(dtype).state_dict(), mask) == 0.0


def test_distance_is_that_of_the_masked_vectors() -> None:
    mask = mask_of(1, 0, 1)
    assert distance(state_of(1, 5, 1), state_of(4, -5, 5), mask) == 5.0
    assert angle_degrees(state_of(1, 5, 0), state_of(0, 5, 7), mask) == 90.0


def test_angles() -> None:
    mask = mask_of(1, 1)
    assert angle_degrees(state_of(1, 0), state_of(-3, 0), mask) == 180.0
    assert angle_degrees(state_of(1, 0), state_of(1, 1), mask) == pytest.approx(45)
    # An arc cosine of 1 - 5e-15 has half of its digits left.
    small_angle = angle_degrees(state_of(1, 0), state_of(1, 1e-7), mask)
    assert small_angle == pytest.approx(1e-7 * 180 / torch.pi, rel=1e-6)
    with pytest.raises(MaskError, match="make no angle"):
        angle_degrees(state_of(0, 0), state_of(1, 1), mask)


def test_tickets_that_share_nothing_are_orthogonal() -> None:
    weights = torch.randn(1000)
    kept = torch.arange(1000) < 400
    first, second = {"w": weights * kept}, {"w": weights * ~kept}
    assert overlap(Mask({"w": kept}), Mask({"w": ~kept})).shared == 0
    found = angle_degrees(first, second, Mask({"w": torch.ones(1000) > 0}))
    assert found == pytest.approx(90, abs=1e-9)
