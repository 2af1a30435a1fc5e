from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blockprune.errors import CheckpointError, DataError
from blockprune.sparsity import connectivity, interpolated, recalibrate_norms
from tests.sparsity.nets import Small, batch, half_mask, masked_are_zero, small


def trained(seed: int) -> dict[str, Tensor]:
    model = small(seed)
    model.train()
    for step in range(3):
        model(batch(seed=10 * seed + step)[0])
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_state_between_two() -> None:
    a, b = trained(1), trained(2)
    b["norm.num_batches_tracked"] += 5
    found = interpolated(a, b, 0.25)
    assert found["conv.weight"].equal(torch.lerp(a["conv.weight"], b["conv.weight"], 0.25))
    assert found["norm.num_batches_tracked"] == a["norm.num_batches_tracked"]
    for alpha, end in ((0, a), (1, b)):
        exact = interpolated(a, b, alpha)
        assert all(exact[n].equal(end[n]) for n in end)
        assert exact["conv.weight"].data_ptr() != end["conv.weight"].data_ptr()
    with pytest.raises(CheckpointError, match=r"in \[0, 1\]"):
        interpolated(a, b, 1.5)


def test_half_precision_is_rounded_once() -> None:
    a, b = torch.randn(500).half(), torch.randn(500).half()
    found = interpolated({"w": a}, {"w": b}, 0.3)["w"]
    assert found.dtype == torch.float16
    exact = a.double() + 0.3 * (b.double() - a.double())
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-11


def test_one_mask_holds_on_the_whole_line() -> None:
    model = small()
    mask = half_mask(model)
    model.load_state_dict(interpolated(mask.apply(trained(1)), mask.apply(trained(2)), 0.4))
    assert masked_are_zero(model, mask)


def test_instability_is_the_largest_error_over_the_mean_of_the_ends() -> None:
    layer = nn.Linear(1, 1, bias=False)
    a, b = {"weight": torch.tensor([[0.0]])}, {"weight": torch.tensor([[1.0]])}

    def error(model: nn.Module) -> float:
        w = next(model.parameters()).item()
        return 0.1 + 0.2 * w + 4 * w * (1 - w)

    found = connectivity(layer, a, b, error)
    assert len(found.alphas) == 30
    assert (found.alphas[0], found.alphas[-1]) == (0.0, 1.0)
    grid = [i / 29 for i in range(30)]
    highest = max(0.1 + 0.2 * w + 4 * w * (1 - w) for w in grid)
    assert found.instability == pytest.approx(highest - 0.2)
    bowl = connectivity(layer, a, b, lambda m: 1.0, alphas=[0, 0.5, 1])
    assert (bowl.alphas, bowl.instability) == ((0.0, 0.5, 1.0), 0.0)


def test_the_model_is_as_before() -> None:
    model = small()
    model.train()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    a, b = trained(1), trained(2)
    generator = torch.get_rng_state()

    def error(model: nn.Module) -> float:
        torch.rand(3)
        return float(model.eval()(batch()[0]).detach().mean())

    def again(model: nn.Module) -> None:
        recalibrate_norms(model, [batch()])

    connectivity(model, a, b, error, alphas=4, recalibrate=again)
    with pytest.raises(CheckpointError, match="evaluate returned nan at alpha 0"):
        connectivity(model, a, b, lambda m: float("nan"), alphas=4)
    assert all(model.state_dict()[n].equal(t) for n, t in state.items())
    assert [module.training for module in model.modules()] == modes
    assert model.norm.momentum == 0.1
    assert torch.get_rng_state().equal(generator)


def test_statistics_are_taken_anew_between_the_ends_alone() -> None:
    a, b = trained(1), trained(2)
    seen: list[Tensor] = []

    def error(model: nn.Module) -> float:
        assert isinstance(model, Small)
        seen.append(model.norm.running_mean.clone())
        return 0.0

    def again(model: nn.Module) -> None:
        recalibrate_norms(model, [batch(8, seed=3), batch(8, seed=4)])

    connectivity(small(), a, b, error, alphas=3, recalibrate=again)
    assert seen[0].equal(a["norm.running_mean"])
    assert seen[2].equal(b["norm.running_mean"])
    middle = small()
    middle.load_state_dict(interpolated(a, b, 0.5))
    with torch.no_grad():
        means = [middle.conv(batch(8, seed=s)[0]).mean(dim=(0, 2, 3)) for s in (3, 4)]
    torch.testing.assert_close(seen[1], torch.stack(means).mean(dim=0))


def test_recalibration_changes_the_statistics_alone() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Counter())
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    recalibrate_norms(model, iter([batch(), batch()]))
    changed = {n for n, t in model.state_dict().items() if not t.equal(before[n])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert not any(module.training for module in model.modules())
    assert model[2].momentum == 0.1
    assert torch.get_rng_state().equal(generator)
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match="there is no batch"):
        recalibrate_norms(model, [])
    with pytest.raises(RuntimeError):
        recalibrate_norms(model, [batch(), (torch.ones(2, 5), torch.zeros(2))])
    assert all(t.equal(now[n]) for n, t in model.state_dict().items())
    assert model[2].momentum == 0.1
    recalibrate_norms(nn.Linear(2, 2), [])
    recalibrate_norms(nn.BatchNorm1d(2, track_running_stats=False), [])


class Counter(nn.Module):
    """Counts the passes, as a user's module may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


def test_states_that_do_not_fit_are_named() -> None:
    a, b = trained(1), trained(2)
    short = {name: tensor for name, tensor in b.items() if name != "head.bias"}
    with pytest.raises(CheckpointError, match=r"second state does not fit the first: head\.bias"):
        interpolated(a, short, 0.5)
    with pytest.raises(CheckpointError, match=r"first state does not fit Small: head\.bias is mis"):
        connectivity(small(), short, b, lambda m: 0.0)
    wide = {**b, "head.bias": b["head.bias"].double()}
    with pytest.raises(CheckpointError, match=r"head\.bias is \(3,\) torch\.float64 where"):
        connectivity(small(), a, wide, lambda m: 0.0)
    listed = {**b, "head.bias": b["head.bias"].tolist()}
    with pytest.raises(CheckpointError, match=r"head\.bias is a list, and no tensor"):
        interpolated(a, listed, 0.5)
    for alphas in (1, [0.0, 0.5], [0.5], [0, 0.7, 0.2, 1]):
        with pytest.raises(CheckpointError, match=r"points|alphas go from 0 to 1"):
            connectivity(small(), a, b, lambda m: 0.0, alphas=alphas)
