from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockprune.errors import InfeasibleBudgetError, PlanError, StalePlanError
from blockprune.plan import (
    Budget,
    CostGoal,
    PruningPlan,
    Selection,
    budget_asked_for,
    make_plan,
    named_plan,
    ranked,
)


@dataclass(frozen=True)
class Block:
    name: str
    stage: int
    contains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    shape: tuple[int, ...]
    fixed: int


@dataclass(frozen=True)
class Analysis:
    blocks: tuple[Block, ...]
    stages: tuple[Stage, ...]
    granularity: str = "branch"
    fingerprint: str = "f0"
    preserve_root: bool = False
    leaf_modules: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [block.name for block in self.blocks]


@dataclass(frozen=True)
class Table:
    scores: dict[str, float]
    criterion: str = "grasp"
    granularity: str = "branch"
    fingerprint: str = "f0"


def resnet(blocks: int = 4, fixed: tuple[int, ...] = (0, 1, 1)) -> Analysis:
    """The analysis of a ResNet: a projection block opens every stage but the first."""
    return Analysis(
        tuple(
            Block(f"layer{stage + 1}.{index}", stage)
            for stage, projections in enumerate(fixed)
            for index in range(projections, blocks)
        ),
        tuple(Stage((1, 16, 8, 8), projections) for projections in fixed),
    )


NESTED = Analysis(
    (Block("inner.0", 0), Block("inner.1", 0), Block("outer", 0, ("inner.0", "inner.1"))),
    (Stage((1, 4), 0),),
)


@dataclass(frozen=True)
class Case:
    analysis: Analysis
    scores: dict[str, float]


@st.composite
def cases(draw: st.DrawFn, nested: bool = True) -> Case:
    """Random forests of blocks in runs of stages, with scores that may tie."""
    count = draw(st.integers(0, 9))
    stages = draw(st.integers(1, 3))
    parents = [
        draw(st.one_of(st.none(), st.integers(0, i - 1))) if i and nested else None
        for i in range(count)
    ]
    inside: dict[int, set[int]] = {i: set() for i in range(count)}
    for child in range(count):
        above = parents[child]
        while above is not None:
            inside[above].add(child)
            above = parents[above]
    order = draw(st.permutations(range(count)))
    blocks = tuple(
        Block(f"b{i}", draw(st.integers(0, stages - 1)), tuple(f"b{j}" for j in sorted(inside[i])))
        for i in order
    )
    fixed = [draw(st.integers(0, 1)) for _ in range(stages)]
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6))
    scores = {block.name: draw(values) for block in blocks}
    return Case(Analysis(blocks, tuple(Stage((1, i), n) for i, n in enumerate(fixed))), scores)


def assert_coherent(plan: PruningPlan, analysis: Analysis) -> None:
    """Nothing twice, in order of execution, and whatever is nested in a removed block is gone."""
    removed = set(plan.remove)
    assert list(plan.remove) == [name for name in analysis.names if name in removed]
    for block in analysis.blocks:
        if block.name in removed:
            assert removed.issuperset(block.contains)


@given(cases(), st.data())
def test_exactly_p_blocks_go(case: Case, data: st.DataObject) -> None:
    p = data.draw(st.integers(0, len(case.analysis.blocks)))
    plan = make_plan(case.analysis, Table(case.scores), p)
    assert len(plan.remove) == p
    assert_coherent(plan, case.analysis)
    assert (plan.p, plan.criterion, plan.fingerprint) == (p, "grasp", "f0")
    assert plan.scores == case.scores


@given(cases(nested=False), st.data())
def test_the_lowest_scores_go_first_and_ties_by_execution(case: Case, data: st.DataObject) -> None:
    names = case.analysis.names
    p = data.draw(st.integers(0, len(names)))
    ranked = sorted(names, key=lambda name: (case.scores[name], names.index(name)))
    assert set(make_plan(case.analysis, case.scores, p).remove) == set(ranked[:p])


@given(cases(), st.data())
def test_limits_hold_or_the_error_says_what_can_be_reached(case: Case, data: st.DataObject) -> None:
    analysis = case.analysis
    names = analysis.names
    p = data.draw(st.integers(0, len(names)))
    protect = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    minimum = data.draw(st.integers(0, 3))
    limits: dict[str, Any] = {"protect": protect, "min_blocks_per_stage": minimum}
    try:
        plan = make_plan(analysis, case.scores, p, **limits)
    except InfeasibleBudgetError as error:
        found = re.search(r"at most (\d+) can go", str(error))
        assert found is not None
        p = int(found[1])
        plan = make_plan(analysis, case.scores, p, **limits)
    assert len(plan.remove) == p
    assert_coherent(plan, analysis)
    assert not set(plan.remove) & set(protect)
    for index, stage in enumerate(analysis.stages):
        members = [block.name for block in analysis.blocks if block.stage == index]
        left = stage.fixed + len(set(members) - set(plan.remove))
        assert left >= min(minimum, stage.fixed + len(members))


