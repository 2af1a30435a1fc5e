"""Beam search: greedy at width 1, exhaustive at full width, never worse than greedy."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.api import Planner
from blockprune.blocks import BlockAnalysis
from blockprune.costs import RemainingCosts
from blockprune.criteria import ScoringContext
from blockprune.errors import InfeasibleBudgetError, PlanError
from blockprune.plan import budget_asked_for
from tests import zoo

X = torch.ones(2, 4)
NAMES = tuple("01234")
WIDTHS = (1, 2, 3, 5, 100)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


def net() -> nn.Module:
    """Five blocks, each of another size."""
    return nn.Sequential(*[Block(width) for width in (3, 9, 5, 2, 7)])


@functools.cache
def analysis() -> BlockAnalysis:
    return blockprune.find_blocks(net(), X)


class LossOfTickets:
    """A loss that is drawn for each set of blocks; a block scores by how much it grows.

    Attributes:
        rounds: the sets beside which it was asked.
    """

    def __init__(self, seed: int, low: float = 0.0) -> None:
        draws = random.Random(seed)
        sets = itertools.chain.from_iterable(
            itertools.combinations(NAMES, size) for size in range(len(NAMES) + 1)
        )
        self.loss = {frozenset(gone): draws.uniform(low, 1) for gone in sets}
        self.rounds: list[frozenset[str]] = []

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        left = [block.name for block in context.blocks]
        return self.scored(left, frozenset(NAMES) - set(left))

    def scored(self, names: Iterable[str], gone: frozenset[str]) -> dict[str, float]:
        self.rounds.append(gone)
        return {name: self.loss[gone | {name}] - self.loss[gone] for name in names}

    def of(self, gone: Iterable[str]) -> float:
        return self.loss[frozenset(gone)] - self.loss[frozenset()]


class LossOfSets(LossOfTickets):
    """The same, from the names of what is gone: no ticket is cut for it."""

    def beside(self, gone: Collection[str]) -> Any:
        return lambda context: self.scored(NAMES, frozenset(gone))


def plan(
    criterion: Any,
    schedule: str = "beam",
    *,
    by: str = "score",
    beam_width: int | None = None,
    protect: str | tuple[str, ...] = (),
    min_blocks_per_stage: int = 0,
    **budget: Any,
) -> blockprune.PruningPlan:
    planner = Planner(
        analysis().traced.root,
        analysis(),
        criterion,
        by=by,
        schedule=schedule,
        beam_width=beam_width,
        protect=protect,
        min_blocks_per_stage=min_blocks_per_stage,
    )
    asked = budget_asked_for(**budget)
    planner.check(asked)
    return planner.plan(asked)


def greedy(criterion: LossOfSets, count: int) -> frozenset[str]:
    gone: frozenset[str] = frozenset()
    while len(gone) < count:
        more = [gone | {name} for name in NAMES if name not in gone]
        gone = min(more, key=criterion.loss.__getitem__)
    return gone


def beam(criterion: LossOfSets, count: int, width: int) -> frozenset[str]:
    """A beam of this loss, written out: the best sets go on, and the greedy one among them."""
    going = [frozenset[str]()]
    for size in range(1, count + 1):
        more = {gone | {name} for gone in going for name in NAMES if name not in gone}
        going = sorted(more, key=criterion.loss.__getitem__)[:width]
        if (one := greedy(criterion, size)) not in going:
            going[-1] = one
    return min(going, key=criterion.loss.__getitem__)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3])
def test_each_step_goes_on_from_the_best_sets(seed: int, count: int) -> None:
    criterion = LossOfSets(seed)
    best = min(map(frozenset, itertools.combinations(NAMES, count)), key=criterion.of)
    for width in WIDTHS:
        found = plan(criterion, p=count, beam_width=width)
        assert set(found.remove) == beam(criterion, count, width)
        assert criterion.of(found.remove) <= criterion.of(greedy(criterion, count))
        # What the blocks went with adds up to the loss of the set.
        total = sum(found.scores[name] for name in found.remove)
        assert total == pytest.approx(criterion.of(found.remove))
    assert set(found.remove) == best


def test_tickets_are_scored_as_sets_are() -> None:
    one, other = LossOfTickets(1), LossOfSets(1)
    assert plan(one, p=3, beam_width=2).remove == plan(other, p=3, beam_width=2).remove
    assert one.rounds == other.rounds


def test_there_are_losses_that_a_beam_sees_and_greedy_selection_does_not() -> None:
    """Otherwise the tests above would hold for greedy selection at any width."""
    found = [
        (criterion.of(beam(criterion, 3, 3)), criterion.of(greedy(criterion, 3)))
        for criterion in map(LossOfSets, range(4))
    ]
    assert any(wide < narrow for wide, narrow in found)


@pytest.mark.parametrize("by", ["score", "score_per_cost"])
@pytest.mark.parametrize("budget", [{"p": 3}, {"p": 0.5}, {"keep_params": 0.4}, {"keep_macs": 90}])
def test_a_width_of_one_is_iterative(budget: dict[str, Any], by: str) -> None:
    for seed in range(2):
        plans = [
            plan(LossOfSets(seed, low=-1), schedule, by=by, **budget, **options)
            for schedule, options in (("iterative", {}), ("beam", {"beam_width": 1}))
        ]
        assert plans[0] == plans[1]


@pytest.mark.parametrize("criterion", ["kl", "block_influence"])
def test_a_width_of_one_is_iterative_for_criteria_of_the_package(criterion: str) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(16, 4)
    plans = [
        blockprune.plan_of(
            blockprune.prune(model, criterion, 2, data=x, schedule=schedule, **options)
        )
        for schedule, options in (("iterative", {}), ("beam", {"beam_width": 1}))
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("width", [1, 2, 100])
def test_a_set_is_scored_once_however_it_was_reached(width: int) -> None:
    criterion = LossOfSets(1)
    plan(criterion, p=3, beam_width=width)
    assert len(criterion.rounds) == len(set(criterion.rounds))
    sizes = [len(gone) for gone in criterion.rounds]
    assert sizes == sorted(sizes)
    # 5 blocks, 10 pairs; those of three are not scored again.
    assert [sizes.count(size) for size in range(4)] == [1, min(width, 5), min(width, 10), 0]


def test_the_width_is_three_unless_told() -> None:
    criterion, other = LossOfSets(2), LossOfSets(2)
    assert plan(criterion, p=3) == plan(other, p=3, beam_width=3)
    assert criterion.rounds == other.rounds


def minimal_sets(remaining: Any, target: float) -> list[tuple[str, ...]]:
    """The sets that meet a bound on costs, and with some block less do not."""
    sets = itertools.chain.from_iterable(
        itertools.combinations(NAMES, size) for size in range(1, len(NAMES) + 1)
    )
    return [
        gone
        for gone in sets
        if remaining(gone) <= target
        and any(remaining([n for n in gone if n != name]) > target for name in gone)
    ]


@pytest.mark.parametrize(("quantity", "share"), [("macs", 0.8), ("macs", 0.5), ("params", 0.3)])
def test_a_full_beam_meets_a_budget_with_the_lowest_loss(quantity: Any, share: float) -> None:
    remaining = RemainingCosts(analysis()).of(quantity)
    sets = minimal_sets(remaining, share * remaining.total)
    for seed in range(2):
        criterion = LossOfSets(seed)
        found = plan(criterion, beam_width=100, **{f"keep_{quantity}": share})
        assert found.remove == min(sets, key=criterion.of)
        narrow = plan(criterion, beam_width=2, **{f"keep_{quantity}": share})
        assert narrow.remove in sets
        assert criterion.of(narrow.remove) <= criterion.of(
            plan(criterion, "iterative", **{f"keep_{quantity}": share}).remove
        )


def test_what_is_lost_for_what_is_saved_is_never_worse_than_greedy() -> None:
    remaining = RemainingCosts(analysis()).of("macs")

    def ratio(gone: Sequence[str], criterion: LossOfSets) -> float:
        return criterion.of(gone) / (remaining.total - remaining(gone))

    for seed in range(2):
        # A loss that any removal adds to.
        criterion = LossOfSets(seed)
        criterion.loss[frozenset()] = -1
        wide = plan(criterion, p=3, by="score_per_cost", beam_width=100).remove
        narrow = plan(criterion, "iterative", p=3, by="score_per_cost").remove
        assert ratio(wide, criterion) <= ratio(narrow, criterion)
        best = min(itertools.combinations(NAMES, 3), key=lambda gone: ratio(gone, criterion))
        assert wide == best


def test_a_latency_limit_is_met_or_refused() -> None:
    criterion = LossOfSets(0)
    assert plan(criterion, max_latency_ms=1e6).remove == ()
    with pytest.raises(InfeasibleBudgetError, match="below what can be reached"):
        plan(criterion, max_latency_ms=1e-6, beam_width=2)


def test_the_rules_hold_for_every_set() -> None:
    for seed in range(3):
        found = plan(LossOfSets(seed), p=3, protect="[12]", beam_width=100)
        assert found.remove == ("0", "3", "4")
    with pytest.raises(InfeasibleBudgetError, match="at most 3 can go with 2 protected"):
        plan(LossOfSets(0), p=4, protect="[12]")
    with pytest.raises(InfeasibleBudgetError, match="at most 4 can go"):
        plan(LossOfSets(0), p=5, min_blocks_per_stage=1)


def test_what_is_nested_in_a_block_goes_with_it() -> None:
    entry = zoo.BY_NAME["nested"]
    model, inputs = entry.build(), entry.example()
    analysis = blockprune.find_blocks(model, inputs)
    contains = {block.name: block.contains for block in analysis.blocks}
    group = 1 + max(map(len, contains.values()))
    ticket = blockprune.prune(
        model, "random", group, example_inputs=inputs, schedule="beam", beam_width=100
    )
    gone = blockprune.plan_of(ticket).remove
    assert len(gone) == group
    assert all(set(contains[name]) <= set(gone) for name in gone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "iterative", "beam_width": 2}, "beam_width=2 is for schedule='beam'"),
        ({"schedule": "one-shot", "beam_width": 1}, "beam_width=1 is for schedule='beam'"),
        ({"schedule": "beam", "beam_width": 0}, "a count of sets, 1 or more, not 0"),
        ({"schedule": "beam", "beam_width": True}, "a count of sets"),
        ({"schedule": "beam", "beam_width": 1.5}, "a count of sets"),
        ({"schedule": "beams"}, "'one-shot' or 'iterative' or 'beam', not 'beams'"),
    ],
)
def test_widths_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        blockprune.prune(net(), "l1", 1, example_inputs=X, **options)
