"""A run against its steps done by hand, and what is left of it when it is killed or goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import blockprune.lottery.checkpoints as checkpoints_module
import blockprune.lottery.work as work_module
from blockprune import remove_blocks, score_blocks
from blockprune.cli import app
from blockprune.criteria import NoDataWarning
from blockprune.data import DATASETS, balanced_batch, load_digits
from blockprune.errors import CriterionError, DataError, ModelSpecError, PlanError
from blockprune.lottery import RunRecord, Spec, run
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.running import Event
from blockprune.lottery.spec import SpecError
from blockprune.lottery.stages import RunError
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.lottery.steps import Step
from blockprune.lottery.training import evaluate, train
from blockprune.lottery.work import Setting, fresh_seed
from tests.lottery_models import SPEC, Tiny, last_first, network, tiny

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=64)


def spec(**changes: Any) -> Spec:
    return Spec.parse({**SPEC, "seeds": 1, **changes})


def seeded(seed: int) -> Tiny:
    torch.manual_seed(seed)
    return tiny()


def stages(folder: Path, kind: str = "") -> list[Path]:
    return sorted(folder.glob(f"stages/{kind}*-*"))


class TestByHand:
    def test_algorithm_2(self, tmp_path: Path) -> None:
        record = run(spec(criteria="grasp", seeds=[3]), tmp_path)
        data = load_digits(test_share=0.8)
        image = data.train[0][0].unsqueeze(0)
        recipe = RECIPE.model_copy(update={"seed": 3})

        dense = seeded(3)
        scores = score_blocks(
            dense, "grasp", balanced_batch(data.train, 10, 10, seed=3), example_inputs=image, seed=3
        )
        candidates = {name: score for name, score in scores.scores.items() if name != "blocks.0"}
        lowest = min(candidates, key=candidates.__getitem__)
        ticket = remove_blocks(dense, [lowest], image)
        train(ticket, data.train, recipe)
        train(dense, data.train, recipe)

        assert record.scores[0].scores == scores.scores
        found = network(record, kind="ticket")
        assert found.removed == (lowest,)
        assert found.accuracy == evaluate(ticket, data.test).accuracy
        assert (found.blocks, found.params) == (2, sum(p.numel() for p in ticket.parameters()))
        state = load_state(tmp_path / "stages" / found.stage / "final.safetensors")
        assert all(state.weights[k].equal(v) for k, v in ticket.state_dict().items())
        assert network(record, kind="dense").accuracy == evaluate(dense, data.test).accuracy

    def test_algorithm_1_and_its_policies(self, tmp_path: Path) -> None:
        record = run(
            spec(
                criteria="l1",
                scored_at="final",
                rewound_to="50%",
                weights=["rewind", "learning-rate", "reinit", "finetune"],
                finetune={"epochs": 1, "lr": 0.001},
                recipe={**SPEC["recipe"], "milestones": [1]},
            ),
            tmp_path,
        )
        data = load_digits(test_share=0.8)
        image = data.train[0][0].unsqueeze(0)
        recipe = RECIPE.model_copy(update={"milestones": (1,)})
        dense, states = seeded(0), []
        moments = [Step(epoch=1), Step(epoch=2)]
        train(dense, data.train, recipe, keep=moments, on_state=states.append)
        middle, final = states
        scores = score_blocks(dense, "l1", example_inputs=image).scores
        lowest = min([name for name in scores if name != "blocks.0"], key=scores.__getitem__)

        def accuracy(weights: TrainingState, step: Step, how: Recipe) -> float:
            ticket = remove_blocks(dense, [lowest], image)
            kept = {name: weights.weights[name] for name in ticket.state_dict()}
            train(ticket, data.train, how, start=TrainingState(step, kept))
            return evaluate(ticket, data.test).accuracy

        new = TrainingState.of(seeded(fresh_seed(0)))
        constant = Recipe(epochs=1, lr=0.001, batch_size=64)
        for weights, expected, epochs in (
            ("rewind", accuracy(middle, Step(epoch=1), recipe), 1),
            ("learning-rate", accuracy(final, Step(epoch=1), recipe), 1),
            ("reinit", accuracy(new, Step(), recipe), 2),
            ("finetune", accuracy(final, Step(), constant), 1),
        ):
            found = network(record, kind="ticket", weights=weights)
            assert (found.accuracy, len(found.epochs)) == (expected, epochs), weights
            # The controls start alike.
            assert len(network(record, kind="random", weights=weights).epochs) == epochs
        scratch = network(record, kind="scratch")
        assert scratch.stage == network(record, kind="ticket", weights="reinit").stage

    def test_pruning_during_training(self, tmp_path: Path) -> None:
        record = run(
            spec(criteria="tests.lottery_models:last_first", scored_at=1, rewound_to="scored_at"),
            tmp_path,
        )
        found = network(record, kind="ticket")
        assert found.removed == ("blocks.2",)
        assert (found.case.scored_at, found.case.rewound_to) == (Step(epoch=1), Step(epoch=1))
        assert [figures.epoch for figures in found.epochs] == [2]

    def test_early_birds_are_drawn_where_masks_settle(self, tmp_path: Path) -> None:
        own = "tests.lottery_models:last_first"
        record = run(
            spec(
                recipe={**SPEC["recipe"], "epochs": 4},
                early_bird={"criterion": own, "window": 2},
                similarities=True,
            ),
            tmp_path,
        )
        found = network(record, kind="ticket", early_bird=True)
        # The masks of a criterion that reads no weights agree at once: after the second epoch.
        assert found.drawn_at == Step(epoch=2)
        assert [figures.epoch for figures in found.epochs] == [3, 4]
        assert found.removed == ("blocks.2",)
        random = network(record, kind="random", early_bird=True)
        assert [figures.epoch for figures in random.epochs] == [3, 4]
        assert random.removed == network(record, kind="random", early_bird=False).removed

    def test_masks_that_never_settle_are_no_failure(self, tmp_path: Path) -> None:
        record = run(
            spec(
                recipe={**SPEC["recipe"], "epochs": 4},
                early_bird={"criterion": "tests.lottery_models:restless", "window": 2},
                similarities=True,
                robustness={"corruptions": "contrast", "severities": [1]},
            ),
            tmp_path,
        )
        assert not [one for one in record.networks if one.case.early_bird]
        assert record.failures == {}
        # Where there is no network, there is nothing to compare, and nothing to measure.
        assert {one.case for one in record.robustness} == {one.case for one in record.networks}
        assert [one.case.early_bird for one in record.similarities] == [False]
        assert any("had not settled" in note for note in record.notes)

    def test_iterative_scores_again(self, tmp_path: Path) -> None:
        own = "tests.lottery_models:last_first"
        schedules = ["one-shot", "iterative", "beam"]
        record = run(spec(criteria=own, p=2, schedule=schedules, beam_width=2), tmp_path)
        for schedule in schedules:
            found = network(record, kind="ticket", schedule=schedule)
            assert found.removed == ("blocks.1", "blocks.2")
        # Equal blocks are trained once.
        assert len({one.stage for one in record.networks if one.case.kind == "ticket"}) == 1

    def test_what_else_is_measured(self, tmp_path: Path) -> None:
        record = run(
            spec(similarities=True, latency={"batch": 2, "repeats": 2}, test_every_epoch=True),
            tmp_path,
        )
        [similarity] = record.similarities
        assert similarity.rows == tuple(block.name for block in record.blocks)
        assert set(similarity.rows) - set(similarity.columns) == set(
            network(record, kind="ticket").removed
        )
        assert record.latency_batch == 2
        for one in record.networks:
            assert one.latency_ms is not None
            assert one.latency_ms > 0
            assert one.epochs[-1].test_accuracy == one.accuracy
            assert one.seconds > 0
        assert RunRecord.from_json(record.to_json()) == record

    def test_a_share_of_the_blocks(self, tmp_path: Path) -> None:
        record = run(spec(p=[0.34], controls={"random": False, "scratch": False}), tmp_path)
        assert network(record, kind="ticket").case.p == 1

    def test_no_generator_moves(self, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        threads = torch.get_num_threads()
        alone = {"random": False, "scratch": False}
        run(spec(threads=threads + 1, recipe={"epochs": 1}, controls=alone), tmp_path)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_num_threads() == threads


class TestAgain:
    def test_nothing_is_done_twice(self, tmp_path: Path) -> None:
        record = run(spec(latency={"batch": 2, "repeats": 2}), tmp_path)
        text = (tmp_path / "results.json").read_text()
        events: list[Event] = []
        # Times too are those of before.
        assert (
            run(spec(latency={"batch": 2, "repeats": 2}), tmp_path, on_event=events.append)
            == record
        )
        assert (tmp_path / "results.json").read_text() == text
        assert {event.kind for event in events} == {"found"}
        assert [event.finished for event in events] == list(range(1, events[0].total + 1))

    def test_a_longer_spec_takes_what_is_there(self, tmp_path: Path) -> None:
        run(spec(), tmp_path)
        before = {path: path.stat().st_mtime_ns for path in stages(tmp_path)}
        record = run(spec(p=[1, 2], seeds=2), tmp_path)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert len(record.networks) == 2 * (1 + 2 + 2 + 2)

    def test_a_damaged_output_is_made_again_and_told(self, tmp_path: Path) -> None:
        record = run(spec(), tmp_path)
        [dense] = stages(tmp_path, "dense")
        (dense / "final.safetensors").write_bytes(b"damaged")
        again = run(spec(), tmp_path)
        assert any(dense.name in note and "damaged" in note for note in again.notes)
        assert _without_damage(again) == record.without_times()

    def test_one_and_two_processes_find_the_same(self, tmp_path: Path) -> None:
        asked = spec(criteria=["snip", "l1"], seeds=2)
        one = run(asked, tmp_path / "a" / "run")
        two = run(asked, tmp_path / "b" / "run", jobs=2)
        assert one.without_times() == two.without_times()
        assert two.failures == {}

    def test_any_executor_will_do(self, tmp_path: Path) -> None:
        one = run(spec(), tmp_path / "a" / "run")
        with ThreadPoolExecutor(3) as threads:
            other = run(spec(), tmp_path / "b" / "run", executor=threads)
        assert one.without_times() == other.without_times()


class TestKilled:
    def test_resumes_inside_a_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = spec(
            recipe={**SPEC["recipe"], "epochs": 5},
            checkpoint_epochs=2,
            scored_at="final",
            rewound_to=[{"epoch": 0, "iteration": 3}, {"epoch": 3, "iteration": 2}],
        )
        whole = run(asked, tmp_path / "whole" / "run")
        begun: list[Step] = []

        def interrupted(model: Any, *args: Any, start: Any, **how: Any) -> Any:
            begun.append(Step() if start is None else start.step)
            if len(begun) == 3:
                raise KeyboardInterrupt
            return train(model, *args, start=start, **how)

        folder = tmp_path / "killed" / "run"
        monkeypatch.setattr(checkpoints_module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(asked, folder)
        assert not (folder / "results.json").exists()
        assert [path.name for path in folder.glob("stages/unfinished/*/epoch-*")] == [
            "epoch-000004"
        ]
        record = run(asked, folder)
        # Epochs 1 to 4 of the dense network were not trained again.
        assert begun[:4] == [Step(), Step(epoch=2), Step(epoch=4), Step(epoch=4)]
        assert record.without_times() == whole.without_times()
        assert not list(folder.glob("stages/unfinished/*/*"))

    @pytest.mark.parametrize("file", ["state.safetensors", "epochs.json", "kept", "figures"])
    def test_a_damaged_checkpoint_begins_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
    ) -> None:
        asked = spec(
            recipe={**SPEC["recipe"], "epochs": 3},
            checkpoint_epochs=1,
            scored_at="final",
            rewound_to=[1],
        )
        whole = run(asked, tmp_path / "whole" / "run")
        calls: list[Step] = []

        def interrupted(*args: Any, **how: Any) -> Any:
            calls.append(how["stop"])
            if len(calls) == 3:
                raise KeyboardInterrupt
            return train(*args, **how)

        folder = tmp_path / "killed" / "run"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_module, "train", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(asked, folder)
        place = {"kept": "state-*", "figures": "epoch-*/epochs.json"}.get(file, f"epoch-*/{file}")
        [damaged] = folder.glob(f"stages/unfinished/*/{place}")
        content = damaged.read_bytes()
        # JSON as whole as before, with another loss in it; or an end that is lost.
        changed = re.sub(rb"(loss[^0-9]+)[0-9]", rb"\g<1>7", content, count=1)
        damaged.write_bytes(changed if file == "figures" else content[:-20] + bytes(20))
        assert damaged.read_bytes() != content
        record = run(asked, folder)
        assert any("checkpoint" in note and "began anew" in note for note in record.notes)
        assert _without_damage(record) == whole.without_times()

    def test_sigkill_at_any_moment(self, tmp_path: Path, large: bool) -> None:
        """Killed after a number of stages drawn at random, and started again; 20 times at large."""
        asked = spec(criteria=["snip", "l1"], scored_at=["init", "final"], checkpoint_epochs=1)
        whole = run(asked, tmp_path / "whole" / "run")
        total = len(stages(tmp_path / "whole" / "run"))
        file = tmp_path / "spec.json"
        file.write_text(asked.model_dump_json())
        folder = tmp_path / "killed" / "run"
        for moment in sorted(random.choices(range(total - 1), k=20 if large else 3)):
            process = _started(file, folder)
            while len(stages(folder)) < moment and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.random() / 5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (folder / "results.json").exists() or process.returncode == 0
        process = _started(file, folder)
        assert process.wait() == 0
        text = (folder / "results.json").read_text()
        record = RunRecord.from_json(text).model_copy(update={"command": whole.command})
        assert record.without_times() == whole.without_times()
        assert not list(folder.glob("stages/.new-*"))

    def test_workers_end_with_the_run(self, tmp_path: Path) -> None:
        asked = spec(recipe={**SPEC["recipe"], "epochs": 500}, seeds=2)
        file = tmp_path / "spec.json"
        file.write_text(asked.model_dump_json())
        process = _started(file, tmp_path / "run", "--jobs", "2")
        unfinished = tmp_path / "run" / "stages" / "unfinished"
        while len(list(unfinished.glob("dense-*"))) < 2 and process.poll() is None:
            time.sleep(0.05)
        children = _children(process.pid)
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(_is_alive(child) for child in children):
            time.sleep(0.05)


class TestCurves:
    def test_each_epoch_is_logged_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logged: dict[str, list[tuple[str, int]]] = {}

        class SummaryWriter:
            def __init__(self, folder: str) -> None:
                self.rows = logged.setdefault(Path(folder).name, [])

            def add_scalar(self, name: str, value: float, step: int) -> None:
                self.rows.append((name, step))

            def close(self) -> None:
                pass

        stand_in = types.SimpleNamespace(SummaryWriter=SummaryWriter)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
        monkeypatch.setattr("blockprune.lottery.tensorboard.is_installed", lambda: True)
        recipe = {**SPEC["recipe"], "epochs": 3}
        record = run(spec(recipe=recipe, checkpoint_epochs=2), tmp_path)
        assert set(logged) == {one.stage for one in record.networks}
        for rows in logged.values():
            assert rows == [(name, n) for n in (1, 2, 3) for name in ("loss", "accuracy")]


def loud(context: Any) -> dict[str, float]:
    """Warn of what a reader must know, of something else, and rank as `last_first` does."""
    warnings.warn("no data were looked at", NoDataWarning, stacklevel=1)
    warnings.warn("a library changes", FutureWarning, stacklevel=1)
    return last_first(context)


class TestWarnings:
    def test_those_of_this_package_are_notes_and_others_are_shown(self, tmp_path: Path) -> None:
        asked = spec(criteria=f"{__name__}:loud", controls={"random": False, "scratch": False})
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            record = run(asked, tmp_path)
        assert record.failures == {}
        [note] = [note for note in record.notes if "no data were looked at" in note]
        assert note.startswith("seed 0: score by")
        said = [str(one.message) for one in shown]
        assert "a library changes" in said
        assert "no data were looked at" not in said
        assert not any("a library changes" in note for note in record.notes)


class TestSettings:
    def setting(self, **data: Any) -> Setting:
        told = {
            "model": {"name": "tests.lottery_models:tiny", "arguments": {}},
            "data": {"name": "digits", "image_size": None, "options": {}, **data},
            "granularity": "branch",
        }
        return Setting.of(told, None)

    def test_images_have_the_size_asked_for(self) -> None:
        assert self.setting().image.shape == (1, 1, 8, 8)
        large = self.setting(image_size=16)
        assert large.images.image_shape == (1, 16, 16)
        assert large.image.shape == (1, 1, 16, 16)

    def test_images_that_are_not_tensors_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def pictures(root: Path, options: int = 0) -> Any:
            found = load_digits()
            return dataclasses.replace(found, train=[(Image.new("L", (8, 8)), 0)])

        monkeypatch.setitem(DATASETS, "pictures", pictures)
        setting = dataclasses.replace(self.setting(name="pictures"), data_dir=".")
        with pytest.raises(DataError, match="images are Image, not tensors"):
            _ = setting.image


class TestWrong:
    def test_a_failing_stage_leaves_the_others(self, tmp_path: Path) -> None:
        asked = spec(criteria=["tests.lottery_models:broken", "snip"])
        record = run(asked, tmp_path)
        assert {(one.case.kind, one.case.criterion) for one in record.networks} == {
            ("dense", None),
            ("ticket", "snip"),
            ("random", "random"),
            ("scratch", "snip"),
        }
        first = "seed 0: score by tests.lottery_models:broken at epoch 0"
        assert "the criterion is broken" in record.failures[first]
        rest = {error for stage, error in record.failures.items() if stage != first}
        assert all(error.startswith("Not run, since this failed") for error in rest)
        assert RunRecord.from_json((tmp_path / "results.json").read_bytes()) == record

    def test_a_diverging_run(self, tmp_path: Path) -> None:
        record = run(spec(recipe={**SPEC["recipe"], "lr": 1e30}), tmp_path)
        assert record.networks == ()
        assert record.verdicts == ()
        assert record.failures["seed 0: train dense"].startswith("TrainingDivergedError")
        # Scores at initialisation need no training.
        assert len(record.scores) == 1

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(state: TrainingState, path: Any) -> None:
            if "ticket-" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            save_state(state, path)

        whole = run(spec(), tmp_path / "whole" / "run")
        folder = tmp_path / "full" / "run"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_module, "save_state", full)
            record = run(spec(), folder)
        assert "No space left" in record.failures["seed 0: train snip, p=1, scored at epoch 0"]
        assert [one.case.kind for one in record.networks] == ["dense"]
        assert not list(folder.glob("stages/.new-*"))
        # With room again, the same call ends the run.
        assert run(spec(), folder).without_times() == whole.without_times()

    def test_a_stage_that_kills_its_workers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockprune.lottery.executors.TRIES", 1)
        record = run(spec(criteria=["tests.lottery_models:deadly", "snip"]), tmp_path, jobs=2)
        first = "seed 0: score by tests.lottery_models:deadly at epoch 0"
        assert "killed, or out of memory" in record.failures[first]
        assert network(record, kind="ticket", criterion="snip").accuracy > 0

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"data": {"name": "cifar10"}}, DataError, "cifar10"),
            ({"data": {"name": "digitz"}}, DataError, "digits"),
            ({"criteria": "snap"}, CriterionError, "snip"),
            ({"criteria": "tests.lottery_models:absent"}, CriterionError, "absent"),
            ({"model": {"name": "blockprune:resnet21"}}, ModelSpecError, "resnet20"),
            (
                {"model": {"name": "blockprune:resnet20", "arguments": {"inchannels": 1}}},
                ModelSpecError,
                "in_channels",
            ),
            (
                {"model": {"name": "tests.lottery_models:tiny", "arguments": {"channels": -1}}},
                ModelSpecError,
                "cannot be built",
            ),
            ({"model": {"name": "tests.lottery_models:ONE"}}, SpecError, "not a factory"),
            (
                {"model": {"name": "tests.lottery_models:tiny", "arguments": {"classes": 3}}},
                SpecError,
                r"a logit for each class",
            ),
            ({"p": 3}, PlanError, "2"),
            ({"p": 0.1}, SpecError, "less than one"),
            ({"protect": "layer9.*"}, PlanError, "layer9"),
            ({"images_per_class": 1000}, DataError, "1000"),
            ({"rewound_to": "99.9%"}, SpecError, "nothing to train"),
            ({"rewound_to": {"epoch": 1, "iteration": 7}}, SpecError, "behind the end"),
        ],
        ids=str,
    )
    def test_what_cannot_be_done_is_refused_before_any_work(
        self, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            run(spec(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_missing_data_folder(self, tmp_path: Path) -> None:
        asked = spec(data={"name": "cifar10"}, model={"name": "blockprune:resnet20"})
        with pytest.raises(DataError, match="absent"):
            run(asked, tmp_path / "run", data_dir=tmp_path / "absent")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("content", ["{}", "precious", ""])
    def test_foreign_results_are_not_overwritten(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(RunError, match="no record of a run"):
            run(spec(), tmp_path)
        assert (tmp_path / "results.json").read_text() == content
        assert len(list(tmp_path.iterdir())) == 1

    def test_an_unknown_executor(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="give local, or dask"):
            run(spec(), tmp_path, executor="slurm")


class TestCommand:
    def test_prints_who_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "spec.json"
        file.write_text(spec(seeds=2).model_dump_json())
        out = tmp_path / "out"
        result = CliRunner().invoke(app, ["lottery", "run", str(file), "--out", str(out)])
        assert result.exit_code == 0, result.output
        for text in ("dense", "snip, p=1", "random, p=1", "verdict", "results.json"):
            assert text in result.stdout
        record = RunRecord.from_json((out / "results.json").read_bytes())
        assert record.command == "blockprune lottery run spec.json --out out"
        assert str(tmp_path) not in (out / "results.json").read_text()

    def test_the_command_of_the_record_names_no_folder_of_data(self, tmp_path: Path) -> None:
        file = tmp_path / "spec.json"
        file.write_text(spec(controls={"random": False, "scratch": False}).model_dump_json())
        place = ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "private")]
        result = CliRunner().invoke(app, ["lottery", "run", str(file), *place])
        assert result.exit_code == 0, result.output
        record = RunRecord.from_json((tmp_path / "out" / "results.json").read_bytes())
        assert record.command == "blockprune lottery run spec.json --out out --data-dir DATA"
        assert "private" not in (tmp_path / "out" / "results.json").read_text()

    def test_a_failure_is_the_exit_code(self, tmp_path: Path) -> None:
        file = tmp_path / "spec.json"
        file.write_text(spec(criteria=["tests.lottery_models:broken"]).model_dump_json())
        result = CliRunner().invoke(
            app, ["lottery", "run", str(file), "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 1
        assert "the criterion is broken" in result.stderr
        assert (tmp_path / "out" / "results.json").exists()

    def test_ctrl_c_says_how_to_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setitem(work_module.WORK, "score", interrupted)
        file = tmp_path / "spec.json"
        file.write_text(spec().model_dump_json())
        result = CliRunner().invoke(
            app, ["lottery", "run", str(file), "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 130
        assert "the same command goes on" in result.stderr
        assert len(stages(tmp_path / "out", "dense")) == 1

    def test_a_bad_spec_is_one_sentence(self, tmp_path: Path) -> None:
        file = tmp_path / "spec.toml"
        file.write_text("critera = 1")
        result = CliRunner().invoke(
            app, ["lottery", "run", str(file), "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 1
        assert "Did you mean criteria" in result.stderr
        assert not (tmp_path / "out").exists()


def test_blocks_are_told_in_order(tmp_path: Path) -> None:
    record = run(
        spec(
            model={"name": "blockprune:resnet20", "arguments": {"in_channels": 1}},
            recipe={"epochs": 1},
            controls={"random": False, "scratch": False},
        ),
        tmp_path,
    )
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert [block.name for block in record.blocks] == names
    assert [b.name for b in record.blocks if not b.removable] == ["layer2.0", "layer3.0"]
    assert [block.stage for block in record.blocks] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def _without_damage(record: RunRecord) -> RunRecord:
    notes = tuple(note for note in record.notes if "damaged" not in note)
    return record.without_times().model_copy(update={"notes": notes})


def _started(file: Path, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            *("-m", "blockprune.cli", "lottery", "run", str(file)),
            *("--out", str(folder), *options),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not state.stdout.startswith("Z")
