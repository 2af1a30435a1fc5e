"""What can be asked for, what is refused and in which words, and the cases of a spec."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from blockprune.lottery.cases import DENSE, Moments, cases_of
from blockprune.lottery.moments import step_at
from blockprune.lottery.record import TicketCase
from blockprune.lottery.spec import Spec, SpecError
from blockprune.lottery.steps import Step
from blockprune.lottery.suites import read_specs

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))
BASE: dict[str, Any] = {
    "name": "x",
    "model": {"name": "blockprune:resnet20"},
    "recipe": {"epochs": 8},
    "criteria": "grasp",
    "p": 1,
}
MOMENTS = Moments(epochs=8, per_epoch=10)


def spec(**changes: Any) -> Spec:
    return Spec.parse({**BASE, **changes})


def cases(**changes: Any) -> tuple[TicketCase, ...]:
    found = spec(**changes)
    return cases_of(found, [int(p) for p in found.p], MOMENTS)


def tickets(**changes: Any) -> list[tuple[Any, ...]]:
    return [
        (case.scored_at, case.weights, case.rewound_to)
        for case in cases(**changes)
        if case.kind == "ticket"
    ]


def tables(table: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield table
    for field in table.model_fields.values():
        annotation = field.annotation
        inner = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
        for part in (annotation, *inner):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from tables(part)


class TestReading:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"critera": "snip"}, "critera is unknown. Did you mean criteria"),
            ({"recipe": {"epochs": 8, "epoch": 3}}, "recipe.epoch is unknown. Did you mean epochs"),
            ({"latency": {"bach": 3}}, "latency.bach is unknown. Did you mean batch"),
            ({"model": {"name": "a", "arg": {}}}, "model.arg is unknown. Did you mean arguments"),
            ({"weights": "rewnd"}, "weights: Input should be 'rewind'"),
            ({"scored_at": "25"}, "scored_at: '25' is no moment of training"),
            ({"scored_at": "101%"}, "is no moment"),
            ({"scored_at": -1}, "is no moment"),
            ({"scored_at": True}, "is no moment"),
            ({"scored_at": {"epoch": 1, "iterations": 2}}, "is no moment"),
            ({"rewound_to": "score_at"}, "is no moment"),
            ({"scored_at": 9}, "epoch 9 lies behind the end of the training, 8 epochs"),
            ({"rewound_to": "final"}, "leaves nothing to train"),
            ({"rewound_to": "100%"}, "leaves nothing to train"),
            ({"rewound_to": 8}, "leaves nothing to train"),
            ({"scored_at": "final", "rewound_to": "scored_at"}, "leaves nothing to train"),
            ({"weights": "reinit", "rewound_to": "25%"}, "rewound_to means nothing"),
            ({"weights": "finetune"}, "need each other"),
            ({"finetune": {"epochs": 1, "lr": 0.1}}, "need each other"),
            ({"weights": "reinit", "carry_optimizer": True}, "carry_optimizer means nothing"),
            ({"p": 0}, "p = 0 removes nothing"),
            ({"p": 1.5}, "p = 1.5 removes nothing"),
            ({"p": -1}, "p = -1 removes nothing"),
            ({"p": [1, 1]}, "p has an entry twice"),
            ({"criteria": []}, "criteria is an empty list"),
            ({"criteria": "random"}, "is a control"),
            ({"seeds": 0}, "1 to 10000 replicates can run, not 0"),
            ({"seeds": [1, 1]}, "each once"),
            ({"seeds": [2**32]}, "a seed lies in 0 .."),
            ({"recipe": {"epochs": 8, "seed": 1}}, "recipe.seed has no place here"),
            ({"early_bird": {"criterion": "grasp", "window": 8}}, "never fills"),
            ({"threads": 0}, "threads"),
            ({"confidence": 1}, "confidence"),
            ({"xi_points": -1}, "xi_points"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as found:
            spec(**changes)
        assert message in str(found.value)
        assert "pydantic" not in str(found.value)

    def test_every_problem_is_named(self) -> None:
        with pytest.raises(SpecError, match=r"name: Field required.*critera is unknown"):
            Spec.parse({**{k: v for k, v in BASE.items() if k != "name"}, "critera": 1})

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("s.toml", "name = ", "not valid TOML"),
            ("s.json", "{", "not valid JSON"),
            ("s.toml", "name = 1", "s.toml cannot be used: name"),
            ("s.toml", b"\xff", "cannot be read"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SpecError, match=message):
            Spec.read(file)

    def test_a_spec_of_several_runs_is_not_one(self, tmp_path: Path) -> None:
        file = tmp_path / "suite.toml"
        file.write_text('name = "x"\n[[runs]]\nname = "a"\n')
        with pytest.raises(SpecError, match=r"several runs: blockprune\.lottery\.read_specs"):
            Spec.read(file)

    def test_an_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="cannot be read"):
            Spec.read(tmp_path / "absent.toml")

    def test_a_spec_comes_back_from_its_json(self, tmp_path: Path) -> None:
        asked = spec(scored_at=[3, "25%", {"epoch": 2, "iteration": 5}], seeds=[4, 2], p=[1, 0.5])
        file = tmp_path / "spec.json"
        file.write_text(asked.model_dump_json())
        assert Spec.read(file) == asked

    def test_one_value_stands_for_a_list_of_it(self) -> None:
        several = {name: [BASE[name]] for name in ("criteria", "p")}
        assert spec() == spec(**several) == spec(rewound_to=["init"], schedule="one-shot")

    def test_every_field_is_documented(self) -> None:
        for table in tables(Spec):
            for name, field in table.model_fields.items():
                assert field.description, f"{table.__name__}.{name}"

    @pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
    def test_examples_can_be_read(self, file: Path) -> None:
        specs = read_specs(file)
        assert len(specs) > 1 or specs[0].name == file.stem
        for found in specs:
            assert found.controls.random
            assert found.controls.scratch

    def test_the_paper_s_set_up(self) -> None:
        table2, table1 = (
            Spec.read(next(file for file in EXAMPLES if file.stem == name))
            for name in ("cifar10-paper", "cifar10-paper-table1")
        )
        for found in (table1, table2):
            assert (found.recipe.epochs, found.recipe.lr, found.recipe.batch_size) == (
                200,
                0.01,
                128,
            )
            assert found.recipe.milestones == (100, 150)
            assert (found.protect_first, found.min_blocks_per_stage) == (True, 2)
        assert (table2.criteria, table2.p) == (("snip", "grasp"), (1, 2, 3, 4, 5))
        assert [str(step_at(m, 200, 391)) for m in table1.rewound_to] == [
            "epoch 0",
            "epoch 25",
            "epoch 50",
            "epoch 75",
        ]


class TestMoments:
    @pytest.mark.parametrize(
        ("moment", "step"),
        [
            ("init", Step()),
            ("final", Step(epoch=8)),
            ("0%", Step()),
            ("25%", Step(epoch=2)),
            ("30%", Step(epoch=2, iteration=4)),
            ("100%", Step(epoch=8)),
            (Step(epoch=3), Step(epoch=3)),
            (Step(iteration=25), Step(epoch=2, iteration=5)),
        ],
    )
    def test_shares_are_of_all_iterations(self, moment: str | Step, step: Step) -> None:
        assert step_at(moment, epochs=8, per_epoch=10) == step

    def test_what_lies_behind_the_end(self) -> None:
        with pytest.raises(SpecError, match="behind the end"):
            step_at(Step(epoch=7, iteration=11), epochs=8, per_epoch=10)


class TestCases:
    def test_algorithm_2(self) -> None:
        assert tickets() == [(Step(), "rewind", Step())]

    def test_algorithm_1(self) -> None:
        assert tickets(scored_at="final", rewound_to=["init", "25%"]) == [
            (Step(epoch=8), "rewind", Step()),
            (Step(epoch=8), "rewind", Step(epoch=2)),
        ]

    def test_pruning_during_training(self) -> None:
        assert tickets(scored_at=[2, 4], rewound_to="scored_at") == [
            (Step(epoch=2), "rewind", Step(epoch=2)),
            (Step(epoch=4), "rewind", Step(epoch=4)),
        ]

    def test_policies_that_go_back_nowhere_are_one_case_each(self) -> None:
        found = tickets(
            scored_at="final",
            rewound_to=["init", "50%"],
            weights=["learning-rate", "reinit", "finetune"],
            finetune={"epochs": 1, "lr": 0.001},
        )
        assert [(weights, rewound) for _, weights, rewound in found] == [
            ("learning-rate", Step()),
            ("learning-rate", Step(epoch=4)),
            ("reinit", None),
            ("finetune", None),
        ]

    def test_equal_moments_are_one_case(self) -> None:
        assert len(tickets(scored_at=["init", "0%", {"epoch": 0}])) == 1

    def test_a_moment_just_before_the_end_may_round_to_it(self) -> None:
        with pytest.raises(SpecError, match="leaves nothing to train"):
            tickets(rewound_to="99.9%")

    def test_every_ticket_has_its_controls(self) -> None:
        found = cases(
            criteria=["snip", "grasp"],
            p=[1, 2],
            scored_at=["init", "final"],
            rewound_to=["init", "50%"],
            schedule=["one-shot", "iterative"],
            weights=["rewind", "learning-rate"],
            early_bird={"criterion": "l1"},
        )
        by_kind = {
            kind: [case for case in found if case.kind == kind]
            for kind in ("dense", "ticket", "random", "scratch")
        }
        assert by_kind["dense"] == [DENSE]
        assert len(by_kind["ticket"]) == 2 * 2 * 2 * 2 * 2 * 2 + 2
        for ticket in by_kind["ticket"]:
            assert any(
                (one.p, one.weights, one.rewound_to, one.early_bird)
                == (ticket.p, ticket.weights, ticket.rewound_to, ticket.early_bird)
                for one in by_kind["random"]
            )
            assert any(
                (one.criterion, one.p, one.scored_at, one.schedule, one.early_bird)
                == (
                    ticket.criterion,
                    ticket.p,
                    ticket.scored_at,
                    ticket.schedule,
                    ticket.early_bird,
                )
                for one in by_kind["scratch"]
            )
        # Random blocks are the same whoever chose the ticket's: one control for each start.
        assert len(by_kind["random"]) == 2 * 2 * 2 + 2
        assert len({case.label() for case in found}) == len(found)

    def test_controls_can_be_left_out(self) -> None:
        found = cases(controls={"random": False, "scratch": False})
        assert [case.kind for case in found] == ["dense", "ticket"]