@given(cases(), st.data())
def test_json_round_trip(case: Case, data: st.DataObject) -> None:
    p = data.draw(st.one_of(st.integers(0, len(case.scores)), st.floats(0, 1)))
    plan = make_plan(case.analysis, Table(case.scores), p)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert type(again.p) is type(plan.p)


@given(cases(), st.data())
def test_a_share_rounds_down(case: Case, data: st.DataObject) -> None:
    count = len(case.analysis.blocks)
    part = data.draw(st.integers(0, count))
    exact = make_plan(case.analysis, case.scores, part / max(count, 1))
    assert len(exact.remove) == part
    if part < count:
        assert len(make_plan(case.analysis, case.scores, (part + 0.9) / count).remove) == part


def test_a_share_that_binary_rounds_below_its_count() -> None:
    analysis = Analysis(tuple(Block(f"b{i}", 0) for i in range(100)), (Stage((1,), 0),))
    assert int(0.29 * 100) == 28
    assert len(make_plan(analysis, p=0.29).remove) == 29


def test_counts_of_numpy_are_counts() -> None:
    plan = make_plan(resnet(), p=np.int64(2))
    assert plan.p == 2
    assert type(plan.p) is int


def test_one_is_a_block_and_one_point_zero_is_all_of_them() -> None:
    assert len(make_plan(resnet(), p=1).remove) == 1
    assert len(make_plan(resnet(), p=1.0).remove) == 10


def test_a_block_counts_with_those_it_contains() -> None:
    scores = {"outer": 0.0, "inner.0": 1.0, "inner.1": 2.0}
    removed = {p: make_plan(NESTED, scores, p).remove for p in range(4)}
    assert removed == {
        0: (),
        1: ("inner.0",),
        2: ("inner.0", "inner.1"),
        3: ("inner.0", "inner.1", "outer"),
    }


def test_a_block_that_was_passed_over_is_looked_at_again() -> None:
    analysis = Analysis(
        (Block("a", 0), Block("b", 0), Block("outer", 0, ("b",)), Block("c", 0)),
        (Stage((1,), 0),),
    )
    scores = {"a": 0.0, "b": 2.0, "outer": 1.0, "c": 9.0}
    assert make_plan(analysis, scores, 2).remove == ("a", "b")
    assert make_plan(analysis, scores, 3).remove == ("a", "b", "outer")


def test_a_selection_with_a_block_more_leaves_the_first_as_it_was() -> None:
    first = Selection(NESTED, minimum=1)
    one, _, outer = NESTED.blocks
    second = first.after(one)
    assert (first.in_order, second.in_order) == ((), ("inner.0",))
    # One of three has to stay: with one gone, no two may go.
    assert first.may_go(NESTED.blocks[1])
    assert not second.may_go(outer)
    third = second.after(NESTED.blocks[1])
    assert not third.may_go(outer)
    assert second.may_go(NESTED.blocks[1])
    assert third.in_order == ("inner.0", "inner.1")


def test_the_papers_policy() -> None:
    plan = make_plan(resnet(5), p=9, protect=("layer1.0",), min_blocks_per_stage=2)
    stages = [name.split(".")[0] for name in plan.remove]
    assert [stages.count(f"layer{i}") for i in (1, 2, 3)] == [3, 3, 3]
    with pytest.raises(InfeasibleBudgetError, match=r"p=10 .* at most 9 can go with 1 protected"):
        make_plan(resnet(5), p=10, protect=("layer1.0",), min_blocks_per_stage=2)


def test_a_protected_block_protects_what_contains_it() -> None:
    assert make_plan(NESTED, p=1, protect="inner.0").remove == ("inner.1",)
    with pytest.raises(InfeasibleBudgetError, match="at most 1 can go"):
        make_plan(NESTED, p=2, protect="inner.0")


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (-1, "negative"),
        (-0.5, "negative"),
        (float("nan"), "NaN"),
        (float("inf"), "above 1"),
        (1.5, "above 1"),
        (3.0, "pass the int p=3"),
        (True, "not True"),
        ("3", "not '3'"),
        (None, "not None"),
        ([1], r"not \[1\]"),
        (1j, "not 1j"),
        (np.bool_(True), "not np.True_"),
    ],
)
def test_budgets_that_make_no_sense(p: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(resnet(), p=p)


def test_more_than_there_are_names_the_maximum() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"p=11 .* 11 of 10 .* at most 10 can go\."):
        make_plan(resnet(), p=11)


