"""The experiment against its steps done by hand, and the demo from end to end, made small."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import blockprune
import blockprune.cli.demo as demo_module
from blockprune import find_blocks, make_plan, remove_blocks, score_blocks
from blockprune.cli.demo import Settings, demo_command, run_demo, settings_of
from blockprune.data import ImageData, balanced_batch, load_digits
from blockprune.errors import BlockpruneError, DataError, PlanError
from blockprune.lottery.experiment import Policy, tickets_at_initialisation
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.results import ExperimentResult
from blockprune.lottery.training import Progress, evaluate, train
from blockprune.models import resnet20, resnet32
from blockprune.report import comparison_markdown, reading_notes

FILES = ["accuracy.png", "blocks.png", "results.json", "table.md", "table.txt"]
BLOCK_MACS = 4_718_592 // 16  # of 8x8 images: a sixteenth of the 32x32 figure


@pytest.fixture
def few_digits() -> ImageData:
    """300 training and 100 test images."""
    data = load_digits()
    return replace(data, train=Subset(data.train, range(300)), test=Subset(data.test, range(100)))


@pytest.fixture
def tiny() -> Settings:
    """The demo's own settings with one epoch in large batches, and two tickets."""
    full = settings_of(quick=True, seed=0)
    recipe = Recipe(epochs=1, lr=0.05, batch_size=500)
    return replace(full, recipe=recipe, policy=Policy(ps=(1, 5), latency_batch_size=2))


class TestExperiment:
    def test_equals_the_steps_done_by_hand(self, few_digits: ImageData) -> None:
        torch.manual_seed(1)
        model = resnet20(in_channels=1)
        recipe = Recipe(epochs=2, lr=0.05, batch_size=100, seed=1)
        policy = Policy(ps=(1, 3), min_blocks_per_stage=2, latency_batch_size=1)
        image = few_digits.train[0][0].unsqueeze(0)
        result = tickets_at_initialisation(model, few_digits, recipe, policy, name="a name")

        analysis = find_blocks(model, image)
        batch = balanced_batch(few_digits.train, 10, 10, seed=1)
        scores = score_blocks(model, "grasp", batch, example_inputs=image, seed=1)
        for found in result.tickets:
            plan = make_plan(
                analysis, scores, p=found.p, protect=("layer1.0",), min_blocks_per_stage=2
            )
            ticket = remove_blocks(model, plan, image)
            train(ticket, few_digits.train, recipe)
            assert found.removed == plan.remove
            assert found.accuracy == evaluate(ticket, few_digits.test).accuracy
            assert found.params == sum(parameter.numel() for parameter in ticket.parameters())
            assert found.blocks == 9 - found.p
        dense = copy.deepcopy(model)
        train(dense, few_digits.train, recipe)
        assert result.dense.accuracy == evaluate(dense, few_digits.test).accuracy
        assert result.scores == dict(scores.scores)
        assert (result.model, result.data, result.seed) == ("a name", "digits", 1)
        assert (result.train_images, result.test_images) == (300, 100)
        macs = [result.dense.macs - ticket.macs for ticket in result.tickets]
        assert macs == [BLOCK_MACS, 3 * BLOCK_MACS]

    def test_the_trained_network_cut_and_recovered_by_hand(self, few_digits: ImageData) -> None:
        torch.manual_seed(1)
        model = resnet20(in_channels=1)
        recipe = Recipe(epochs=2, lr=0.05, batch_size=100, seed=1)
        policy = Policy(ps=(1,), latency_batch_size=50, recover_p=2)
        result = tickets_at_initialisation(model, few_digits, recipe, policy)
        found = result.recovered
        assert found is not None

        train(model, few_digits.train, recipe)
        images = torch.stack([few_digits.train[k][0] for k in range(300)])
        batches = [(part, None) for part in images.split(50)]
        options = {"protect": ("layer1.0",), "min_blocks_per_stage": 2}
        cut = blockprune.prune(model, "block_influence", 2, data=batches, **options)
        recovered = blockprune.recover(cut, model, batches)
        assert found.cut.removed == found.recovered.removed == blockprune.plan_of(cut).remove
        assert found.cut.accuracy == evaluate(cut, few_digits.test).accuracy
        assert found.recovered.accuracy == evaluate(recovered, few_digits.test).accuracy
        assert (found.criterion, found.method, found.samples) == ("block_influence", "refit", 300)
        assert found.cut.train_seconds == 0 < found.recovered.train_seconds
        assert found.cut.params == sum(p.numel() for p in cut.parameters())
        assert ExperimentResult.from_json(result.to_json()) == result
        lines = comparison_markdown(result).splitlines()
        for label, network in (("cut 2", found.cut), ("refit 2", found.recovered)):
            [line] = [line for line in lines if line.startswith(f"| {label} |")]
            assert f"| {100 * network.accuracy:.2f} |" in line
        assert "without labels" in reading_notes(result)[-1]

    def test_the_model_and_the_generators_are_as_they_were(self, few_digits: ImageData) -> None:
        model = resnet20(in_channels=1)
        state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        tickets_at_initialisation(
            model, few_digits, Recipe(epochs=1, batch_size=150), Policy(ps=(1,))
        )
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert model.training
        assert torch.equal(rng, torch.get_rng_state())

    def test_the_policy_of_the_paper_leaves_nine_blocks_of_resnet32(
        self, few_digits: ImageData
    ) -> None:
        recipe = Recipe(epochs=1, batch_size=150)
        with pytest.raises(PlanError, match="9"):
            tickets_at_initialisation(resnet32(in_channels=1), few_digits, recipe, Policy(ps=(10,)))

    def test_a_watcher_hears_of_every_step(self, few_digits: ImageData) -> None:
        heard: list[tuple[int, int, int]] = []
        stages: list[str] = []

        class Ear:
            def stage(self, text: str) -> None:
                stages.append(text)

            def step(self, p: int, step: Progress) -> None:
                heard.append((p, step.epoch, step.iteration))

        recipe = Recipe(epochs=2, batch_size=150)
        policy = Policy(ps=(1,), criterion="random", latency_batch_size=1)
        tickets_at_initialisation(
            resnet20(in_channels=1), few_digits, recipe, policy, watcher=Ear()
        )
        # Turns: the order of the networks turns over every epoch.
        assert heard == [(p, 1, k) for p in (0, 1) for k in (1, 2)] + [
            (p, 2, k) for p in (1, 0) for k in (1, 2)
        ]
        assert stages[0] == "Scoring blocks with random"
        assert "Training" in stages

    def test_images_that_are_not_tensors_are_refused(self, few_digits: ImageData) -> None:
        raw = replace(few_digits, train=[("picture", 0)])  # type: ignore[arg-type]
        with pytest.raises(DataError, match="images are str, not tensors"):
            tickets_at_initialisation(nn.Identity(), raw, Recipe(epochs=1))


