"""A sample of the random networks of `python -m tests.fuzz`, and the fuzzer itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

import blockprune
from tests.fuzz import laws
from tests.fuzz.cases import failure
from tests.fuzz.laws import problems
from tests.fuzz.recipe import BEGINNINGS, ORDERS, Layer, Loop, Recipe, Region, Unit, draw
from tests.fuzz.shrink import kind, report, shrunk
from tests.fuzz.source import source_of
from tests.fuzz.truth import truth

CASES, GROUPS = 300, 20
BLOCK = Unit(("conv",))


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_networks_keep_the_laws(group: int) -> None:
    for case in range(group, CASES, GROUPS):
        text = failure(case, seed=0)
        assert text is None, f"\n{text}"


# What the fuzzer found to be wrong, by what it was.
FOUND = {
    "a list read by number was shortened where nothing was verified": Recipe(
        (BLOCK, BLOCK), branching=True
    ),
    "blocks of an untraceable part were lost from a ticket cut again": Recipe(
        (Region((BLOCK, BLOCK)), BLOCK)
    ),
    "what left a region could not be written to by the code around it": Recipe(
        (Region((Unit(("conv",), after="relu_"), Loop((("conv",),)))), "relu_"), branching=True
    ),
    "a multiple of the input beside a layer was called a branch without parameters": Recipe(
        (Unit((Layer(),), shortcut="scaled"),), dimensions=0
    ),
    "the oracle drew a dropout in the order of the memory": Recipe(
        (Unit(("multihead",)), Unit(("functional_drop",))), dimensions=0
    ),
    "a layer inside a branch that goes was looked for once more": Recipe(
        (BLOCK, Unit((Region((Loop((("conv",), ("conv",))),)),), after="relu")), branching=True
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_repaired(what: str) -> None:
    for choice in range(12):
        assert problems(replace(FOUND[what], choice=choice)) == []


# ---------------------------------------------------------------- the fuzzer


def test_a_case_is_its_numbers() -> None:
    recipes = [draw(5, case) for case in range(40)]
    assert recipes == [draw(5, case) for case in range(40)]
    assert len(set(recipes)) == len({source_of(recipe) for recipe in recipes}) == 40
    assert recipes != [draw(6, case) for case in range(40)]


def test_every_kind_of_part_is_drawn() -> None:
    text = "\n".join(source_of(draw(0, case)) for case in range(CASES))
    wanted = ("Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Attention(", "Stubborn(")
    wanted += ("items = nn.ModuleList", "blocks = nn.ModuleList", "self.g =", "inner", "x * mask")
    wanted += ("weight_norm", "Mode()", "bfloat16", "float64", "float16", "requires_grad_(False)")
    wanted += ("if y.sum()", "if self.training", "seen", 'batch["x"]', "f += x", "add_(", "alpha")
    wanted += ("h = self.n(x)", "f + x + ", "x + (f + ", "f += ", "F.dropout(f + ")
    wanted += ("norm1(x +", "inplace=True", "].weight = ", "stride=2", "track_running_stats")
    assert [part for part in wanted if part not in text] == []


def test_a_pool_behind_strides_is_one_that_runs() -> None:
    down = Unit(("stride", "pool"), shortcut="down")
    assert problems(Recipe((down, down, BLOCK), dimensions=3)) == []


def test_the_command_spreads_cases_over_processes() -> None:
    options = ("--cases", "3", "--first", "2", "--seed", "1", "--jobs", "2")
    command = (sys.executable, "-m", "tests.fuzz", *options)
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("3 cases of seed 1: 0 failures\n")
    assert run.stderr.startswith("3 cases, 0 failures")


# Two branches in parallel, of which the fuzzer did not draw the order at first.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("begins", BEGINNINGS, ids="+".join)
def test_branches_in_parallel_keep_the_laws(order: str, begins: tuple[str, ...]) -> None:
    part = Unit(("conv",), parallel=("bias_conv",), order=order, begins=begins)
    for recipe in (Recipe((part, BLOCK)), Recipe((part,), dimensions=0, output="features")):
        for choice in range(3):
            assert problems(replace(recipe, choice=choice)) == []


def test_the_truth_of_one_network_is_what_a_person_says_of_it() -> None:
    recipe = Recipe(
        body=(
            Unit(("conv", BLOCK), after="relu_"),
            Unit(("relu_", "conv")),
            Unit(("conv",), parallel=("conv", "norm")),
            Loop((("conv",), ("conv",))),
            Region((BLOCK, Unit(("pool",)))),
            Unit(("conv",), shortcut="projection"),
            Unit(("conv", "conv"), escapes=True),
            Unit(("conv", "gelu"), escapes=True),
        )
    )
    found = truth(recipe)
    assert list(found.removable) == [
        "body.0.f.1",
        "body.0",
        "body.2.f",
        "body.2.g",
        "body.3.blocks.0",
        "body.3.blocks.1",
        "body.4.items.0",
        "body.6.f",
    ]
    assert found.refused == {
        "body.1": {"mutates_shortcut"},
        "body.4.items.1": {"no_parameters"},
        "body.5": {"projection_shortcut"},
        "body.7": {"branch_escapes"},
    }
    assert found.nested["body.0"] == ("body.0.f.1",)


def test_the_reference_differs_from_the_dense_network_where_it_is_switched_off() -> None:
    recipe = Recipe((BLOCK, BLOCK))
    case = laws._Case(recipe)
    x = case.inputs(2)[0]
    assert case.dense(x).equal(case.switched(x))
    case.names = ["body.1"]
    assert not case.dense(x).equal(case._reference()(x))


# What blockprune could do wrong, and the words in which the fuzzer says so.
WRONG = {
    "of the wrong blocks": ("remove_blocks", "eval, batch 2: output 0"),
    "without the last block": ("find_blocks", "found"),
    "of a stranger": ("plan_of", "the plan changed in a file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_library_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, message = WRONG[what]
    right = getattr(blockprune, name)
    answers = iter(range(10**6))

    def wrong(model: Any, *args: Any, **options: Any) -> Any:
        if name == "remove_blocks":
            return right(model, ["body.0"], *args[1:], **{**options, "verify": False})
        found = right(model, *args, **options)
        if name == "find_blocks":
            return replace(found, blocks=found.blocks[:-1])
        return next(answers)

    monkeypatch.setattr(blockprune, name, wrong)
    recipes = [Recipe((BLOCK, Unit(("conv", "relu"))), choice=choice) for choice in range(30)]
    assert any(problem.startswith(message) for recipe in recipes for problem in problems(recipe))


def test_a_failure_shrinks_to_the_part_that_fails() -> None:
    recipe = Recipe(
        body=(Region((BLOCK, Unit(("conv", "gate", "relu"), after="gelu"))), BLOCK),
        output="features",
        dtype="float64",
    )
    small = shrunk(recipe, lambda candidate: "gate" in str(candidate))
    assert small == Recipe((Unit(("gate",)),))
    text = report(small, ["body.0 is wrong"])
    assert text.startswith("# body.0 is wrong\nimport torch")
    scope: dict[str, Any] = {}
    exec(text, scope)  # the program runs by itself
    assert scope["analysis"].names == ("body.0",)


def test_problems_of_one_kind_differ_in_names_and_numbers_alone() -> None:
    assert kind("eval, batch 2: output 0: off by 0.1") == kind("eval, batch 3: output 1: off by 7")
    assert kind("the dense network changed") != kind("off by 0.1")
