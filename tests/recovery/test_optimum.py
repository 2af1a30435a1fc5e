"""A refit is the least-squares optimum, as `torch.linalg.lstsq` finds it on a copy made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockprune
from tests.recovery.nets import KINDS, built, by_hand, images


@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_is_the_optimum(kind: str) -> None:
    dense, x = built(kind), images()
    ticket = blockprune.remove_blocks(dense, "blocks.2", x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    expected = by_hand(dense, dense, 2, x)
    # Elsewhere they differ where an input is zero on all of these.
    torch.testing.assert_close(found(x), expected(x), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found(x), ticket(x), rtol=1e-3)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.blocks == ("blocks.2",)
    assert gap.residual_after < 0.9 * gap.residual_before


@pytest.mark.parametrize("kind", ["pre-activation", "batch norm", "linear"])
def test_gaps_are_fitted_in_order_each_on_what_the_one_before_left(kind: str) -> None:
    dense, x = built(kind), images()
    ticket = blockprune.remove_blocks(dense, ["blocks.1", "blocks.3"], x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    expected = by_hand(dense, dense, 1, x)
    expected = by_hand(expected, dense, 3, x)
    torch.testing.assert_close(found(x), expected(x), rtol=1e-7, atol=1e-7)
    first, second = blockprune.recovery_of(found).gaps
    assert (first.blocks, second.blocks) == (("blocks.1",), ("blocks.3",))


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_family_leaves_no_larger_residual(kind: str) -> None:
    dense, x = built(kind), images()
    ticket = blockprune.remove_blocks(dense, ["blocks.2", "blocks.3"], x[:2], verify=False)
    left = {}
    for method in ("scale", "map", "refit"):
        found = blockprune.recover(ticket, dense, x, method, ridge=0.0)
        [gap] = blockprune.recovery_of(found).gaps
        assert gap.blocks == ("blocks.2", "blocks.3")
        left[method] = gap.residual_after
    nothing = gap.residual_before
    slack = 1 + 1e-9
    assert left["refit"] <= left["map"] * slack
    assert left["map"] <= left["scale"] * slack
    assert left["scale"] <= nothing * slack
    assert left["refit"] < 0.95 * nothing


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_what_was_fitted(kind: str) -> None:
    """The branch, measured with hooks, varies as much as what the stream of the ticket lacks."""
    dense, x = built(kind), images()
    ticket = blockprune.remove_blocks(dense, "blocks.4", x[:2], verify=False)
    wanted = _before_last_activation(dense, 5, x)
    branches = {}
    for method in ("refit", "moments"):
        own = built(kind)
        found = blockprune.recover(ticket, dense, x, method, ridge=0.0)
        own.load_state_dict(found.state_dict(), strict=False)
        with torch.no_grad():
            shortcut = own.blocks[:3](torch.relu(own.stem(x)))
        branches[method] = _before_last_activation(own, 4, x) - shortcut
    goal = wanted - shortcut
    # Where nothing takes a bias, the origin stands for the mean.
    centre = 0 if kind == "no bias" else goal.mean((0, 2, 3), keepdim=True)
    square = (goal - centre).square().mean((0, 2, 3))
    reached = (branches["moments"] - centre).square().mean((0, 2, 3))
    torch.testing.assert_close(reached, square, rtol=1e-7, atol=1e-12)
    assert bool(((branches["refit"] - centre).square().mean((0, 2, 3)) < 0.999 * square).all())
    if kind != "no bias":
        torch.testing.assert_close(
            branches["moments"].mean((0, 2, 3), keepdim=True), centre, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_is_that_of_the_streams(kind: str) -> None:
    """Both are measured here with hooks on modules of the dense model and of the ticket."""
    dense, x = built(kind), images()
    ticket = blockprune.remove_blocks(dense, "blocks.4", x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    [gap] = blockprune.recovery_of(found).gaps
    # The last block is gone: the head reads the mean of the stream, behind the activation.
    wanted = _before_last_activation(dense, 5, x)
    for model, said in ((ticket, gap.residual_before), (found, gap.residual_after)):
        own = built(kind)
        own.load_state_dict(model.state_dict(), strict=False)
        stream = _before_last_activation(own, 4, x)
        error = float((stream - wanted).square().sum() / wanted.square().sum())
        assert said == pytest.approx(error, rel=1e-6)


def _before_last_activation(net: nn.Module, count: int, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        stream = torch.relu(net.stem(x))
        for block in net.blocks[: count - 1]:
            stream = block(stream)
        block = net.blocks[count - 1]
        return stream + block.behind(block.last(block.inner(stream)))
