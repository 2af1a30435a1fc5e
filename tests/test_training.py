"""The recipe's schedule by its formula, the loop against one written out, resumed against whole."""

from __future__ import annotations

import ast
import copy
import math
from dataclasses import replace
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
from blockprune.errors import CheckpointError, DataError, TrainingDivergedError
from blockprune.lottery.recipe import PAPER_RECIPE, Recipe
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.lottery.steps import Step
from blockprune.lottery.training import Progress, evaluate, train, train_epochs
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

    def test_linear_falls_on_a_line(self) -> None:
        recipe = Recipe(epochs=12, lr=1.0, final_lr=0.2, schedule="linear", warmup_epochs=2)
        rates = [recipe.learning_rate(t, 10) for t in (9, 20, 70, 119)]
        assert rates == pytest.approx([0.5, 1.0, 0.6, 0.208])

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
            ({"schedule": "linear", "milestones": (5,)}, "mean nothing to the linear schedule"),
            ({"final_lr": 0.001}, "is where the linear schedule ends"),
            ({"schedule": "linear", "final_lr": 9.0}, "at or below lr"),
            (
                {"schedule": "one_cycle", "warmup_epochs": 1, "milestones": (5,)},
                "milestones mean nothing",
            ),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
            ({"ema_decay": 1.0}, "ema_decay"),
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
        steps: list[Progress] = []
        train(Net(), blobs, Recipe(epochs=2, batch_size=40), on_step=steps.append)
        assert [(s.epoch, s.epochs, s.iteration, s.iterations) for s in steps] == [
            (epoch, 2, iteration, 3) for epoch in (1, 2) for iteration in (1, 2, 3)
        ]
        assert all(math.isfinite(step.loss) for step in steps)

    def test_workers_that_fetch_samples_change_nothing(self, blobs: TensorDataset) -> None:
        found = []
        for workers in (0, 2):
            torch.manual_seed(0)
            model = Net()
            recipe = Recipe(epochs=2, lr=0.05, batch_size=20)
            history = train(model, blobs, recipe, test=blobs, workers=workers)
            accuracies = [(epoch.loss, epoch.test_accuracy) for epoch in history.epochs]
            found.append((accuracies, copy.deepcopy(model.state_dict())))
            assert evaluate(model, blobs, workers=workers).accuracy == accuracies[-1][1]
        assert found[0][0] == found[1][0]
        assert all(found[0][1][name].equal(value) for name, value in found[1][1].items())

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

    def test_a_last_step_that_ruins_the_weights_is_found(self, blobs: TensorDataset) -> None:
        def finite_loss_of_infinite_slope(logits: Tensor, labels: Tensor) -> Tensor:
            return (0 * logits.sum()).sqrt() + functional.cross_entropy(logits, labels)

        with pytest.raises(TrainingDivergedError, match="is not finite at epoch 1 of 1, iteration"):
            train(
                Net(), blobs, Recipe(epochs=1, batch_size=90), loss_fn=finite_loss_of_infinite_slope
            )

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


PER_EPOCH = 5
"""Batches of 20 of the 90 blobs."""


class Augmented(Dataset[Any]):
    """Draws from torch's generator, as torchvision's augmentation does; counts what is read."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset
        self.read = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        sample, label = self.dataset[index]
        return sample + 0.3 * torch.randn(sample.shape), label


class Shared(nn.Module):
    """Two names for one layer, one of them frozen away from what trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.again(self.first(self.frozen(x)).relu()).relu())
        return out


def _recipe(**fields: Any) -> Recipe:
    return Recipe(
        **{
            "epochs": 3,
            "lr": 0.1,
            "weight_decay": 1e-3,
            "milestones": (2,),
            "warmup_epochs": 0.5,
            "batch_size": 20,
            "seed": 3,
            **fields,
        }
    )


def _states(
    model: nn.Module, dataset: Dataset[Any], recipe: Recipe, keep: list[Step] | None = None
) -> list[TrainingState]:
    states: list[TrainingState] = []
    every = [Step(iteration=done) for done in range(recipe.epochs * PER_EPOCH + 1)]
    train(model, dataset, recipe, keep=keep or every, on_state=states.append)
    return states


def _same(first: TrainingState, second: TrainingState) -> bool:
    assert (first.ema is None) == (second.ema is None)
    return (
        first.step == second.step
        and _equal(first.weights, second.weights)
        and _equal(first.momentum, second.momentum)
        and _equal(first.ema or {}, second.ema or {})
    )


