"""Weights policies on a ticket of ResNet20, each against a training loop written out by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import blockprune
from blockprune.data import EpochSampler, load_digits
from blockprune.errors import CheckpointError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.state import TrainingState
from blockprune.lottery.steps import Step
from blockprune.lottery.training import train
from blockprune.lottery.weights import fitted, reinitialised, start_of
from blockprune.models import resnet20

REMOVED = ["layer1.1", "layer3.2"]
IMAGES = 40
BATCH = 20
PER_EPOCH = 2
RECIPE = Recipe(epochs=4, lr=0.1, weight_decay=1e-3, milestones=(2, 3), batch_size=BATCH, seed=5)
RATES = [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
REWOUND_TO = Step(epoch=1, iteration=1)
DONE = 3
"""Batches before `REWOUND_TO`."""


@dataclass(frozen=True)
class Dense:
    """A trained dense network, the states that it passed, and a ticket cut from it."""

    ticket: nn.Module
    states: dict[Step, TrainingState]
    images: Tensor
    labels: Tensor

    def at(self, step: Step) -> TrainingState:
        return self.states[step]

    @property
    def final(self) -> TrainingState:
        return self.states[Step(epoch=4)]

    @property
    def data(self) -> TensorDataset:
        return TensorDataset(self.images, self.labels)


@pytest.fixture(scope="module")
def dense() -> Dense:
    images, labels = load_digits().train[:IMAGES]
    torch.manual_seed(1)
    model = resnet20(in_channels=1)
    ticket = blockprune.remove_blocks(model, REMOVED, images[:1])
    states: dict[Step, TrainingState] = {}
    train(
        model,
        TensorDataset(images, labels),
        RECIPE,
        keep=[Step(), REWOUND_TO, Step(epoch=4)],
        on_state=lambda state: states.update({state.step: state}),
    )
    return Dense(ticket, states, images, labels)


def _trained_by_hand(
    dense: Dense,
    weights: dict[str, Tensor],
    rates: list[float],
    *,
    first: int = 0,
    momentum: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the ticket's weights after one batch for each rate, from batch `first` on."""
    ticket = copy.deepcopy(dense.ticket).train()
    for name, tensor in ticket.state_dict().items():
        tensor.copy_(weights[name])
    optimizer = torch.optim.SGD(
        ticket.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    for name, parameter in ticket.named_parameters():
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum[name].clone()
    order = EpochSampler(IMAGES, RECIPE.seed)
    for done, rate in enumerate(rates, first):
        order.set_epoch(done // PER_EPOCH)
        rows = torch.tensor(list(order)).split(BATCH)[done % PER_EPOCH]
        optimizer.param_groups[0]["lr"] = rate
        loss = functional.cross_entropy(ticket(dense.images[rows]), dense.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(ticket.state_dict())


def _assert_equal(found: nn.Module, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


class TestRewind:
    def test_weights_and_schedule_of_the_step(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        state, recipe = start_of(
            "rewind", ticket, recipe=RECIPE, dense_state_at=dense.at, rewound_to=REWOUND_TO
        )
        assert recipe == RECIPE
        history = train(ticket, dense.data, recipe, start=state)
        assert [record.epoch for record in history.epochs] == [2, 3, 4]
        weights = dense.at(REWOUND_TO).weights
        _assert_equal(ticket, _trained_by_hand(dense, weights, RATES[DONE:], first=DONE))

    def test_to_the_beginning_is_algorithm_2(self, dense: Dense) -> None:
        rewound, at_initialisation = copy.deepcopy(dense.ticket), copy.deepcopy(dense.ticket)
        state, recipe = start_of(
            "rewind", rewound, recipe=RECIPE, dense_state_at=dense.at, rewound_to=Step()
        )
        train(rewound, dense.data, recipe, start=state)
        # The ticket was cut before the dense model was trained.
        train(at_initialisation, dense.data, RECIPE)
        _assert_equal(rewound, dict(at_initialisation.state_dict()))

    def test_to_the_end_trains_nothing(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        end = Step(epoch=4)
        state, recipe = start_of(
            "rewind", ticket, recipe=RECIPE, dense_state_at=dense.at, rewound_to=end
        )
        assert train(ticket, dense.data, recipe, start=state).epochs == ()
        _assert_equal(ticket, fitted(dense.final, ticket).weights)

    def test_the_optimiser_is_carried_over_by_name(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        state, recipe = start_of(
            "rewind",
            ticket,
            recipe=RECIPE,
            dense_state_at=dense.at,
            rewound_to=REWOUND_TO,
            carry_optimizer=True,
        )
        assert state.momentum.keys() == dict(ticket.named_parameters()).keys()
        train(ticket, dense.data, recipe, start=state)
        source = dense.at(REWOUND_TO)
        expected = _trained_by_hand(
            dense, source.weights, RATES[DONE:], first=DONE, momentum=source.momentum
        )
        _assert_equal(ticket, expected)

    @pytest.mark.parametrize("carry", [False, True])
    def test_averages_are_carried_over_with_the_optimiser(self, dense: Dense, carry: bool) -> None:
        averaged = replace(dense.at(REWOUND_TO), ema=dense.final.weights)
        state, _ = start_of(
            "rewind",
            dense.ticket,
            recipe=RECIPE,
            dense_state_at=lambda _: averaged,
            rewound_to=REWOUND_TO,
            carry_optimizer=carry,
        )
        if not carry:
            assert state.ema is None
            return
        assert state.ema is not None
        assert state.ema.keys() == dense.ticket.state_dict().keys()


class TestOtherPolicies:
    def test_learning_rate_rewinding(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        state, recipe = start_of(
            "learning-rate", ticket, recipe=RECIPE, dense_final=dense.final, rewound_to=REWOUND_TO
        )
        history = train(ticket, dense.data, recipe, start=state)
        assert [record.epoch for record in history.epochs] == [2, 3, 4]
        weights = dense.final.weights
        _assert_equal(ticket, _trained_by_hand(dense, weights, RATES[DONE:], first=DONE))

    @pytest.mark.parametrize("carry", [False, True])
    def test_fine_tuning(self, dense: Dense, carry: bool) -> None:
        ticket = copy.deepcopy(dense.ticket)
        state, recipe = start_of(
            "finetune",
            ticket,
            recipe=RECIPE,
            dense_final=dense.final,
            carry_optimizer=carry,
            finetune_epochs=3,
            finetune_lr=0.002,
        )
        history = train(ticket, dense.data, recipe, start=state)
        assert [record.epoch for record in history.epochs] == [1, 2, 3]
        momentum = dense.final.momentum if carry else None
        weights = dense.final.weights
        expected = _trained_by_hand(dense, weights, [0.002] * 6, momentum=momentum)
        _assert_equal(ticket, expected)

    def test_fine_tuning_after_one_cycle(self, dense: Dense) -> None:
        cycle = Recipe(epochs=9, lr=0.4, schedule="one_cycle", warmup_epochs=2, weight_decay=0.1)
        _, recipe = start_of(
            "finetune",
            dense.ticket,
            recipe=cycle,
            dense_final=dense.final,
            finetune_epochs=1,
            finetune_lr=0.002,
        )
        assert recipe == Recipe(epochs=1, lr=0.002, weight_decay=0.1)

    def test_new_weights_from_a_new_dense_model(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        torch.manual_seed(99)
        fresh = TrainingState.of(resnet20(in_channels=1))
        state, recipe = start_of("reinit", ticket, recipe=RECIPE, fresh=fresh)
        history = train(ticket, dense.data, recipe, start=state)
        assert [record.epoch for record in history.epochs] == [1, 2, 3, 4]
        _assert_equal(ticket, _trained_by_hand(dense, fresh.weights, RATES))

    def test_new_weights_from_each_layer_s_own_method(self, dense: Dense) -> None:
        ticket = copy.deepcopy(dense.ticket)
        before = dict(copy.deepcopy(ticket.state_dict()))
        state, recipe = start_of("reinit", ticket, recipe=RECIPE, seed=7)
        again = start_of("reinit", ticket, recipe=RECIPE, seed=7).state
        other = start_of("reinit", ticket, recipe=RECIPE, seed=8).state
        assert all(torch.equal(tensor, again.weights[k]) for k, tensor in state.weights.items())
        for name, module in ticket.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                drawn = state.weights[f"{name}.weight"]
                assert not torch.equal(drawn, other.weights[f"{name}.weight"])
                # Uniform up to 1 / sqrt(fan_in): torch's default.
                bound = drawn[0].numel() ** -0.5
                assert 0.8 * bound < drawn.abs().max() <= bound
        assert state.weights["bn1.running_var"].eq(1).all()
        _assert_equal(ticket, before)
        train(ticket, dense.data, recipe, start=state)
        _assert_equal(ticket, _trained_by_hand(dense, state.weights, RATES))


class TestReinitialised:
    def test_global_generators_stay(self) -> None:
        model = nn.Linear(2, 2)
        before = torch.get_rng_state()
        reinitialised(model, seed=0)
        assert torch.equal(before, torch.get_rng_state())

    def test_attention_has_its_own_method(self) -> None:
        model = nn.MultiheadAttention(4, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        drawn = reinitialised(model, seed=0).weights
        assert all(tensor.ne(9.0).all() for tensor in drawn.values())
        # The attention sets this after the projection has drawn it.
        assert drawn["out_proj.bias"].eq(0).all()

    def test_a_module_without_a_method_is_named(self) -> None:
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gain = nn.Parameter(torch.ones(1))

        model = nn.Sequential(nn.Linear(1, 1), Scale())
        with pytest.raises(CheckpointError, match=r"1 \(Scale\).*give its state as fresh"):
            reinitialised(model, seed=0)
        with pytest.raises(CheckpointError, match=r"the model itself \(Scale\)"):
            reinitialised(Scale(), seed=0)

    def test_a_weight_that_is_computed_is_not_left_as_it_was(self) -> None:
        model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        with pytest.raises(CheckpointError, match="ParametrizationList"):
            reinitialised(model, seed=0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x).tanh()
        return out


class Stack(nn.Module):
    """Equal layers in a list, two of which may share their weights."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        if shared:
            self.layers[2].linear = self.layers[0].linear
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def _trained(model: nn.Module) -> TrainingState:
    data = TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
    states: list[TrainingState] = []
    recipe = Recipe(epochs=1, batch_size=4)
    train(model, data, recipe, keep=[Step(epoch=1)], on_state=states.append)
    return states[0]


class TestFitted:
    @pytest.mark.parametrize("kept", [False, True])
    def test_layers_that_moved_up_get_their_own_weights(self, kept: bool) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9,
            num_hidden_layers=4, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        gone = ["model.layers.0", "model.layers.2"]
        inputs = {"input_ids": torch.tensor([[3, 1, 2]])}
        ticket = blockprune.remove_blocks(model, gone, inputs, preserve_root=kept)
        momentum = {name: 2 * value.detach() for name, value in model.named_parameters()}
        found = fitted(replace(TrainingState.of(model), momentum=momentum), ticket)
        assert any(name.startswith("model.layers.0.") for name in found.weights) is kept
        # The ticket holds the weights that it was cut with.
        _assert_equal(ticket, found.weights)
        assert found.momentum.keys() == dict(ticket.named_parameters()).keys()
        for name, velocity in found.momentum.items():
            assert torch.equal(velocity, 2 * found.weights[name])

    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.parametrize("gone", ["layers.0", "layers.2"])
    def test_a_shared_weight_keeps_its_velocity_whichever_owner_goes(
        self, gone: str, kept: bool
    ) -> None:
        model = Stack(shared=True)
        ticket = blockprune.remove_blocks(model, [gone], torch.rand(2, 4), preserve_root=kept)
        final = _trained(model)
        found = fitted(final, ticket)
        own = dict(ticket.named_parameters())
        assert own.keys() <= found.momentum.keys()
        shared = final.momentum["layers.0.linear.weight"]
        assert any(torch.equal(found.momentum[name], shared) for name in own)

    def test_of_the_dense_model_is_all_of_it(self) -> None:
        model = Stack()
        final = _trained(model)
        assert fitted(final, model).weights.keys() == final.weights.keys()

    def test_what_does_not_fit_is_named(self, dense: Dense) -> None:
        for other, message in (
            (resnet20(), r"conv1.weight is \(16, 3, 3, 3\) float32 where \(16, 1, 3, 3\) float32"),
            (resnet20(in_channels=1).double(), r"is \(16,\) float64 where \(16,\) float32"),
            (Stack(), r"bn1.bias is missing; .* \(and 108 more\)"),
        ):
            with pytest.raises(CheckpointError, match=f"does not fit the ticket: .*{message}"):
                fitted(TrainingState.of(other), dense.ticket)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_of_other_types(self, dtype: torch.dtype) -> None:
        model = Stack().to(dtype)
        ticket = blockprune.remove_blocks(model, ["layers.1"], torch.rand(2, 4, dtype=dtype))
        found = fitted(TrainingState.of(model), ticket)
        assert {tensor.dtype for tensor in found.weights.values()} == {dtype}
        found.load_into(ticket)


class TestRefusals:
    @pytest.mark.parametrize(
        ("policy", "leave_out", "message"),
        [
            ("rewind", "dense_state_at", '"rewind" needs dense_state_at'),
            ("rewind", "rewound_to", '"rewind" needs rewound_to'),
            ("learning-rate", "dense_final", '"learning-rate" needs dense_final'),
            ("reinit", "seed", '"reinit" needs a seed, or fresh'),
            ("finetune", "finetune_lr", '"finetune" needs finetune_lr'),
            ("rewinding", "", "no weights policy 'rewinding'; there are .* Did you mean rewind"),
        ],
    )
    def test_what_a_policy_lacks(
        self, dense: Dense, policy: str, leave_out: str, message: str
    ) -> None:
        needs = {
            "dense_state_at": dense.at,
            "dense_final": dense.final,
            "seed": 0,
            **({} if policy in ("reinit", "finetune") else {"rewound_to": REWOUND_TO}),
            **({"finetune_epochs": 1, "finetune_lr": 0.1} if policy == "finetune" else {}),
        }
        needs.pop(leave_out, None)
        with pytest.raises(CheckpointError, match=message):
            start_of(policy, dense.ticket, recipe=RECIPE, **needs)  # type: ignore[arg-type]

    @pytest.mark.parametrize("policy", ["reinit", "finetune"])
    def test_a_moment_for_a_policy_that_goes_back_to_none(self, dense: Dense, policy: str) -> None:
        with pytest.raises(CheckpointError, match="no use for rewound_to"):
            start_of(
                policy,  # type: ignore[arg-type]
                dense.ticket,
                recipe=RECIPE,
                dense_final=dense.final,
                rewound_to=REWOUND_TO,
                seed=0,
                **({"finetune_epochs": 1, "finetune_lr": 1.0} if policy == "finetune" else {}),  # type: ignore[arg-type]
            )

    def test_new_weights_have_no_velocities(self, dense: Dense) -> None:
        with pytest.raises(CheckpointError, match="no optimiser state"):
            start_of("reinit", dense.ticket, recipe=RECIPE, seed=0, carry_optimizer=True)

    def test_fields_out_of_range(self, dense: Dense) -> None:
        with pytest.raises(ValidationError, match="lr"):
            start_of(
                "finetune",
                dense.ticket,
                recipe=RECIPE,
                dense_final=dense.final,
                finetune_epochs=1,
                finetune_lr=-1.0,
            )
