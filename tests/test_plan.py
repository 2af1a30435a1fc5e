from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockprune.errors import InfeasibleBudgetError, PlanError, StalePlanError
from blockprune.plan import PruningPlan, make_plan


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
        make_plan(resnet(), min_blocks_per_stage=minimum)


def test_a_pattern_without_a_match_gives_close_names() -> None:
    with pytest.raises(PlanError, match=r"'layer2\.9' matches no .* Did you mean layer2"):
        make_plan(resnet(), protect=("layer1.*", "layer2.9"))
    with pytest.raises(PlanError, match="takes patterns"):
        make_plan(resnet(), protect=(3,))  # type: ignore[arg-type]


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
        make_plan(resnet(), {name: value for name, value in scores.items() if value is not None})


def test_scores_of_another_model_or_granularity() -> None:
    scores = dict.fromkeys(resnet().names, 0.0)
    with pytest.raises(StalePlanError, match=r"f1.*f0"):
        make_plan(resnet(), Table(scores, fingerprint="f1"))
    with pytest.raises(PlanError, match=r"'layer'.*'branch'"):
        make_plan(resnet(), Table(scores, granularity="layer"))


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
    ],
)
def test_tampered_plans_are_refused(text: str, field: str) -> None:
    with pytest.raises(PlanError, match=rf"not a pruning plan.*{field}"):
        PruningPlan.from_json(text)


def test_a_plan_is_a_value() -> None:
    plan = make_plan(resnet(), p=1)
    with pytest.raises(ValueError, match="frozen"):
        plan.p = 2  # type: ignore[misc]
    assert plan == make_plan(resnet(), p=1)
    assert plan.criterion is None
    assert plan.scores == {}
