"""Budgets of real models: what a plan promises is what its ticket costs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blockprune
from blockprune.costs import model_costs
from blockprune.errors import InfeasibleBudgetError
from blockprune.models import resnet20
from blockprune.plan import Budget
from tests import zoo
from tests.strategies import Architecture, Net, architectures

IMAGE = torch.zeros(1, 3, 32, 32)
DENSE_MACS, BLOCK_MACS, DENSE_PARAMS = 40_813_184, 4_718_592, 273_066
NAMES = ["shared_function", "shared_block", "shared_weight", "nested", "aliased", "unused",
         "parallel", "attention", "control_flow", "opaque"]  # fmt: skip


@functools.cache
def _case(name: str) -> tuple[nn.Module, Any, blockprune.BlockAnalysis]:
    entry = zoo.BY_NAME[name]
    net, inputs = entry.build(), entry.example()
    return net, inputs, blockprune.find_blocks(net, inputs)


@functools.cache
def _resnet() -> tuple[nn.Module, blockprune.BlockAnalysis]:
    torch.manual_seed(0)
    net = resnet20()
    return net, blockprune.find_blocks(net, IMAGE)


def _left(
    net: nn.Module, inputs: Any, analysis: blockprune.BlockAnalysis, names: Any, kind: str
) -> int:
    """MACs or parameters of the real ticket."""
    plan = blockprune.PruningPlan(
        remove=tuple(names), granularity=analysis.granularity, fingerprint=analysis.fingerprint
    )
    costs = model_costs(blockprune.remove_blocks(net, plan, inputs, verify=False), inputs)
    return costs.macs if kind == "keep_macs" else costs.params


@zoo.shared_norms_are_told
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["keep_macs", "keep_params"])
@pytest.mark.parametrize("by", ["score", "score_per_cost"])
def test_the_ticket_keeps_to_the_budget_and_with_one_block_more_it_would_not(
    name: str, kind: str, by: str
) -> None:
    net, inputs, analysis = _case(name)
    scores = {block: float(-(7 * i % 5)) for i, block in enumerate(analysis.names)}
    least = _left(net, inputs, analysis, analysis.names, kind)
    dense = model_costs(net, inputs)
    total = dense.macs if kind == "keep_macs" else dense.params
    for target in sorted({max(least, 1), (least + total) // 2, total}):
        plan = blockprune.make_plan(analysis, scores, by=by, **{kind: target})
        assert plan.budget == Budget(kind=kind, value=target)
        assert _left(net, inputs, analysis, plan.remove, kind) <= target
        if not plan.remove:
            continue
        # The last to go is one of these: without it, too much is left.
        without_last = [
            tuple(n for n in plan.remove if n not in {block.name, *block.contains})
            for block in analysis.blocks
            if block.name in plan.remove
        ]
        assert any(_left(net, inputs, analysis, kept, kind) > target for kept in without_last)


@given(architectures, st.floats(0.05, 1), st.sampled_from(["keep_macs", "keep_params"]))
def test_random_tickets_keep_to_their_budget(spec: Architecture, share: float, kind: str) -> None:
    net, x = Net(spec), torch.ones(2, 3, 6, 6)
    analysis = blockprune.find_blocks(net, x)
    dense = model_costs(net, x)
    total = dense.macs if kind == "keep_macs" else dense.params
    said = ""
    try:
        plan = blockprune.make_plan(analysis, **{kind: share})
    except InfeasibleBudgetError as error:
        said = str(error)
    if said:
        assert _left(net, x, analysis, analysis.names, kind) > int(share * total)
        assert "no removable" in said or " are left" in said
    else:
        # A share means what it is the float of, give or take a few units in its last place.
        assert _left(net, x, analysis, plan.remove, kind) <= share * total * (1 + 2e-15)


@pytest.mark.parametrize(
    ("budget", "removed"),
    [
        ({"keep_macs": 1.0}, 0),
        ({"keep_macs": DENSE_MACS}, 0),
        ({"keep_macs": DENSE_MACS - 1}, 1),
        ({"keep_macs": DENSE_MACS - BLOCK_MACS}, 1),
        ({"keep_macs": (DENSE_MACS - 3 * BLOCK_MACS) / DENSE_MACS}, 3),
        ({"keep_macs": DENSE_MACS - 3 * BLOCK_MACS - 1}, 4),
        ({"keep_params": DENSE_PARAMS}, 0),
        ({"keep_params": DENSE_PARAMS - 2 * 4_704}, 2),
        ({"keep_params": DENSE_PARAMS - 2 * 4_704 - 1}, 3),
    ],
)
def test_budgets_to_the_unit(budget: dict[str, Any], removed: int) -> None:
    _, analysis = _resnet()
    assert len(blockprune.make_plan(analysis, **budget).remove) == removed


def test_an_impossible_budget_names_what_is_left_and_the_limits() -> None:
    net, analysis = _resnet()
    least = DENSE_MACS - 7 * BLOCK_MACS
    with pytest.raises(InfeasibleBudgetError) as error:
        blockprune.make_plan(analysis, keep_macs=0.1)
    assert str(error.value) == (
        f"keep_macs=0.1 allows 4,081,318 of {DENSE_MACS:,} MACs; with 7 of 7 blocks gone, which is "
        f"all that can go, {least:,} (19.07 %) are left."
    )
    with pytest.raises(InfeasibleBudgetError) as error:
        blockprune.prune(
            net, "l1", keep_params=10, example_inputs=IMAGE, protect="layer3.*",
            min_blocks_per_stage=2,
        )  # fmt: skip
    assert "with 2 of 7 blocks gone" in str(error.value)
    assert "with 2 protected and min_blocks_per_stage=2" in str(error.value)


def test_an_impossible_budget_is_told_before_the_scoring() -> None:
    def never(context: object) -> dict[str, float]:
        pytest.fail("blocks were scored")

    for schedule in ("one-shot", "iterative"):
        with pytest.raises(InfeasibleBudgetError):
            blockprune.prune(
                _resnet()[0], never, keep_macs=0.01, example_inputs=IMAGE, schedule=schedule
            )


def test_a_model_without_blocks_meets_what_it_meets_already() -> None:
    entry = zoo.BY_NAME["vgg"]
    net, inputs = entry.build(), entry.example()
    ticket = blockprune.prune(net, "l1", keep_macs=1.0, example_inputs=inputs)
    assert blockprune.plan_of(ticket).remove == ()
    with pytest.raises(InfeasibleBudgetError, match="no removable residual block"):
        blockprune.prune(net, "l1", keep_params=0.5, example_inputs=inputs)


def test_how_much_is_to_go_has_to_be_said() -> None:
    net, analysis = _resnet()
    for ask in (
        lambda: blockprune.make_plan(analysis),
        lambda: blockprune.make_plan(analysis, p=None),
        lambda: blockprune.prune(net, "l1", example_inputs=IMAGE),
    ):
        with pytest.raises(blockprune.PlanError, match="keep_macs"):
            ask()


def test_a_pruned_ticket_knows_its_budget_after_a_round_trip(tmp_path: Any) -> None:
    net, _ = _resnet()
    ticket = blockprune.prune(net, "l1", keep_params=0.5, example_inputs=IMAGE)
    assert sum(p.numel() for p in ticket.parameters()) <= DENSE_PARAMS / 2
    blockprune.save_ticket(ticket, tmp_path / "t.safetensors")
    loaded = blockprune.load_ticket(resnet20(), tmp_path / "t.safetensors")
    assert blockprune.plan_of(loaded).budget == Budget(kind="keep_params", value=0.5)


def test_by_score_per_cost_of_the_quantity_that_is_budgeted() -> None:
    _, analysis = _resnet()
    # Equal MACs everywhere; a block of stage 3 holds sixteen times the parameters of stage 1.
    scores = {n: 1.0 if n.startswith("layer1") else 3.0 for n in analysis.names}
    by: dict[str, Any] = {"by": "score_per_cost"}
    assert blockprune.make_plan(analysis, scores, p=1, **by).remove == ("layer1.0",)
    assert blockprune.make_plan(analysis, scores, keep_macs=0.99, **by).remove == ("layer1.0",)
    assert blockprune.make_plan(analysis, scores, keep_params=0.99, **by).remove == ("layer3.1",)
    assert blockprune.make_plan(analysis, scores, keep_params=0.99).remove == ("layer1.0",)
