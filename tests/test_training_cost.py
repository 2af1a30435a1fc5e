"""Training steps under a clock: what is run, on what, and what follows from its time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.errors import MeasurementError
from blockprune.profiling import (
    Energy,
    EnergyPart,
    Execution,
    StepTime,
    compare_training,
    training_memory,
)
from blockprune.profiling import training as training_module
from blockprune.profiling.steps import TrainingStep
from blockprune.profiling.training import metered_step, steps_of_epoch


class Scripted:
    """A clock that reads the same time for every call."""

    def __init__(self, seconds: float) -> None:
        self.read = seconds
        self.calls = 0

    def seconds(self, call: Callable[[], object], passes: int) -> float:
        call()
        self.calls += 1
        return self.read


def test_an_epoch_is_its_steps() -> None:
    step = StepTime(64, (20.0, 10.0, 30.0))
    assert step.epoch_seconds(128) == 2 * 0.020
    assert step.epoch_seconds(129) == pytest.approx(3 * 0.020)
    assert steps_of_epoch(50_000, 128) == 391
    for samples, batch in ((0, 1), (1, 0), (True, 1), (1.5, 1)):
        with pytest.raises(MeasurementError, match="whole number from 1 on"):
            steps_of_epoch(samples, batch)


def test_modules_are_trained_in_turns_on_copies() -> None:
    models = {"dense": nn.Linear(4, 3), "ticket": nn.Linear(4, 3)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    inputs = torch.rand(1, 4)
    random, clock = torch.get_rng_state(), Scripted(0.5)
    found = compare_training(models, inputs, batch_sizes=(2, 8), repeats=3, warmup=1, clock=clock)
    assert {name: [time.batch_size for time in times] for name, times in found.items()} == {
        "dense": [2, 8],
        "ticket": [2, 8],
    }
    assert found["dense"][0].samples_ms == (500.0,) * 3
    assert clock.calls == 2 * 2 * (2 + 3)
    for name, model in models.items():
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(before[name][key], v) for key, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_step_is_forward_loss_backward_and_optimiser_in_train_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    inputs = torch.rand(5, 4)
    step = TrainingStep("net", model, ((inputs,), {}), None, Execution())
    step()
    # By hand, on another copy.
    other = copy.deepcopy(model).train()
    labels = torch.zeros(5, dtype=torch.int64)
    functional.cross_entropy(other(inputs), labels).backward()
    for own, by_hand in zip(step.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own.grad, by_hand.grad)
        assert torch.equal(own, by_hand)  # the rate is 0
        assert torch.equal(step.optimizer.state[own]["momentum_buffer"], by_hand.grad)
    assert torch.equal(step.model[1].running_mean, other[1].running_mean)
    assert not model.training
    assert torch.equal(model[1].running_mean, torch.zeros(6))


def test_losses_by_what_a_model_returns() -> None:
    class Returns(nn.Module):
        def __init__(self, form: str) -> None:
            super().__init__()
            self.form = form
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            forms = {
                "own loss": lambda: {"loss": y.square().mean(), "logits": y},
                "nested": lambda: ([y],),
                "sequence": lambda: y[:, None].expand(-1, 7, -1),
                "image": lambda: y[:, :, None, None].expand(-1, -1, 5, 6),
                "numbers": lambda: y[:, 0],
            }
            return forms[self.form]()

    for form in ("own loss", "nested", "sequence", "image", "numbers"):
        step = TrainingStep(form, Returns(form), ((torch.rand(3, 4),), {}), None, Execution())
        step()
        assert step.model.linear.weight.grad.abs().sum() > 0, form
    own = TrainingStep("own", Returns("own loss"), ((torch.rand(3, 4),), {}), None, Execution())
    own()
    other = copy.deepcopy(own.model)
    other.zero_grad()
    own.inputs[0][0].requires_grad_(False)
    other.linear(own.inputs[0][0]).square().mean().backward()
    assert torch.equal(own.model.linear.weight.grad, other.linear.weight.grad)


def test_half_precision_trains_under_autocast_with_whole_weights() -> None:
    seen = set()

    def loss(outputs: Tensor) -> Tensor:
        seen.add(outputs.dtype)
        return outputs.float().sum()

    model = nn.Linear(4, 3)
    execution = Execution(dtype=torch.bfloat16)
    step = TrainingStep("net", model, ((torch.rand(2, 4),), {}), loss, execution)
    step()
    assert seen == {torch.bfloat16}
    assert step.model.weight.dtype == step.model.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": ()}, "no batch size"),
        ({"batch_sizes": (0,)}, "whole number from 1 on, got 0"),
        ({"repeats": 0}, "repeats must be"),
        ({"warmup": 0}, "warmup must be"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], message: str
) -> None:
    def loss(outputs: Tensor) -> Tensor:
        pytest.fail("a step was taken")

    with pytest.raises(MeasurementError, match=message):
        compare_training({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), loss_fn=loss, **arguments)


def test_what_does_not_train_is_named_and_its_error_quoted() -> None:
    with pytest.raises(MeasurementError, match="no model to train"):
        compare_training({}, torch.zeros(1, 2))
    with pytest.raises(MeasurementError, match=r"norm does not train .* ValueError: Expected more"):
        compare_training({"norm": nn.BatchNorm1d(2)}, torch.zeros(1, 2), batch_sizes=(1,))
    with pytest.raises(MeasurementError, match="flat has no parameter"):
        compare_training({"flat": nn.Flatten()}, torch.zeros(1, 2))


def test_a_step_that_does_not_fit_in_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(outputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("3 GiB asked for")

    said = "^{} does not fit in the memory of the device when it trains: 3 GiB asked for"
    with pytest.raises(MeasurementError, match=said.format("dense")):
        compare_training({"dense": nn.Linear(4, 3)}, torch.zeros(1, 4), loss_fn=loss)
    with pytest.raises(MeasurementError, match=said.format("The model")):
        training_memory(nn.Linear(4, 3), torch.zeros(1, 4), loss_fn=loss)

    def meter(work: Callable[[], object], *, grid_kg_per_kwh: float) -> Energy:
        pytest.fail("what does not run was metered")

    monkeypatch.setattr(training_module, "metered_energy", meter)
    with pytest.raises(MeasurementError, match=said.format("The model")) as caught:
        metered_step(nn.Linear(4, 3), torch.zeros(1, 4), loss_fn=loss)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_compiled_steps_for_more_batch_sizes_than_torch_compiles_unasked(
    eager_compiler: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tuple(range(1, 11))
    clock, execution = Scripted(0.5), Execution(compile=True)
    nets = {"dense": nn.Sequential(nn.Linear(4, 4), nn.ReLU())}
    found = compare_training(
        nets, torch.rand(1, 4), batch_sizes=sizes, repeats=1, execution=execution, clock=clock
    )
    assert [time.batch_size for time in found["dense"]] == list(sizes)
    # The trial of the compiler comes first.
    assert len(eager_compiler) == 1 + len(sizes)

    def meter(work: Callable[[], object], *, grid_kg_per_kwh: float) -> Energy:
        work()
        # A step that falls back to uncompiled code must fail, not be metered as compiled.
        assert torch._dynamo.config.fail_on_recompile_limit_hit
        return Energy(1.0, (EnergyPart("CPU", 1.0, measured=True, source="x"),), grid_kg_per_kwh)

    monkeypatch.setattr(training_module, "metered_energy", meter)
    metered_step(nets["dense"], torch.rand(1, 4), at_least_seconds=0, execution=execution)
    assert len(eager_compiler) == 2 + len(sizes)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def test_metered_steps_are_divided_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def meter(work: Callable[[], object], *, grid_kg_per_kwh: float) -> Energy:
        before = len(taken)
        work()
        steps = len(taken) - before
        part = EnergyPart("CPU", 0.25 * steps, measured=True, source="a fake")
        return Energy(2.0 * steps, (part,), grid_kg_per_kwh)

    def loss(outputs: Tensor) -> Tensor:
        taken.append(len(outputs))
        return outputs.sum()

    monkeypatch.setattr(training_module, "metered_energy", meter)
    found = metered_step(
        nn.Linear(4, 3),
        torch.rand(1, 4),
        batch_size=6,
        at_least_seconds=0.02,
        grid_kg_per_kwh=0.5,
        loss_fn=loss,
    )
    assert (found.kwh, found.seconds, found.co2_kg) == pytest.approx((0.25, 2.0, 0.125))
    assert set(taken) == {6}
