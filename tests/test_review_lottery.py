"""What a second reading of runs on weights, filters and robustness found to go wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from blockprune.cli import app
from blockprune.cli.robustness import choice_of
from blockprune.data import ImageData
from blockprune.errors import SpecError
from blockprune.lottery import RunRecord, Spec, run
from blockprune.lottery.cases import Moments, cases_of
from blockprune.lottery.comparisons import comparisons_of
from blockprune.lottery.nodes import Unfolding
from blockprune.lottery.stages import Output, Stage, StageStore
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.lottery.steps import Step
from blockprune.lottery.training import Evaluation
from blockprune.lottery.work import Bench, Job, Setting, choosing, comparing, judging
from tests.lottery_models import SPEC

FINETUNE = {"finetune": {"epochs": 1, "lr": 0.01}}
LEVELS = {"importances": ["magnitude", "l1"], "count": 3}


def spec(**changes: Any) -> Spec:
    base = {key: value for key, value in SPEC.items() if key not in ("criteria", "p")}
    return Spec.parse({**base, "seeds": 1, **changes})


def unfolded(asked: Spec) -> Unfolding:
    moments = Moments(asked.recipe.epochs, 6)
    ps = [p for p in asked.p if isinstance(p, int)]
    return Unfolding(asked, {}, cases_of(asked, ps, moments), moments, ())


EVERYTHING: list[dict[str, Any]] = [
    {"levels": {**LEVELS, "controls_at": 3}, "weights": "learning-rate", "rewound_to": 1},
    {"levels": {**LEVELS, "controls_at": 3}, "weights": ["finetune", "rewind"], **FINETUNE},
    {
        "levels": {**LEVELS, "schedule": ["one-shot", "iterative"], "trained": 2,
                   "scope": ["global", "layers"], "partial_reinit": True},
        "weights": ["reinit", "rewind"], "rewound_to": ["init", 1], "stability": {"alphas": 2},
    },
    {
        "criteria": ["snip", "grasp"], "p": [1, 2], "structures": ["blocks", "filters", "weights"],
        "matched_by": ["params", "macs", "filters"], "scored_at": ["init", "final"],
        "weights": ["finetune", "rewind", "reinit", "learning-rate"], "rewound_to": ["init", 1],
        **FINETUNE, "latency": {},
    },
]  # fmt: skip


class TestUnfolding:
    @pytest.mark.parametrize("asked", EVERYTHING)
    def test_what_a_node_needs_is_a_node(self, asked: dict[str, Any]) -> None:
        unfolding = unfolded(spec(**asked))
        nodes = [*unfolding.nodes()]
        for comparison in comparisons_of(unfolding):
            nodes += [*comparison.before, comparison.node]
        names = {node.name for node in nodes}
        assert not {need for node in nodes for need in node.needs} - names

    @pytest.mark.parametrize("asked", EVERYTHING)
    def test_no_two_cases_have_one_name(self, asked: dict[str, Any]) -> None:
        # Nodes are told apart by it: the network of one would be taken for the other's.
        counts = Counter(case.label() for case in unfolded(spec(**asked)).cases)
        assert [label for label, count in counts.items() if count > 1] == []

    def test_a_random_control_of_final_weights_has_those_below_it(self) -> None:
        asked = spec(levels={**LEVELS, "controls_at": 2}, weights="finetune", **FINETUNE)
        found = [(c.kind, c.level) for c in unfolded(asked).cases if c.criterion == "l1"]
        assert sorted(found) == [
            ("random", 1), ("random", 2), ("scratch", 2), ("ticket", 1), ("ticket", 2),
            ("ticket", 3),
        ]  # fmt: skip

    def test_a_choice_that_failed_is_not_timed_and_the_rest_is(self, tmp_path: Path) -> None:
        asked = spec(
            recipe={"epochs": 6}, criteria="snip", p=1, early_bird={"criterion": "snip"}, latency={}
        )
        unfolding = unfolded(asked)
        [node] = [node for node in unfolding.nodes() if node.is_alone]
        gone = {"removed": ["blocks.1"]}
        outputs = {
            need: Output(tmp_path, gone, {}) for need in node.needs if "early bird" not in need
        }
        assert len(outputs) == len(node.needs) - 1
        stage = node.stage(outputs)
        assert stage is not None
        assert stage.inputs["cuts"] == [{"blocks": ["blocks.1"]}, {"blocks": []}]

    def test_connections_of_new_weights_are_not_followed(self) -> None:
        asked = spec(levels=LEVELS, weights=["rewind", "reinit"])
        followed = [c for c in comparisons_of(unfolded(asked)) if c.kind == "connections"]
        assert {comparison.cases[0].weights for comparison in followed} == {"rewind"}


def bench(folder: Path) -> Bench:
    stage = Stage("any", {})
    setting = Setting(SPEC["model"] | {"arguments": {}}, {"name": "digits", "image_size": None,
                      "options": {"test_share": 0.8}}, "branch", None)  # fmt: skip
    return Bench(Job(stage, str(folder)), StageStore(folder), setting)


class TestDevices:
    """The device "meta" stands for a GPU: a tensor of the CPU is not there."""

    def test_costs_are_counted_wherever_the_test_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def elsewhere(model: torch.nn.Module, *_: object, **__: object) -> Evaluation:
            model.to("meta")
            return Evaluation(1.0, 0.5, 10)

        monkeypatch.setattr(judging, "evaluate", elsewhere)
        place = bench(tmp_path)
        (tmp_path / "dense-0").mkdir()
        save_state(TrainingState.of(place.setting.build(0)), tmp_path / "dense-0/final.safetensors")
        inputs = {"seed": 0, "cut": {"blocks": []}, "network": "dense-0"}
        found, _ = judging.evaluation(place, inputs, tmp_path)
        assert found["accuracy"] == 0.5
        assert found["macs"] > 0

    def test_filters_are_scored_where_the_model_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[str, str]] = []

        def scored(model: torch.nn.Module, *_: object, example_inputs: torch.Tensor, **__: object):  # type: ignore[no-untyped-def]
            seen.append((next(model.parameters()).device.type, example_inputs.device.type))
            raise SpecError("seen")

        monkeypatch.setattr(choosing, "device", lambda: torch.device("meta"))
        monkeypatch.setattr(choosing, "filter_layers", lambda *_: [])
        monkeypatch.setattr(choosing, "filter_scores", scored)
        inputs = {"seed": 0, "source": {"seed": 0}, "criterion": "l1", "images_per_class": 1}
        with pytest.raises(SpecError, match="seen"):
            choosing.filters(bench(tmp_path), inputs, tmp_path)
        assert seen == [("meta", "meta")]


class Restless(torch.utils.data.Dataset[Any]):
    """Images that are augmented at every look."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(1, 8, 8), index


