"""A plan says how the model was looked at, and cutting by it looks in the same way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import blockprune
from blockprune import PlanError, PruningPlan
from blockprune.surgery.record import attach, record_of


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x).tanh()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Outer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.rand(2, 6)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plan_of(net: Net, **how: Any) -> PruningPlan:
    return blockprune.make_plan(blockprune.find_blocks(net, X, "layer", **how), p=1)


def test_a_kept_root_is_kept_by_the_plan(net: Net) -> None:
    plan = plan_of(net, preserve_root=True)
    again = PruningPlan.from_json(plan.to_json())
    for ticket in (
        blockprune.remove_blocks(net, again, X),
        blockprune.remove_blocks(net, plan, X, preserve_root=True),
    ):
        assert type(ticket) is Net
        assert blockprune.plan_of(ticket) == plan
    assert isinstance(blockprune.remove_blocks(net, plan_of(net), X), fx.GraphModule)


@pytest.mark.parametrize("kept", [False, True])
def test_the_other_way_is_refused_and_says_what_differs(net: Net, kept: bool) -> None:
    plan = plan_of(net, preserve_root=kept)
    with pytest.raises(PlanError) as error:
        blockprune.remove_blocks(net, plan, X, preserve_root=not kept)
    assert f"made with preserve_root={kept}" in str(error.value)
    assert f"preserve_root={not kept}" in str(error.value)
    assert "Leave preserve_root out" in str(error.value)


def test_modules_not_looked_into_are_those_of_the_plan(net: Net) -> None:
    plan = plan_of(net, leaf_modules=Inner)
    assert plan.leaf_modules == ("Inner",)
    ticket = blockprune.remove_blocks(net, plan, X)
    assert any(type(module) is Inner for module in ticket.modules())
    with pytest.raises(PlanError, match=r"leaf_modules=\('Inner',\), .* with leaf_modules=\(\)"):
        blockprune.remove_blocks(net, plan, X, leaf_modules=())


def test_names_are_looked_for_without_either(net: Net) -> None:
    assert isinstance(blockprune.remove_blocks(net, "layers.0", X), fx.GraphModule)
    assert type(blockprune.remove_blocks(net, "layers.0", X, preserve_root=True)) is Net


@pytest.mark.parametrize("what", [None, 3, [1], True], ids=repr)
def test_what_is_neither_a_plan_nor_names(net: Net, what: Any) -> None:
    with pytest.raises(PlanError, match="a PruningPlan, or names of blocks, not"):
        blockprune.remove_blocks(net, what, X)


def test_no_budget_is_no_budget_of_one(net: Net) -> None:
    analysis = blockprune.find_blocks(net, X)
    for call in (
        lambda: blockprune.make_plan(analysis),
        lambda: blockprune.make_plan(analysis, p=None),
        lambda: blockprune.prune(net, "l1", None, example_inputs=X),
    ):
        with pytest.raises(PlanError, match="Give one of p, keep_macs, keep_params, max_latency"):
            call()
    assert blockprune.make_plan(analysis, p=None, keep_params=0.5).remove


def test_files_of_earlier_versions_load(net: Net, tmp_path: Path) -> None:
    ticket = blockprune.remove_blocks(net, plan_of(net, preserve_root=True), X)
    record = record_of(ticket)
    assert record is not None
    # What is not in a plan's file is read as False.
    how = {"preserve_root": False, "leaf_modules": ()}
    attach(ticket, dataclasses.replace(record, plan=record.plan.model_copy(update=how)))
    path = tmp_path / "ticket.safetensors"
    blockprune.save_ticket(ticket, path)
    loaded = blockprune.load_ticket(net, path)
    assert type(loaded) is Net
    assert blockprune.plan_of(loaded) == record.plan