def test_no_block_at_all() -> None:
    empty = Analysis((), ())
    assert make_plan(empty, p=0).remove == ()
    assert make_plan(empty, p=0.5).remove == ()
    with pytest.raises(InfeasibleBudgetError, match="no removable residual block"):
        make_plan(empty, p=1)


@pytest.mark.parametrize("minimum", [-1, True, 1.0, "2"])
def test_minimum_must_be_a_count(minimum: Any) -> None:
    with pytest.raises(PlanError, match="min_blocks_per_stage"):
        make_plan(resnet(), p=1, min_blocks_per_stage=minimum)


def test_a_pattern_without_a_match_gives_close_names() -> None:
    with pytest.raises(PlanError, match=r"'layer2\.9' matches no .* Did you mean layer2"):
        make_plan(resnet(), p=1, protect=("layer1.*", "layer2.9"))
    with pytest.raises(PlanError, match="takes patterns"):
        make_plan(resnet(), p=1, protect=(3,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0": None}, "'layer1.0' has no score"),
        ({"layer9.0": 1.0}, "'layer9.0', which is no removable block. Did you mean"),
        ({"layer1.0": float("nan")}, "'layer1.0' is nan"),
        ({"layer1.0": "high"}, "'layer1.0' is 'high'"),
    ],
)
def test_scores_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    scores: dict[str, Any] = dict.fromkeys(resnet().names, 0.0) | change
    with pytest.raises(PlanError, match=message):
        make_plan(resnet(), {n: value for n, value in scores.items() if value is not None}, 1)


def test_scores_of_another_model_or_granularity() -> None:
    scores = dict.fromkeys(resnet().names, 0.0)
    with pytest.raises(StalePlanError, match=r"f1.*f0"):
        make_plan(resnet(), Table(scores, fingerprint="f1"), 1)
    with pytest.raises(PlanError, match=r"'layer'.*'branch'"):
        make_plan(resnet(), Table(scores, granularity="layer"), 1)


def _tampered(**changes: Any) -> str:
    fields = json.loads(make_plan(resnet(), Table(dict.fromkeys(resnet().names, 0.0)), 2).to_json())
    return json.dumps({k: v for k, v in (fields | changes).items() if v != "DELETE"})


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "plan"),
        ("{", "plan"),
        ("[]", "plan"),
        (_tampered(extra=1), "extra"),
        (_tampered(version=2), "version"),
        (_tampered(version="1"), "version"),
        (_tampered(remove="layer1.1"), "remove"),
        (_tampered(remove=[1]), "remove.0"),
        (_tampered(remove=[""]), "remove.0"),
        (_tampered(remove=["layer1.1", "layer1.1"]), "remove: .*twice"),
        (_tampered(remove=["layer7.1"]), "no score"),
        (_tampered(remove="DELETE"), "remove"),
        (_tampered(granularity="filter"), "granularity"),
        (_tampered(scores={"layer1.0": "low"}), "scores.layer1.0"),
        (_tampered(scores={"layer1.0": None}), "scores.layer1.0"),
        (_tampered(p=True), "p"),
        (_tampered(p=-1), "negative"),
        (_tampered(p=2.5), "above 1"),
        (_tampered(fingerprint=""), "fingerprint"),
        (_tampered(criterion=7), "criterion"),
        (_tampered(budget={"kind": "keep_macs", "value": 0.5}), "two budgets"),
        (_tampered(p=None, budget={"kind": "keep_flops", "value": 0.5}), "budget.kind"),
        (_tampered(p=None, budget={"kind": "keep_macs", "value": True}), "budget.value"),
        (_tampered(p=None, budget={"kind": "keep_macs", "value": 1.5}), "above 1"),
        (_tampered(p=None, budget={"kind": "keep_macs", "value": -3}), "cannot be kept to"),
        (_tampered(p=None, budget={"kind": "keep_macs"}), "budget.value"),
        (_tampered(p=None, budget=0.5), "budget"),
    ],
)
def test_tampered_plans_are_refused(text: str, field: str) -> None:
    with pytest.raises(PlanError, match=rf"not a pruning plan.*{field}"):
        PruningPlan.from_json(text)


# --- budgets on what is left: the costs are a function of the set that goes -------------------


@dataclass(frozen=True)
class Left:
    """Costs that are no sum: a group of blocks shares a cost that goes with the last of them."""

    total: int
    own: dict[str, int]
    shared: dict[frozenset[str], int]

    def __call__(self, removed: frozenset[str]) -> int:
        gone = sum(self.own[name] for name in removed)
        return self.total - gone - sum(c for group, c in self.shared.items() if group <= removed)


