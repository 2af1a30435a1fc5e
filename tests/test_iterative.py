"""Iterative selection: score, remove one, score what is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.api import Planner
from blockprune.costs import RemainingCosts
from blockprune.criteria import ScoringContext
from blockprune.models import resnet20
from blockprune.scoring import NoDataWarning
from tests import zoo
from tests.test_laws import RESIDUAL

IMAGE = torch.zeros(2, 3, 32, 32)
BLOCKS = 7


def _pair(size: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 10


def _plan(model: nn.Module, criterion: Any, schedule: str, **options: Any) -> Any:
    ticket = blockprune.prune(model, criterion, schedule=schedule, **options)
    return blockprune.plan_of(ticket)


@pytest.mark.parametrize("criterion", ["l1", "snip", "grasp", "random"])
def test_one_block_is_the_same_in_one_shot(criterion: str) -> None:
    net = resnet20()
    plans = [_plan(net, criterion, s, p=1, data=_pair()) for s in ("one-shot", "iterative")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("budget", [{"p": p} for p in range(BLOCKS + 1)] + [{"keep_params": 0.4}])
@pytest.mark.parametrize("by", ["score", "score_per_cost"])
@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_scores_that_do_not_interact_give_the_same_plan(
    criterion: str, budget: dict[str, Any], by: str
) -> None:
    options = {**budget, "by": by, "example_inputs": IMAGE}
    net = resnet20()
    step_by_step = _plan(net, criterion, "iterative", **options)
    assert step_by_step == _plan(net, criterion, "one-shot", **options)


def _order(names: list[str]) -> Any:
    """A criterion that looks at names alone, so that it can be told what nested blocks score."""

    def criterion(context: ScoringContext) -> dict[str, float]:
        return {block.name: float(names.index(block.name)) for block in context.blocks}

    return criterion


@pytest.mark.parametrize("entry", zoo.cases(RESIDUAL))
@pytest.mark.parametrize("granularity", ["branch", "layer"])
@pytest.mark.parametrize("preserve_root", [False, True], ids=["graph", "root"])
def test_every_net_can_be_pruned_step_by_step(
    entry: zoo.Entry, granularity: str, preserve_root: bool
) -> None:
    net, inputs = entry.build(), entry.example()
    analysis = blockprune.find_blocks(net, inputs, granularity, preserve_root=preserve_root)
    names = list(analysis.names)

    def by_name(context: ScoringContext) -> dict[str, float]:
        # A block that a removal uncovers is none of the dense model, and never goes.
        return {b.name: float(len(names) - _index(names, b.name)) for b in context.blocks}

    planners = [
        Planner(net, analysis, by_name, schedule=schedule) for schedule in ("one-shot", "iterative")
    ]
    for p in range(len(names) + 1):
        assert len({planner.plan(p).remove for planner in planners}) == 1


def _index(names: list[str], name: str) -> int:
    return names.index(name) if name in names else -1


def test_what_is_nested_in_a_block_that_went_is_gone() -> None:
    entry = zoo.BY_NAME["nested"]
    net, inputs = entry.build(), entry.example()
    analysis = blockprune.find_blocks(net, inputs)
    outer = next(block for block in analysis.blocks if block.contains)
    order = [outer.name, *(n for n in analysis.names if n != outer.name)]
    group = len(outer.contains) + 1
    plan = _plan(net, _order(order), "iterative", p=group, example_inputs=inputs)
    assert set(plan.remove) == {outer.name, *outer.contains}
    assert set(plan.scores) == set(analysis.names)


class Rescored:
    """A criterion whose scores depend on what is left, and that notes what it was asked for."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        names = [block.name for block in context.blocks]
        number = len(self.rounds)
        # Round 0 favours the first, round 1 the last, and so on.
        order = names if number % 2 == 0 else names[::-1]
        self.rounds.append({name: 100.0 * number + order.index(name) for name in names})
        return self.rounds[-1]


def test_each_round_scores_the_ticket_so_far() -> None:
    criterion = Rescored()
    plan = _plan(resnet20(), criterion, "iterative", p=3, example_inputs=IMAGE)
    first, second, third = criterion.rounds
    every = list(first)
    assert list(second) == every[1:]
    assert list(third) == every[1:-1]
    assert plan.remove == (every[0], every[1], every[-1])
    # With the score it went with, or the latest.
    assert plan.scores == {**third, every[0]: first[every[0]], every[-1]: second[every[-1]]}
    assert plan.criterion == "Rescored"