def test_a_line_hangs_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def looked_at(_: object, batches: Any) -> None:
        seen.extend(images for images, _ in batches)

    def once(model: torch.nn.Module, *_: object, recalibrate: Any, **__: object) -> Any:
        recalibrate(model)
        raise SpecError("seen")

    images = ImageData("restless", Restless(), Restless(), 10, (1, 8, 8))
    monkeypatch.setattr(comparing, "recalibrate_norms", looked_at)
    monkeypatch.setattr(comparing, "connectivity", once)
    monkeypatch.setattr(Bench, "final", lambda *_: TrainingState(Step(), {}))
    for number in (0, 1):
        place = bench(tmp_path)
        place.setting.__dict__["images"] = images
        place.setting.__dict__["image"] = torch.zeros(1, 1, 8, 8)
        torch.manual_seed(number)
        inputs = {"seed": 5, "cut": {"blocks": []}, "network": "", "twin": "", "alphas": 3}
        with pytest.raises(SpecError, match="seen"):
            comparing.line(place, inputs, tmp_path)
    assert seen[0].equal(seen[1])


def test_the_momentum_goes_from_level_to_level(tmp_path: Path) -> None:
    asked = spec(
        levels={"importances": "magnitude", "count": 2},
        weights="learning-rate",
        rewound_to=1,
        carry_optimizer=True,
        controls={"random": False, "scratch": False},
    )
    record = run(asked, tmp_path)
    assert record.failures == {}
    stages = {one.case.level: one.stage for one in record.networks}
    for level in (0, 1):
        state = load_state(tmp_path / "stages" / stages[level] / "final.safetensors")
        assert "blocks.0.conv.weight" in state.momentum, level


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    asked = spec(
        recipe={"epochs": 1, "batch_size": 64},
        criteria="snip",
        p=1,
        controls={"random": False, "scratch": False},
    )
    run(asked, folder)
    return folder


class TestRobustnessCommand:
    def invoke(self, *arguments: object) -> Result:
        options = ("--corruptions", "fog", "--severities", "1")
        return CliRunner().invoke(app, ["robustness", *map(str, arguments), *options])

    def test_nothing_is_trained_where_the_networks_are_not(
        self, made: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "results.json"
        shutil.copyfile(made / "results.json", copy)
        before = copy.read_bytes()
        for source in (copy, tmp_path):
            done = self.invoke(source)
            assert done.exit_code == 1
            assert "lacks 2 of their trainings" in " ".join(done.output.split())
        assert copy.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    def test_nor_by_another_version(self, made: Path, tmp_path: Path) -> None:
        folder = tmp_path / "old"
        shutil.copytree(made, folder)
        told = json.loads((folder / "results.json").read_text())
        told["environment"]["blockprune"] = "0.0.1"
        (folder / "results.json").write_text(json.dumps(told))
        done = self.invoke(folder)
        assert done.exit_code == 1
        assert "is a run of blockprune 0.0.1" in " ".join(done.output.split())
        assert RunRecord.from_json((folder / "results.json").read_text()).robustness == ()

    def test_a_factory_that_raises(self, tmp_path: Path) -> None:
        done = self.invoke(
            tmp_path / "t.safetensors", "--model", "tests.lottery_models:tiny",
            "--model-argument", "channels=-1",
        )  # fmt: skip
        assert done.exit_code == 2
        assert "cannot be built with {'channels': '-1'}" in " ".join(done.output.split())

    @pytest.mark.parametrize(
        ("severities", "message"), [("1,1", "named twice"), ("x", "integer"), ("", "is empty")]
    )
    def test_severities(self, severities: str, message: str) -> None:
        with pytest.raises(SpecError, match=message):
            choice_of("none", "fog", severities, corruption_files=None, shifts=(), samples=None)