@st.composite
def costs(draw: st.DrawFn, names: list[str]) -> Left:
    amounts = st.integers(0, 50)
    own = {name: draw(amounts) for name in names}
    groups = draw(st.lists(st.sets(st.sampled_from(names), min_size=1))) if names else []
    shared = {frozenset(group): draw(amounts) for group in groups}
    return Left(sum(own.values()) + sum(shared.values()) + draw(amounts), own, shared)


def keep(value: int | float, left: Left, kind: str = "keep_macs") -> CostGoal:
    return CostGoal(Budget(kind=kind, value=value), left)


@given(cases(), st.data(), st.sampled_from(["score", "score_per_cost"]))
def test_a_budget_is_met_and_not_with_one_block_less(
    case: Case, data: st.DataObject, by: str
) -> None:
    names = case.analysis.names
    left = data.draw(costs(names))
    target = data.draw(st.integers(left(frozenset(names)), max(left.total, 1)))
    if target == 0:
        return
    plan = make_plan(case.analysis, case.scores, goal=keep(target, left), by=by, costs=left)
    removed = frozenset(plan.remove)
    assert_coherent(plan, case.analysis)
    assert left(removed) <= target
    assert (plan.p, plan.budget) == (None, Budget(kind="keep_macs", value=target))
    order = [block.name for block in ranked(case.analysis.blocks, case.scores, by, left)]
    groups = {block.name: {block.name, *block.contains} for block in case.analysis.blocks}
    gone: set[str] = set()
    while left(frozenset(gone)) > target:
        gone |= groups[next(name for name in order if name not in gone)]
    assert gone == removed


@given(cases(), st.data())
def test_a_budget_and_its_limits_hold_or_the_error_says_what_is_left(
    case: Case, data: st.DataObject
) -> None:
    names = case.analysis.names
    left = data.draw(costs(names))
    protect = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    minimum = data.draw(st.integers(0, 2))
    limits: dict[str, Any] = {"protect": protect, "min_blocks_per_stage": minimum}
    target = data.draw(st.integers(1, max(left.total, 1)))
    said = ""
    try:
        plan = make_plan(case.analysis, case.scores, goal=keep(target, left), **limits)
    except InfeasibleBudgetError as error:
        said = str(error)
    if said:
        assert f"allows {target:,} of {left.total:,} MACs" in said
        assert names or "no removable residual block" in said
        found = re.search(r"gone, .*, ([\d,]+)( \([\d.]+ %\))? are left", said)
        target = int(found[1].replace(",", "")) if found else 0
        if target == 0:
            return
        plan = make_plan(case.analysis, case.scores, goal=keep(target, left), **limits)
    assert left(frozenset(plan.remove)) <= target
    assert not set(plan.remove) & set(protect)
    for index, stage in enumerate(case.analysis.stages):
        members = [block.name for block in case.analysis.blocks if block.stage == index]
        stays = stage.fixed + len(set(members) - set(plan.remove))
        assert stays >= min(minimum, stage.fixed + len(members))


@given(st.integers(1, 10**12), st.data())
def test_a_share_is_that_share_of_the_dense_model(total: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(1, total))
    goal = keep(part / total, Left(total, {}, {}))
    assert goal.target == part


def test_a_share_and_its_number_ask_for_the_same() -> None:
    analysis = resnet()
    left = Left(100, dict.fromkeys(analysis.names, 9), {})
    assert {len(make_plan(analysis, goal=keep(v, left)).remove) for v in (0.64, 64)} == {4}
    assert {len(make_plan(analysis, goal=keep(v, left)).remove) for v in (0.63, 63)} == {5}
    assert make_plan(analysis, goal=keep(1.0, left)).remove == ()
    with pytest.raises(InfeasibleBudgetError, match=r"keep_macs=1 allows 1 of 100 .*10 \(10.00 %"):
        make_plan(analysis, goal=keep(1, left))


def test_where_a_block_must_stay_what_saves_most_goes_before_it_is_impossible() -> None:
    analysis = Analysis((Block("big", 0), Block("mid", 0), Block("small", 0)), (Stage((1,), 0),))
    left = Left(100, {"big": 60, "mid": 30, "small": 10}, {})
    scores = {"small": 0.0, "mid": 1.0, "big": 2.0}
    limits = {"min_blocks_per_stage": 1}
    assert make_plan(analysis, scores, goal=keep(60, left), **limits).remove == ("mid", "small")
    assert make_plan(analysis, scores, goal=keep(30, left), **limits).remove == ("big", "small")
    assert make_plan(analysis, scores, goal=keep(10, left), **limits).remove == ("big", "mid")
    with pytest.raises(InfeasibleBudgetError, match=r"allows 9 of 100 .* with min_blocks_per_sta"):
        make_plan(analysis, scores, goal=keep(9, left), **limits)


