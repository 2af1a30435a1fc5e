"""Attacks: sane, exact in their bounds, and without a trace on the model."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

from blockprune.errors import DataError, MeasurementError, MissingExtraError
from blockprune.robustness import AttackChoice, Normalised, attack, transferred
from blockprune.robustness.attacks import zero_gradients
from blockprune.robustness.masking import masked_gradients
from blockprune.robustness.normalising import logits_of
from blockprune.robustness.projecting import within

pytest.importorskip("art")

FGSM, PGD = AttackChoice(name="fgsm"), AttackChoice(name="pgd")


@pytest.fixture
def networks(digits):
    models, data, normalisation = digits
    return [Normalised(model, normalisation) for model in models], data.rows(torch.arange(120))


def accuracy(model, data, images) -> float:
    return (logits_of(model, images).argmax(1) == data.labels).double().mean().item()


def under(model, data, choice, epsilon) -> float:
    return transferred(model, model, data.images, data.labels, choice, epsilon)


@pytest.mark.parametrize("choice", [FGSM, PGD], ids=lambda c: c.name)
def test_accuracy_falls_with_epsilon_from_the_clean_one(networks, choice) -> None:
    (model, _), data = networks
    clean = accuracy(model, data, data.images)
    curve = [under(model, data, choice, k / 255) for k in (0, 4, 16, 64)]
    assert clean > 0.9
    assert curve[0] == clean
    for one, two in itertools.pairwise(curve):
        assert two <= one + 0.02
    assert curve[-1] < 0.5


def test_pgd_is_as_strong_as_fgsm(networks) -> None:
    (model, _), data = networks
    for epsilon in (8 / 255, 32 / 255):
        assert under(model, data, PGD, epsilon) <= under(model, data, FGSM, epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", [FGSM, PGD], ids=lambda c: c.name)
def test_the_bounds_hold_to_the_last_bit(choice, dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    images, labels = torch.rand(30, 1, 4, 4), torch.arange(30) % 3
    images[:2], images[2:4] = 0, 1
    clean = images.to(dtype)
    for epsilon in (1 / 255, 8 / 255, 0.5):
        found = attack(model, images, labels, choice, epsilon).images
        assert found.dtype == dtype
        assert found.min() >= 0
        assert found.max() <= 1
        assert not torch.equal(found, clean)
        assert ((found.double() - clean.double()).abs() <= epsilon).all()


def test_within_takes_what_is_far_and_what_is_no_number() -> None:
    clean = torch.rand(1000)
    wild = clean + torch.randn(1000)
    wild[0] = torch.nan
    found = within(clean, wild, 8 / 255)
    distance = (found.double() - clean.double()).abs()
    assert distance.max() <= 8 / 255
    # No more is given away than a step of single precision.
    reached = (wild - clean).abs() > 8 / 255
    inside = (found > 0) & (found < 1) & reached
    assert distance[inside].min() > 8 / 255 - 2**-23
    assert found[0] == clean[0]


@pytest.mark.parametrize("name", ["fgsm", "pgd", "deepfool"])
def test_an_attack_leaves_no_trace_and_repeats(digits, name) -> None:
    models, data, normalisation = digits
    model, choice = models[0], AttackChoice(name=name, steps=1 if name == "fgsm" else 3)
    some = data.rows(torch.arange(20))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    try:
        with torch.no_grad():
            made = [
                attack(Normalised(model, normalisation), some.images, some.labels, choice, 0.1)
                for _ in range(2)
            ]
        assert torch.equal(made[0].images, made[1].images)
        assert [module.training for module in model] == [True, False, True, True, True, True]
        assert not model[0].weight.requires_grad
        assert model[5].weight.requires_grad
        assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
        assert model[5].bias.grad is None
    finally:
        model[0].weight.requires_grad_(True)
        model[5].weight.grad = None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


def test_deepfool_changes_no_more_than_its_radius(networks) -> None:
    (model, _), data = networks
    some = data.rows(torch.arange(30))
    found = attack(model, some.images, some.labels, AttackChoice(name="deepfool"), 0.6)
    lengths = (found.images - some.images).flatten(1).norm(dim=1)
    assert lengths.max() <= 0.6
    assert accuracy(model, some, found.images) < accuracy(model, some, some.images)


def test_autoattack_names_its_parts_and_is_the_strongest(networks) -> None:
    (model, _), data = networks
    some = data.rows(torch.arange(16))
    choice = AttackChoice(name="autoattack", steps=5, queries=10)
    found = attack(model, some.images, some.labels, choice, 24 / 255)
    assert found.parts == ("apgd-ce", "apgd-dlr", "deepfool", "square")
    assert (found.images - some.images).abs().max() <= 24 / 255
    assert under(model, some, choice, 24 / 255) <= under(model, some, FGSM, 24 / 255)


class _Rounded(nn.Module):
    """A model that sees its pixels rounded, so that no gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model((images * 16).round() / 16)


class _Steep(_Rounded):
    """A model so sure that the gradient of its loss is 0 in single precision."""

    def forward(self, images):
        return self.model(images) * 1e4


