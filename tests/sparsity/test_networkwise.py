from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from blockprune.errors import CriterionError, DataError, MaskError
from blockprune.sparsity import IMPORTANCES, NEEDS_DATA, Mask, importance_of
from tests.sparsity.nets import Branching, Small, Tied, batch, half_mask, small


def survivors_loss(model: nn.Module, mask: Mask) -> tuple[Callable[..., Tensor], Tensor]:
    """The loss as a function of the surviving weights alone, and those weights, in one vector."""
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    vector = torch.cat([state[name][keep] for name, keep in mask.keep.items()])

    def loss(values: Tensor, inputs: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        # A pass writes into the buffers.
        given, start = {name: tensor.clone() for name, tensor in state.items()}, 0
        for name, keep in mask.keep.items():
            count = int(keep.sum())
            whole = torch.zeros_like(state[name])
            given[name] = whole.masked_scatter(keep, values[start : start + count])
            start += count
        logits = functional_call(model.train(), given, (inputs,))
        return functional.cross_entropy(logits / temperature, labels)

    return loss, vector


def flat(found: dict[str, Tensor], mask: Mask) -> Tensor:
    return torch.cat([found[name][keep] for name, keep in mask.keep.items()])


def double() -> tuple[Small, Mask, Tensor, Tensor]:
    model = small().double()
    inputs, labels = batch()
    return model, half_mask(model), inputs.double(), labels


def test_snip_is_the_sensitivity_of_the_masked_network() -> None:
    model, mask, inputs, labels = double()
    loss, vector = survivors_loss(model, mask)
    [gradient] = torch.autograd.grad(loss(vector.requires_grad_(), inputs, labels), vector)
    vector = vector.detach()
    found = importance_of("snip", model, mask, data=(inputs, labels))
    torch.testing.assert_close(flat(found, mask), (vector * gradient).abs())


def test_grasp_is_the_change_of_the_gradient_flow_of_the_masked_network() -> None:
    model, mask, inputs, labels = double()
    loss, vector = survivors_loss(model, mask)
    halves = [(inputs[:6], labels[:6], 200.0), (inputs[6:], labels[6:], 200.0)]

    def both(values: Tensor) -> Tensor:
        return loss(values, *halves[0]) + loss(values, *halves[1])

    gradient = jacobian(both, vector)
    product = hessian(both, vector) @ gradient
    found = importance_of("grasp", model, mask, data=(inputs, labels))
    torch.testing.assert_close(flat(found, mask), vector * product)


def test_synflow_is_conserved_through_the_masked_layers() -> None:
    model = nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.Linear(4, 2, False)
    )
    mask = half_mask(model)
    masked = nn.Sequential(*model)
    weights = mask.apply(model.state_dict())
    flow = torch.ones(1, 5).double()
    for weight in weights.values():
        flow = flow @ weight.abs().double().T
    for data in (None, (torch.randn(3, 5), torch.zeros(3))):
        found = importance_of("synflow", masked, mask, data=data)
        for scores in found.values():
            torch.testing.assert_close(scores.sum(), flow.sum())


def test_synflow_beyond_double_precision() -> None:
    layers = [nn.Linear(2, 2, bias=False) for _ in range(12)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1e30)
    model = nn.Sequential(*layers)
    with pytest.raises(CriterionError, match=r"importances of 0\.weight are not finite"):
        importance_of("synflow", model, Mask.full(model))


def test_random_depends_on_the_seed_alone() -> None:
    model = small()
    mask = half_mask(model)
    first = importance_of("random", model, mask, seed=1)
    again = importance_of("random", small(9), mask, data=batch(), seed=1)
    assert all(first[name].equal(again[name]) for name in mask.keep)
    other = importance_of("random", model, mask, seed=2)
    assert not any(first[name].equal(other[name]) for name in mask.keep)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_nothing_changes_but_what_is_returned(name: str) -> None:
    model = small()
    model.train()
    model.norm.eval()
    model.hidden.weight.requires_grad_(False)
    seen: list[Any] = []
    model.register_forward_hook(lambda *args: seen.append(1))
    functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    seen.clear()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    gradients = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    mask = half_mask(model)
    found = importance_of(name, model, mask, data=batch())
    assert list(found) == list(mask.keep)
    for key, keep in mask.keep.items():
        assert found[key].dtype == torch.float64
        assert found[key].device.type == "cpu"
        assert not found[key][~keep].any()
        assert found[key][keep].any()
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())
    for key, parameter in model.named_parameters():
        before = gradients[key]
        assert parameter.grad is None if before is None else parameter.grad.equal(before)
        assert parameter.requires_grad == (key != "hidden.weight")
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(generator)
    assert not seen


@pytest.mark.parametrize("name", IMPORTANCES)
def test_models_that_share_weights_or_do_not_trace(name: str) -> None:
    for model, inputs in ((Tied(), torch.randn(6, 4)), (Branching(), torch.rand(6, 4))):
        mask = Mask.full(model)
        found = importance_of(name, model, mask, data=(inputs, torch.arange(6) % 3))
        assert {key: score.shape for key, score in found.items()} == {
            key: keep.shape for key, keep in mask.keep.items()
        }


@pytest.mark.parametrize("name", sorted(NEEDS_DATA))
def test_half_precision_and_any_batch(name: str) -> None:
    model = small().bfloat16()
    inputs, labels = batch(5)
    found = importance_of(name, model, Mask.full(model), data=(inputs.bfloat16(), labels))
    assert all(score.isfinite().all() for score in found.values())


def test_a_loader_and_a_loss_of_ones_own() -> None:
    model = small()
    loader = DataLoader(TensorDataset(*batch()), batch_size=6)
    mask = Mask.full(model)
    first = importance_of("snip", model, mask, data=loader)
    alone = importance_of("snip", model, mask, data=next(iter(loader)))
    assert all(first[name].equal(alone[name]) for name in first)
    doubled = importance_of(
        "snip", model, mask, data=loader, loss_fn=lambda o, t: 2 * functional.cross_entropy(o, t)
    )
    for name in first:
        torch.testing.assert_close(doubled[name], 2 * first[name])


def test_what_is_missing_is_said() -> None:
    model = small()
    mask = Mask.full(model)
    for name in NEEDS_DATA:
        with pytest.raises(DataError, match=f"'{name}' needs data"):
            importance_of(name, model, mask)
    with pytest.raises(DataError, match="at least 2 samples"):
        importance_of("grasp", model, mask, data=batch(1))
    with pytest.raises(DataError, match="does not run"):
        importance_of("snip", model, mask, data=(torch.ones(3, 7), torch.zeros(3)))
    with pytest.raises(MaskError, match="does not fit Linear"):
        importance_of("magnitude", nn.Linear(2, 2), mask)