class TestDemo:
    def test_end_to_end(
        self, tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "results"
        assert run_demo(tiny, out) == 0
        assert sorted(file.name for file in out.iterdir()) == FILES
        result = ExperimentResult.from_json((out / "results.json").read_text("utf-8"))
        assert (result.model, result.image_shape) == ("ResNet32", (1, 8, 8))
        assert result.train_images + result.test_images == 1797
        assert [ticket.p for ticket in result.tickets] == [1, 5]
        for ticket in result.tickets:
            assert len(ticket.removed) == ticket.p
            assert "layer1.0" not in ticket.removed
            assert result.dense.macs - ticket.macs == ticket.p * BLOCK_MACS
            for stage in ("layer1", "layer2", "layer3"):
                assert sum(name.startswith(stage) for name in ticket.removed) <= 3
        assert set(result.tickets[0].removed) < set(result.tickets[1].removed)
        printed = capsys.readouterr()
        table = (out / "table.txt").read_text("utf-8")
        assert table.strip() in printed.out.replace(str(out), "")
        assert "100%" in printed.err

    def test_two_runs_find_the_same(self, tiny: Settings, tmp_path: Path) -> None:
        found = []
        for name in ("first", "second"):
            torch.rand(3)
            run_demo(tiny, tmp_path / name)
            text = (tmp_path / name / "results.json").read_text("utf-8")
            result = ExperimentResult.from_json(text)
            networks = (result.dense, *result.tickets)
            found.append((result.scores, [(n.removed, n.accuracy) for n in networks]))
        assert found[0] == found[1]

    @pytest.mark.parametrize("present", [False, True])
    def test_ctrl_c_leaves_the_folder_as_it_was(
        self,
        tiny: Settings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        present: bool,
    ) -> None:
        def interrupted(self: object, p: int, step: Progress) -> None:
            if (p, step.iteration) == (1, 2):
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(demo_module._DemoBar, "step", interrupted)
        out = tmp_path / "results"
        if present:
            out.mkdir()
            (out / "table.txt").write_text("old")
        assert run_demo(tiny, out, force=True) == 130
        assert [file.name for file in tmp_path.rglob("*.*")] == (["table.txt"] if present else [])
        assert out.exists() == present
        assert not present or (out / "table.txt").read_text() == "old"
        assert "nothing was written" in capsys.readouterr().err

    def test_ctrl_c_names_the_folder_as_it_is(
        self,
        tiny: Settings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def interrupted(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(demo_module, "tickets_at_initialisation", interrupted)
        # What rich would take for markup, and no line of 80 columns would hold.
        out = tmp_path / "runs [bold]" / ("long" * 30)
        assert run_demo(tiny, out) == 130
        assert capsys.readouterr().err.endswith(f"Interrupted; nothing was written to {out}.\n")
        assert list(tmp_path.iterdir()) == []

    def test_ctrl_c_while_writing_leaves_no_file(
        self, tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(result: ExperimentResult, folder: Path) -> tuple[str, ...]:
            (folder / "table.txt").write_text("hal")
            signal.raise_signal(signal.SIGINT)
            return ()

        monkeypatch.setattr(demo_module, "write_report", interrupted)
        assert run_demo(tiny, tmp_path / "results") == 130
        assert list(tmp_path.iterdir()) == []

    def test_results_in_the_way_ask_for_force(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(BlockpruneError, match="Use --force"):
            demo_command(out=tmp_path, quick=True, seed=0, force=False)
        assert (tmp_path / "results.json").read_text() == "{}"

    def test_quick_differs_in_epochs_alone(self) -> None:
        quick, full = (settings_of(quick=quick, seed=7) for quick in (True, False))
        expected = Policy(ps=(1, 2, 3, 4, 5), criterion="grasp", recover_p=5)
        assert quick.policy == full.policy == expected
        assert quick.recipe.epochs < full.recipe.epochs
        epochs = {"epochs": full.recipe.epochs, "warmup_epochs": full.recipe.warmup_epochs}
        assert quick.recipe.model_copy(update=epochs) == full.recipe
        assert full.recipe.seed == 7