@pytest.mark.parametrize("masked", [_Rounded, _Steep])
def test_masked_gradients_are_flagged(networks, masked) -> None:
    (model, other), data = networks
    shown = masked(model)
    epsilon = 48 / 255
    signs = masked_gradients(
        accuracy(shown, data, data.images),
        {epsilon: under(shown, data, PGD, epsilon)},
        images=len(data),
        transferred={epsilon: transferred(other, shown, data.images, data.labels, PGD, epsilon)},
        zero_gradients=zero_gradients(shown, data.images, data.labels),
    )
    assert any("no gradient" in sign for sign in signs)
    assert any("made on another model is stronger" in sign for sign in signs)


def test_an_honest_model_is_not_flagged(networks) -> None:
    (model, other), data = networks
    epsilon = 32 / 255
    signs = masked_gradients(
        accuracy(model, data, data.images),
        {epsilon: under(model, data, PGD, epsilon)},
        images=len(data),
        one_step={epsilon: under(model, data, FGSM, epsilon)},
        transferred={epsilon: transferred(other, model, data.images, data.labels, PGD, epsilon)},
        zero_gradients=zero_gradients(model, data.images, data.labels),
    )
    assert signs == ()


def test_signs_from_numbers_alone() -> None:
    assert "One step" in masked_gradients(0.9, {0.1: 0.5}, images=500, one_step={0.1: 0.2})[0]
    assert "does not lower" in masked_gradients(0.9, {0.1: 0.9}, images=500)[0]
    # One image of ten is noise.
    assert masked_gradients(0.9, {0.1: 0.3}, images=10, one_step={0.1: 0.2}) == ()


def test_bad_input() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(DataError, match="one for each"):
        attack(model, images, labels[:2], FGSM, 0.1)
    with pytest.raises(DataError, match="classes 0 to 2"):
        attack(model, images, labels + 1, FGSM, 0.1)
    with pytest.raises(DataError, match="Pixels lie"):
        attack(model, images * 3, labels, FGSM, 0.1)
    with pytest.raises(MeasurementError, match="epsilon"):
        attack(model, images, labels, FGSM, -0.1)
    one_class = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    with pytest.raises(MeasurementError, match="one class into another; the model has 1"):
        attack(one_class, images, labels * 0, FGSM, 0.1)
    assert attack(model, images[:0], labels[:0], FGSM, 0.1).images.shape == (0, 1, 4, 4)
    with pytest.raises(MeasurementError, match="Accuracy of no images"):
        transferred(model, model, images[:0], labels[:0], FGSM, 0.1)
    with pytest.raises(MeasurementError, match="Gradients of no images"):
        zero_gradients(model, images[:0], labels[:0])


def test_autoattack_goes_on_with_the_images_that_are_left(monkeypatch) -> None:
    import art.attacks.evasion

    seen = []
    for name in ("AutoProjectedGradientDescent", "DeepFool", "SquareAttack"):
        method = getattr(art.attacks.evasion, name)

        def generate(self, x, y, *, name=name, method=method):
            seen.append((name, len(x)))
            return np.clip(x + self.shift, 0, 1).astype(np.float32)

        # The first takes dark images for bright ones, and the others do nothing.
        shift = 0.2 if name.startswith("Auto") else 0.0
        monkeypatch.setattr(
            art.attacks.evasion, name, type(name, (method,), {"generate": generate, "shift": shift})
        )

    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit = nn.Parameter(torch.tensor(0.5))

        def forward(self, images):
            brightness = images.mean((1, 2, 3)) - self.limit
            return torch.stack([-brightness, brightness], 1)

    near, far = torch.full((3, 1, 4, 4), 0.4), torch.full((2, 1, 4, 4), 0.1)
    bright = torch.full((1, 1, 4, 4), 0.9)
    choice = AttackChoice(name="autoattack", steps=2, queries=2)
    # Those at 0.4 turn; those at 0.1 do not; the bright one is wrong already and is left alone.
    images, labels = torch.cat([near, far, bright]), torch.zeros(6, dtype=torch.int64)
    made = attack(Bright(), images, labels, choice, 0.25).images
    assert seen == [("AutoProjectedGradientDescent", 5), ("DeepFool", 2), ("SquareAttack", 2)]
    assert torch.allclose(made[:3], torch.tensor(0.6))
    assert torch.equal(made[3:], images[3:])
    seen.clear()
    made = attack(Bright(), near, labels[:3], choice, 0.25).images
    assert seen == [("AutoProjectedGradientDescent", 3)]
    assert torch.allclose(made, torch.tensor(0.6))


def test_without_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(MissingExtraError, match=r"pip install 'blockprune\[attacks\]'"):
        attack(model, torch.rand(1, 1, 4, 4), torch.tensor([0]), FGSM, 0.1)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "pgd", "epsilons": (0.2, 0.1)},
        {"name": "pgd", "epsilons": (8.0,)},
        {"name": "fgsm", "steps": 3},
        {"name": "cw"},
        {"name": "pgd", "step": 1},
    ],
)
def test_a_choice_that_makes_no_sense(given) -> None:
    with pytest.raises(ValueError, match="validation error"):
        AttackChoice(**given)


def test_the_usual_settings() -> None:
    assert (PGD.steps, PGD.step_share * 8 / 255) == (20, 2 / 255)
    assert AttackChoice(name="deepfool").steps == 50
    assert AttackChoice(name="deepfool").overshoot == 0.02
    assert AttackChoice.model_validate_json(PGD.model_dump_json()) == PGD