class TestResume:
    @pytest.mark.parametrize("ema_decay", [None, 0.9])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_a_saved_moment_is_gone_on_from_bit_for_bit(
        self, blobs: TensorDataset, tmp_path: Path, ema_decay: float | None, momentum: float
    ) -> None:
        recipe = _recipe(ema_decay=ema_decay, momentum=momentum, nesterov=momentum > 0)
        whole = Net()
        states = _states(whole, Augmented(blobs), recipe)
        assert [state.step for state in states] == [
            Step.of_iterations(done, PER_EPOCH) for done in range(16)
        ]
        for state in states:
            file = tmp_path / "state.safetensors"
            save_state(state, file)
            resumed = Net()
            torch.rand(7)
            ends: list[TrainingState] = []
            train(
                resumed,
                Augmented(blobs),
                recipe,
                start=load_state(file),
                keep=[Step(epoch=3)],
                on_state=ends.append,
            )
            assert _same(ends[0], states[-1]), state.step
            assert _equal(_state(resumed), _state(whole)), state.step

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_other_types(self, blobs: TensorDataset, dtype: torch.dtype) -> None:
        inputs, labels = blobs.tensors
        data = TensorDataset(inputs.to(dtype), labels)
        recipe = _recipe(ema_decay=0.99)
        whole, resumed = Net().to(dtype), Net().to(dtype)
        states = _states(whole, data, recipe)
        train(resumed, data, recipe, start=states[7])
        assert _equal(_state(resumed), _state(whole))
        assert states[7].momentum["first.weight"].dtype == dtype
        assert states[7].ema is not None
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        assert states[7].ema["first.weight"].dtype == wide

    def test_with_shared_and_frozen_parameters(self, blobs: TensorDataset, tmp_path: Path) -> None:
        whole, resumed = Shared(), Shared()
        states = _states(whole, blobs, _recipe())
        moving = {"first.weight", "first.bias", "again.weight", "again.bias"}
        assert states[7].momentum.keys() == moving | {"last.weight", "last.bias"}
        save_state(states[7], tmp_path / "state")
        train(resumed, blobs, _recipe(), start=load_state(tmp_path / "state"))
        assert _equal(_state(resumed), _state(whole))
        assert resumed.first is resumed.again

    def test_of_a_resnet(self) -> None:
        digits = load_digits().train
        few = Augmented(TensorDataset(*(tensor[:60] for tensor in digits.tensors)))  # type: ignore[attr-defined]
        recipe = _recipe(batch_size=12)
        whole, resumed = resnet20(in_channels=1), resnet20(in_channels=1)
        [middle, end] = _states(whole, few, recipe, [Step(epoch=1, iteration=3), Step(epoch=3)])
        train(resumed, few, recipe, start=middle)
        assert _equal(_state(resumed), end.weights)

    def test_the_epochs_after_it_are_the_same_and_its_own_is_a_part(
        self, blobs: TensorDataset
    ) -> None:
        states = _states(Net(), blobs, _recipe())
        known = train(Net(), blobs, _recipe(), start=states[0], test=blobs).epochs
        found = train(Net(), blobs, _recipe(), start=states[8], test=blobs).epochs
        assert [record.epoch for record in found] == [2, 3]
        assert replace(found[1], seconds=0) == replace(known[2], seconds=0)
        assert found[0].test_accuracy == known[1].test_accuracy
        assert found[0].loss != known[1].loss

    def test_nothing_of_the_batches_before_is_read(self, blobs: TensorDataset) -> None:
        states = _states(Net(), blobs, _recipe())
        data = Augmented(blobs)
        train(Net(), data, _recipe(), start=states[13])
        assert data.read == 90 - 3 * 20

    def test_a_start_is_not_changed(self, blobs: TensorDataset) -> None:
        recipe = _recipe(ema_decay=0.9)
        start = _states(Net(), blobs, recipe)[4]
        before = copy.deepcopy(start)
        train(Net(), blobs, recipe, start=start)
        assert _same(before, start)