def test_the_order_by_score_per_cost() -> None:
    blocks = [Block(name, 0) for name in "abcdefg"]
    left = Left(99, {"a": 2, "b": 4, "c": 0, "d": 1, "e": 8, "f": 0, "g": 0}, {})
    scores = {"a": 6.0, "b": 8.0, "c": 1.0, "d": -3.0, "e": -1.0, "f": 0.0, "g": -9.0}
    # e: -8, d: -3, then f and g at 0, b: 2, a: 3, c: infinite.
    assert "".join(b.name for b in ranked(blocks, scores, "score_per_cost", left)) == "edfgbac"
    assert "".join(b.name for b in ranked(blocks, scores)) == "gdefcab"


def test_the_cost_of_a_block_is_that_of_all_that_goes_with_it() -> None:
    left = Left(99, {"inner.0": 1, "inner.1": 1, "outer": 8}, {})
    scores = {"inner.0": 1.0, "inner.1": 1.0, "outer": 5.0}
    order = [b.name for b in ranked(NESTED.blocks, scores, "score_per_cost", left)]
    assert order == ["outer", "inner.0", "inner.1"]


def test_score_per_cost_needs_costs() -> None:
    with pytest.raises(PlanError, match=r"blockprune\.make_plan counts them"):
        make_plan(resnet(), p=1, by="score_per_cost")
    with pytest.raises(PlanError, match=r"'score' or 'score_per_cost', not 'cost'"):
        make_plan(resnet(), p=1, by="cost")


@given(
    st.one_of(
        st.builds(
            lambda v: {"keep_macs": v}, st.one_of(st.integers(1, 10**15), st.floats(1e-9, 1))
        ),
        st.builds(lambda v: {"keep_params": v}, st.integers(1, 10**15)),
        st.builds(lambda v: {"max_latency_ms": v}, st.floats(1e-9, 1e9)),
    )
)
def test_budgets_come_back_from_json(given: dict[str, Any]) -> None:
    budget = budget_asked_for(**given)
    assert isinstance(budget, Budget)
    plan = make_plan(resnet(), p=1).model_copy(update={"p": None, "budget": budget})
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.budget is not None
    assert type(again.budget.value) is type(budget.value)


def test_plans_from_before_there_were_budgets_load() -> None:
    plan = make_plan(resnet(), p=1)
    fields = json.loads(plan.to_json())
    del fields["budget"]
    assert PruningPlan.from_json(json.dumps(fields)) == plan


@pytest.mark.parametrize(
    ("value", "plain"),
    [(np.int64(7), 7), (np.float32(0.5), 0.5), (np.float64(0.25), 0.25), (7, 7), (1.0, 1.0)],
)
def test_numbers_of_numpy_are_numbers(value: Any, plain: int | float) -> None:
    budget = budget_asked_for(keep_params=value)
    assert budget == Budget(kind="keep_params", value=plain)
    assert type(budget.value) is type(plain)


def test_one_budget_or_none() -> None:
    assert budget_asked_for(0) == 0
    with pytest.raises(PlanError, match=r"how much is to go\. Give one of p, keep_macs"):
        budget_asked_for()
    with pytest.raises(PlanError, match=r"p=1 and max_latency_ms=3 are 2 budgets\. Give one of p,"):
        budget_asked_for(1, max_latency_ms=3)


def test_plans_say_how_the_model_was_looked_at() -> None:
    analysis = replace(resnet(), preserve_root=True, leaf_modules=("Attention",))
    for plan in (make_plan(analysis, p=1), named_plan(analysis, analysis.names[:1])):
        assert (plan.preserve_root, plan.leaf_modules) == (True, ("Attention",))
        assert PruningPlan.from_json(plan.to_json()) == plan
        fields = json.loads(plan.to_json())
        del fields["preserve_root"], fields["leaf_modules"]
        earlier = PruningPlan.from_json(json.dumps(fields))
        assert (earlier.preserve_root, earlier.leaf_modules) == (False, ())


def test_a_plan_is_a_value() -> None:
    plan = make_plan(resnet(), p=1)
    with pytest.raises(ValueError, match="frozen"):
        plan.p = 2  # type: ignore[misc]
    assert plan == make_plan(resnet(), p=1)
    assert plan.criterion is None
    assert plan.scores == {}
