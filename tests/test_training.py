"""The recipe's schedule by its formula, and the loop against one written out by hand."""

from __future__ import annotations

import ast
import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import blockprune.lottery.training as training_module
from blockprune.data import EpochSampler, load_digits
from blockprune.errors import DataError, TrainingDivergedError
from blockprune.lottery.recipe import PAPER_RECIPE, Recipe
from blockprune.lottery.training import Step, evaluate, train, train_epochs
from blockprune.models import resnet20


class Net(nn.Module):
    """Small, with everything that training must treat with care."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.norm(self.first(x)).relu()))
        return out


@pytest.fixture
def blobs() -> TensorDataset:
    """Three well separated classes in four dimensions."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(90) % 3
    centres = 4 * torch.eye(3, 4)
    return TensorDataset(centres[labels] + torch.randn(90, 4, generator=generator), labels)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestRecipe:
    def test_milestones_after_a_warm_up(self) -> None:
        recipe = Recipe(epochs=10, lr=0.8, milestones=(4, 8), gamma=0.5, warmup_epochs=2)
        rates = [recipe.learning_rate(step, 2) for step in range(20)]
        assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert rates[4:8] == pytest.approx([0.8] * 4)
        assert rates[8:16] == pytest.approx([0.4] * 8)
        assert rates[16:] == pytest.approx([0.2] * 4)

    def test_one_cycle_rises_and_falls_along_a_cosine(self) -> None:
        recipe = Recipe(epochs=10, lr=1.0, schedule="one_cycle", warmup_epochs=2)
        rates = [recipe.learning_rate(step, 10) for step in range(100)]
        assert rates[:20] == pytest.approx([(k + 1) / 20 for k in range(20)])
        assert rates[20] == max(rates) == 1.0
        assert rates[60] == pytest.approx(0.5)
        assert all(a > b > 0 for a, b in pairwise(rates[20:]))

    def test_without_milestones_the_rate_is_constant(self) -> None:
        recipe = Recipe(epochs=3, lr=0.5)
        assert {recipe.learning_rate(step, 4) for step in range(12)} == {0.5}

    def test_a_warm_up_shorter_than_a_step_never_exceeds_lr(self) -> None:
        recipe = Recipe(epochs=3, lr=0.5, warmup_epochs=0.01)
        assert recipe.learning_rate(0, 4) == 0.5

    def test_the_paper_s_recipe(self) -> None:
        rates = [PAPER_RECIPE.learning_rate(epoch, 1) for epoch in (0, 99, 100, 149, 150, 199)]
        assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
        assert (PAPER_RECIPE.momentum, PAPER_RECIPE.nesterov) == (0.9, True)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"epochs": 0}, "epochs"),
            ({"lr": 0.0}, "lr"),
            ({"lr": math.nan}, "lr"),
            ({"momentum": 1.0}, "momentum"),
            ({"momentum": 0.0}, "nesterov needs a momentum"),
            ({"weight_decay": -1.0}, "weight_decay"),
            ({"schedule": "cosine"}, "schedule"),
            ({"milestones": (5, 5)}, "must rise inside 1 .. 9"),
            ({"milestones": (0,)}, "must rise inside 1 .. 9"),
            ({"milestones": (10,)}, "must rise inside 1 .. 9"),
            ({"warmup_epochs": 10.0}, r"warmup_epochs \(10.0\) must be below epochs \(10\)"),
            ({"schedule": "one_cycle"}, "needs warmup_epochs above 0"),
            (
                {"schedule": "one_cycle", "warmup_epochs": 1, "milestones": (5,)},
                "milestones mean nothing",
            ),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
            ({"learning_rate": 0.1}, "Extra inputs"),
        ],
    )
    def test_fields_out_of_range_are_named(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            Recipe(**{"epochs": 10, **fields})

    def test_json_round_trip_and_frozen(self) -> None:
        recipe = Recipe(epochs=10, milestones=(3, 7), warmup_epochs=0.5)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        with pytest.raises(ValidationError, match="frozen"):
            recipe.lr = 1.0  # type: ignore[misc]

    def test_every_field_says_what_it_is(self) -> None:
        assert all(field.description for field in Recipe.model_fields.values())


class TestTrain:
    def test_equals_a_loop_written_out(self, blobs: TensorDataset) -> None:
        recipe = Recipe(
            epochs=3, lr=0.1, weight_decay=1e-3, milestones=(2,), warmup_epochs=0.5, batch_size=20
        )
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        by_hand = copy.deepcopy(model)
        history = train(model, blobs, recipe)

        optimizer = torch.optim.SGD(
            by_hand.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
        )
        inputs, labels = blobs.tensors
        sampler = EpochSampler(90, recipe.seed)
        losses, step = [], 0
        for epoch in range(3):
            sampler.set_epoch(epoch)
            total = 0.0
            for rows in torch.tensor(list(sampler)).split(20):
                optimizer.param_groups[0]["lr"] = recipe.learning_rate(step, 5)
                loss = functional.cross_entropy(by_hand(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
                step += 1
            losses.append(total / 90)
        assert _equal(_state(model), _state(by_hand))
        assert [record.loss for record in history.epochs] == pytest.approx(losses)

    def test_learns_what_can_be_learnt(self, blobs: TensorDataset) -> None:
        model = Net()
        before = evaluate(model, blobs)
        history = train(model, blobs, Recipe(epochs=15, lr=0.05, batch_size=16), test=blobs)
        after = evaluate(model, blobs)
        assert before.accuracy < 0.9 < after.accuracy
        assert history.epochs[-1].test_accuracy == after.accuracy
        assert history.epochs[-1].loss < history.epochs[0].loss
        assert [record.epoch for record in history.epochs] == list(range(1, 16))
        assert history.seconds == sum(record.seconds for record in history.epochs) > 0

    def test_runs_repeat_whatever_else_is_drawn(self, blobs: TensorDataset) -> None:
        model = Net()
        twin = copy.deepcopy(model)
        recipe = Recipe(epochs=2, lr=0.1, batch_size=16, seed=5)
        first = train(model, blobs, recipe)
        torch.rand(17)
        second = train(twin, blobs, recipe)
        assert _equal(_state(model), _state(twin))
        assert [r.loss for r in first.epochs] == [r.loss for r in second.epochs]
        assert [r.accuracy for r in first.epochs] == [r.accuracy for r in second.epochs]

    def test_global_generators_and_modes_come_back(self, blobs: TensorDataset) -> None:
        model = Net().eval()
        model.drop.train()
        before = torch.get_rng_state()
        train(model, blobs, Recipe(epochs=1, batch_size=16), test=blobs)
        assert torch.equal(before, torch.get_rng_state())
        assert [name for name, module in model.named_modules() if module.training] == ["drop"]

    def test_nothing_is_left_on_the_model(self, blobs: TensorDataset) -> None:
        model = Net()
        known = set(vars(model))
        train(model, blobs, Recipe(epochs=1, batch_size=16))
        assert set(vars(model)) == known
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def test_training_in_turns_changes_nothing(self, blobs: TensorDataset) -> None:
        recipe = Recipe(epochs=3, lr=0.1, batch_size=16)
        alone = [Net(), Net()]
        in_turns = [copy.deepcopy(model) for model in alone]
        for model in alone:
            train(model, blobs, recipe)
        runs = [train_epochs(model, blobs, recipe) for model in in_turns]
        assert len(list(zip(*runs, strict=True))) == 3
        assert all(_equal(_state(a), _state(b)) for a, b in zip(alone, in_turns, strict=True))

    def test_frozen_parameters_stay(self, blobs: TensorDataset) -> None:
        model = Net()
        model.first.requires_grad_(False)
        before = _state(model)
        train(model, blobs, Recipe(epochs=1, lr=0.1, batch_size=16, weight_decay=0.1))
        after = _state(model)
        assert torch.equal(before["first.weight"], after["first.weight"])
        assert not torch.equal(before["last.weight"], after["last.weight"])

    def test_steps_are_counted_from_one(self, blobs: TensorDataset) -> None:
        steps: list[Step] = []
        train(Net(), blobs, Recipe(epochs=2, batch_size=40), on_step=steps.append)
        assert [(s.epoch, s.epochs, s.iteration, s.iterations) for s in steps] == [
            (epoch, 2, iteration, 3) for epoch in (1, 2) for iteration in (1, 2, 3)
        ]
        assert all(math.isfinite(step.loss) for step in steps)

    def test_divergence_names_epoch_and_iteration(self, blobs: TensorDataset) -> None:
        inputs, labels = blobs.tensors
        poisoned = inputs.clone()
        sampler = EpochSampler(90, 0)
        sampler.set_epoch(0)
        poisoned[list(sampler)[45]] = math.nan  # in the third batch of 20
        model = Net().eval()
        with pytest.raises(TrainingDivergedError, match="nan at epoch 1 of 2, iteration 3 of 5"):
            train(model, TensorDataset(poisoned, labels), Recipe(epochs=2, batch_size=20))
        assert not model.training
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("role", ["dataset", "test"])
    def test_empty_data_is_refused_at_once(self, blobs: TensorDataset, role: str) -> None:
        empty = TensorDataset(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
        sets: dict[str, Dataset[Any]] = {"dataset": blobs, "test": blobs, role: empty}
        with pytest.raises(DataError, match="empty"):
            train_epochs(Net(), sets["dataset"], Recipe(epochs=1), test=sets["test"])

    def test_nothing_is_printed(
        self, blobs: TensorDataset, capfd: pytest.CaptureFixture[str]
    ) -> None:
        train(Net(), blobs, Recipe(epochs=1, batch_size=16), test=blobs)
        assert capfd.readouterr() == ("", "")

    def test_a_resnet_learns_digits(self) -> None:
        data = load_digits()
        model = resnet20(in_channels=1)
        recipe = Recipe(epochs=4, lr=0.1, schedule="one_cycle", warmup_epochs=1, batch_size=64)
        train(model, data.train, recipe)
        assert evaluate(model, data.test).accuracy > 0.9


class TestEvaluate:
    def test_figures_are_means_over_samples_not_batches(self, blobs: TensorDataset) -> None:
        model = Net().eval()
        inputs, labels = blobs.tensors
        with torch.no_grad():
            logits = model(inputs)
        found = evaluate(model, blobs, batch_size=40)  # batches of 40, 40 and 10
        assert found.loss == pytest.approx(functional.cross_entropy(logits, labels).item())
        assert found.accuracy == (logits.argmax(1) == labels).sum().item() / 90
        assert found.samples == 90

    def test_nothing_of_the_model_changes(self, blobs: TensorDataset) -> None:
        model = Net().train()
        model.norm.eval()
        before, modes = _state(model), [module.training for module in model.modules()]
        rng = torch.get_rng_state()
        evaluate(model, blobs, batch_size=16)
        assert _equal(before, _state(model))
        assert modes == [module.training for module in model.modules()]
        assert torch.equal(rng, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loop_imports_nothing_of_pruning() -> None:
    tree = ast.parse(Path(training_module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"data", "errors", "lottery.recipe", "modes", "randomness"}
    ours = {name for name in imported if name and name.startswith("blockprune")}
    assert ours == {f"blockprune.{name}" for name in allowed}