class TestStopAndKeep:
    @pytest.mark.parametrize("done", [0, 1, 5, 7, 15])
    def test_a_run_stops_where_it_is_told_with_the_schedule_of_the_whole(
        self, blobs: TensorDataset, done: int
    ) -> None:
        whole = Net()
        stopped = copy.deepcopy(whole)
        states = _states(whole, Augmented(blobs), _recipe())
        history = train(stopped, Augmented(blobs), _recipe(), stop=Step(iteration=done))
        assert _equal(_state(stopped), states[done].weights)
        assert len(history.epochs) == math.ceil(done / PER_EPOCH)

    def test_keeping_changes_nothing(self, blobs: TensorDataset) -> None:
        model = Net()
        twin = copy.deepcopy(model)
        train(model, Augmented(blobs), _recipe())
        states = _states(twin, Augmented(blobs), _recipe())
        assert _equal(_state(model), _state(twin))
        assert _equal(states[-1].weights, _state(twin))

    def test_a_state_kept_is_no_longer_the_model_s(self, blobs: TensorDataset) -> None:
        model = Net()
        initial = _state(model)
        states = _states(model, blobs, _recipe())
        assert _equal(states[0].weights, initial)
        assert not states[0].momentum
        assert not _equal(states[1].weights, states[2].weights)

    def test_moments_before_the_start_have_passed(self, blobs: TensorDataset) -> None:
        states = _states(Net(), blobs, _recipe())
        found: list[TrainingState] = []
        keep = [Step(iteration=2), Step(epoch=1), Step(epoch=2)]
        train(Net(), blobs, _recipe(), start=states[5], keep=keep, on_state=found.append)
        assert [state.step for state in found] == keep[1:]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"stop": Step(epoch=4)}, "stop: epoch 4 lies behind the recipe's end, epoch 3"),
            ({"stop": Step(iteration=16)}, r"epoch 0 \+ 16 it lies behind .* \(5 batches an epoch"),
            ({"keep": [Step(epoch=4)]}, "keep: epoch 4 lies behind where the run ends"),
            ({"keep": [Step(epoch=2)], "stop": Step(epoch=1)}, "keep: epoch 2 lies behind"),
            ({"keep": [Step()], "on_state": None}, "on_state takes none"),
        ],
    )
    def test_moments_that_never_come_are_refused_at_once(
        self, blobs: TensorDataset, arguments: dict[str, Any], message: str
    ) -> None:
        def ignore(state: TrainingState) -> None:
            del state

        with pytest.raises(CheckpointError, match=message):
            train_epochs(Net(), blobs, _recipe(), **{"on_state": ignore, **arguments})

    def test_a_start_behind_the_end_is_refused(self, blobs: TensorDataset) -> None:
        states = _states(Net(), blobs, _recipe())
        with pytest.raises(CheckpointError, match="start: epoch 3 lies behind"):
            train_epochs(Net(), blobs, _recipe(epochs=2, milestones=()), start=states[-1])

    def test_a_start_that_does_not_fit_is_refused_and_the_model_left(
        self, blobs: TensorDataset
    ) -> None:
        model = Net()
        before = _state(model)
        wide = replace(TrainingState.of(Net()), momentum={"last.bias": torch.zeros(4)})
        for start, message in (
            (TrainingState.of(Shared()), "again.bias has no place"),
            (wide, r"the momentum last.bias is \(4,\) float32 where \(3,\) float32 is needed"),
            (replace(wide, momentum={"nil": torch.zeros(4)}), "the momentum nil has no place"),
            (TrainingState.of(Net().double()), r"\(16,\) float64 where \(16,\) float32"),
        ):
            with pytest.raises(CheckpointError, match=message):
                train(model, blobs, _recipe(), start=start)
        assert _equal(_state(model), before)

    def test_averages_need_a_decay_to_go_on_with(self, blobs: TensorDataset) -> None:
        states = _states(Net(), blobs, _recipe(ema_decay=0.9))
        with pytest.raises(CheckpointError, match="the recipe has no ema_decay"):
            train(Net(), blobs, _recipe(), start=states[3])
        train(Net(), blobs, _recipe(), start=replace(states[3], ema=None))


class TestAverages:
    def test_are_the_sum_written_out(self, blobs: TensorDataset) -> None:
        states = _states(Net(), blobs, _recipe(ema_decay=0.8))
        expected = states[0].weights
        for state in states[1:]:
            expected = {
                name: 0.8 * expected[name] + 0.2 * tensor if tensor.is_floating_point() else tensor
                for name, tensor in state.weights.items()
            }
            assert state.ema is not None
            for name, tensor in expected.items():
                assert torch.allclose(state.ema[name], tensor, atol=1e-6), name

    def test_are_what_is_evaluated_and_what_the_model_ends_with(self, blobs: TensorDataset) -> None:
        model, recipe = Net(), _recipe(ema_decay=0.9)
        states: list[TrainingState] = []
        keep = [Step(epoch=epoch) for epoch in (1, 2, 3)]
        history = train(model, blobs, recipe, test=blobs, keep=keep, on_state=states.append)
        for state, record in zip(states, history.epochs, strict=True):
            averaged = Net()
            state.load_into(averaged)
            assert evaluate(averaged, blobs, batch_size=20).accuracy == record.test_accuracy
        assert _equal(_state(model), states[-1].ema or {})

    def test_training_goes_on_from_the_weights_and_not_from_them(
        self, blobs: TensorDataset
    ) -> None:
        model = Net()
        twin = copy.deepcopy(model)
        plain, averaged = (
            _states(one, blobs, _recipe(ema_decay=decay))
            for one, decay in ((model, None), (twin, 0.9))
        )
        assert _equal(plain[-1].weights, averaged[-1].weights)

    def test_of_weights_of_16_bits_do_not_stand_still(self, blobs: TensorDataset) -> None:
        inputs, labels = blobs.tensors
        data = TensorDataset(inputs.bfloat16(), labels)
        states = _states(Net().bfloat16(), data, _recipe(ema_decay=0.999))
        assert states[-1].ema is not None
        moved = states[-1].ema["last.weight"] - states[0].weights["last.weight"].float()
        assert moved.abs().min() > 0


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
    lottery = {f"lottery.{name}" for name in ("averages", "recipe", "span", "state", "steps")}
    allowed = {"data", "errors", "modes", "randomness"} | lottery
    ours = {name for name in imported if name and name.startswith("blockprune")}
    assert ours == {f"blockprune.{name}" for name in allowed}