def test_no_round_more_than_there_are_removals() -> None:
    for p, rounds in ((0, 1), (1, 1), (2, 2), (BLOCKS, BLOCKS)):
        criterion = Rescored()
        _plan(resnet20(), criterion, "iterative", p=p, example_inputs=IMAGE)
        assert len(criterion.rounds) == rounds


def test_the_limits_hold_in_every_round() -> None:
    options: dict[str, Any] = {"protect": "layer1.*", "min_blocks_per_stage": 2}
    plan = _plan(resnet20(), Rescored(), "iterative", p=2, example_inputs=IMAGE, **options)
    assert sorted(name.split(".")[0] for name in plan.remove) == ["layer2", "layer3"]


@pytest.mark.parametrize("budget", [{"keep_macs": 0.5}, {"keep_params": 100_000}])
def test_a_budget_is_met_and_not_before_the_last_removal(budget: dict[str, Any]) -> None:
    net, criterion = resnet20(), Rescored()
    analysis = blockprune.find_blocks(net, IMAGE)
    plan = _plan(net, criterion, "iterative", example_inputs=IMAGE, **budget)
    remaining = RemainingCosts(analysis).of("macs" if "keep_macs" in budget else "params")
    [value] = budget.values()
    target = value * remaining.total if isinstance(value, float) else value
    assert remaining(plan.remove) <= target
    assert len(criterion.rounds) == len(plan.remove)
    last = min(criterion.rounds[-1], key=lambda name: criterion.rounds[-1][name])
    assert last in plan.remove
    assert remaining([name for name in plan.remove if name != last]) > target


def _batches(read: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(50):
        read.append(number)
        yield _pair(4)


class Data:
    """A criterion that takes so many batches, and notes their sums."""

    def __init__(self, count: float) -> None:
        self.count = count
        self.seen: list[list[float]] = []
        self.draws: list[float] = []

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        sums = []
        for number, batch in enumerate(context.batches):
            sums.append(float(batch.call.args[0].sum()))
            if number + 1 >= self.count:
                break
        self.seen.append(sums)
        self.draws.append(float(torch.rand(1)))
        return {block.name: float(i) for i, block in enumerate(context.blocks)}


def test_an_iterator_serves_every_round_and_is_read_as_far_as_asked() -> None:
    read: list[int] = []
    criterion = Data(3)
    _plan(resnet20(), criterion, "iterative", p=3, data=_batches(read))
    assert read == [0, 1, 2]
    assert len(criterion.seen) == 3
    assert criterion.seen[0] == criterion.seen[1] == criterion.seen[2]
    assert len(criterion.seen[0]) == 3


def test_max_batches_bounds_every_round() -> None:
    read: list[int] = []
    criterion = Data(math.inf)
    _plan(resnet20(), criterion, "iterative", p=3, data=_batches(read), max_batches=2)
    assert read == [0, 1]
    assert [len(sums) for sums in criterion.seen] == [2, 2, 2]


def test_every_round_has_the_same_seed() -> None:
    criterion = Data(1)
    _plan(resnet20(), criterion, "iterative", p=3, data=_pair(), seed=5)
    assert len(set(criterion.draws)) == 1


def test_that_there_are_no_data_is_said_once() -> None:
    with pytest.warns(NoDataWarning) as caught:
        _plan(resnet20(), "snip", "iterative", p=3, example_inputs=IMAGE)
    assert len(caught) == 1


def test_leaf_modules_that_went_with_a_block_are_no_longer_asked_for() -> None:
    class Mix(nn.Linear):
        pass

    class Block(nn.Module):
        def __init__(self, kind: type[nn.Linear]) -> None:
            super().__init__()
            self.mix = kind(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.mix(x)
            return out

    net, x = nn.Sequential(Block(Mix), Block(nn.Linear), Block(nn.Linear)), torch.ones(2, 4)
    for entry in ("0.mix", "Mix", Mix):
        plan = _plan(
            net, _order(["0", "1", "2"]), "iterative", p=3, example_inputs=x, leaf_modules=entry
        )
        assert plan.remove == ("0", "1", "2")


def test_the_model_and_the_ticket_are_those_of_one_cut() -> None:
    torch.manual_seed(0)
    net = resnet20().train()
    hook = net.layer1[0].register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.warns(UserWarning, match="hooks of 'layer1.0' are not carried") as caught:
        ticket = blockprune.prune(net, "snip", p=3, data=_pair(), schedule="iterative")
    assert len(caught) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert ticket.training
    hook.remove()
    again = blockprune.remove_blocks(net.eval(), blockprune.plan_of(ticket).remove, IMAGE)
    assert again.state_dict().keys() == ticket.state_dict().keys()
    assert torch.equal(again(_pair()[0]), ticket.eval()(_pair()[0]))
