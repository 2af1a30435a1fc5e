"""Similarity of the blocks of two networks, against features taken by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import BlockNotFoundError, DataError, MeasurementError
from blockprune.lottery.alike import block_similarity
from blockprune.models import resnet20
from blockprune.similarity import minibatch_cka

ALL = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))
LEFT = tuple(name for name in ALL if name not in ("layer1.1", "layer3.2"))
IMAGES = (12, 3, 8, 8)


def features(model: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    """What leaves the blocks of a network whose blocks are modules that are called."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output.flatten(1)})
        )
        for name in names
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


@pytest.fixture
def dense() -> nn.Module:
    """A ResNet20 with running statistics of something."""
    model = resnet20()
    for _ in range(3):
        model(torch.randn(32, 3, 8, 8))
    return model


@pytest.fixture
def ticket(dense: nn.Module) -> nn.Module:
    """Two blocks less, and other weights."""
    ticket = blockprune.remove_blocks(dense, ["layer1.1", "layer3.2"], torch.rand(IMAGES))
    with torch.no_grad():
        for parameter in ticket.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return ticket


def test_values_are_those_of_features_taken_by_hooks(dense: nn.Module, ticket: nn.Module) -> None:
    batches = [torch.rand(IMAGES) for _ in range(2)]
    by_hand = copy.deepcopy(dense)
    for name in ("layer1.1", "layer3.2"):
        stage, _, index = name.partition(".")
        setattr(by_hand.get_submodule(stage), index, nn.Identity())
    by_hand.load_state_dict(ticket.state_dict())
    found = block_similarity(dense, ticket, batches, ALL, LEFT)
    xs = [features(copy.deepcopy(dense), ALL, batch) for batch in batches]
    ys = [features(by_hand, LEFT, batch) for batch in batches]
    for row in range(len(ALL)):
        for column in range(len(LEFT)):
            pairs = [(x[row], y[column]) for x, y in zip(xs, ys, strict=True)]
            assert found[row][column] == pytest.approx(minibatch_cka(pairs), rel=1e-5)


def test_a_network_is_like_itself_and_the_map_symmetric(dense: nn.Module) -> None:
    found = torch.tensor(block_similarity(dense, dense, [torch.rand(IMAGES)], ALL, ALL))
    assert found.diagonal() == pytest.approx(torch.ones(len(ALL)))
    assert found == pytest.approx(found.T)
    assert (found <= 1 + 1e-6).all()


def test_neither_network_is_changed(dense: nn.Module, ticket: nn.Module) -> None:
    dense.train()
    states = [copy.deepcopy(model.state_dict()) for model in (dense, ticket)]
    images = torch.rand(IMAGES)
    kept = images.clone()
    generator = torch.get_rng_state()
    block_similarity(dense, ticket, [(images, torch.zeros(12))], ALL, LEFT)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(images, kept)
    assert dense.training
    for model, state in zip((dense, ticket), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_too_small_are_left_out(dense: nn.Module, ticket: nn.Module) -> None:
    images = torch.rand(IMAGES)
    whole = block_similarity(dense, ticket, [images], ALL, LEFT)
    assert block_similarity(dense, ticket, [images[:3], images, images[:1]], ALL, LEFT) == whole
    with pytest.raises(MeasurementError, match="at least one batch of 4"):
        block_similarity(dense, ticket, [images[:3]], ALL, LEFT)


def test_names_and_data_that_do_not_fit(dense: nn.Module, ticket: nn.Module) -> None:
    images = torch.rand(IMAGES)
    with pytest.raises(BlockNotFoundError, match=r"no residual merge 'layer1\.1'"):
        block_similarity(dense, ticket, [images], ALL, ALL)
    with pytest.raises(BlockNotFoundError, match=r"Did you mean .*layer3\.2"):
        block_similarity(dense, ticket, [images], ["layer3.22"], LEFT)
    for wrong in (3, images, {"x": images}, [3]):
        with pytest.raises(DataError):
            block_similarity(dense, ticket, wrong, ALL, LEFT)  # type: ignore[arg-type]


class Layer(nn.Module):
    """A layer with two branches, whose sequences have the positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Linear(6, 6)
        self.feed = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(x).tanh()
        return x + self.feed(x).tanh()


class Sequences(nn.Module):
    def __init__(self, samples_stay: bool = True) -> None:
        super().__init__()
        self.layer = Layer()
        self.samples_stay = samples_stay

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if not self.samples_stay:
            x = x.reshape(2, -1, 6)
        return self.layer(x)


def test_branches_and_layers_of_sequences() -> None:
    model, data = Sequences(), torch.rand(8, 5, 6)
    branches = block_similarity(model, model, [data], ["layer.mixing"], ["layer.feed"])
    [[layer]] = block_similarity(
        model, model, [data], ["layer"], ["layer.feed"], granularity="layer"
    )
    assert layer == pytest.approx(1)
    x = data.transpose(0, 1)
    middle = x + model.layer.mixing(x).tanh()
    end = middle + model.layer.feed(middle).tanh()
    pair = [value.transpose(0, 1).flatten(1) for value in (middle, end)]
    assert branches == ((pytest.approx(minibatch_cka([(pair[0], pair[1])]), rel=1e-5),),)


def test_a_block_without_an_axis_of_samples_is_refused() -> None:
    model, data = Sequences(samples_stay=False), torch.rand(8, 5, 6)
    with pytest.raises(MeasurementError, match=r"'layer\.feed' has the shapes \[\(2, 20, 6\)\]"):
        block_similarity(model, model, [data], ["layer.feed"], ["layer.feed"])


def test_a_block_that_returns_the_same_for_all_samples_is_like_nothing(dense: nn.Module) -> None:
    [[value]] = block_similarity(dense, dense, [torch.ones(IMAGES)], ["layer1.0"], ["layer1.0"])
    assert math.isnan(value)
