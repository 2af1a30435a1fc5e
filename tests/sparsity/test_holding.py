"""Masked weights stay 0 in every training; `torch.nn.utils.prune` is the reference for the rest.

The test of two processes starts this very file.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from blockprune.errors import MaskError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.state import TrainingState
from blockprune.lottery.steps import Step
from blockprune.lottery.training import train
from blockprune.sparsity import Mask, held, with_prune, without_prune
from tests.sparsity.nets import (
    Small,
    Tied,
    batch,
    half_mask,
    masked_are_zero,
    one_step,
    small,
)

ROOT = Path(__file__).resolve().parent.parent.parent
Maker = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def pruned_by_torch(model: Small, mask: Mask) -> Small:
    """The reference: masks put on by torch, each module by hand."""
    for name, keep in mask.keep.items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", keep)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_bit_for_bit_as_under_torch_prune(name: str) -> None:
    ours, mask = small(), half_mask(small())
    theirs = pruned_by_torch(small(), mask)
    first, second = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    with held(ours, mask):
        assert masked_are_zero(ours, mask)
        for step in range(5):
            one_step(ours, first, step)
            one_step(theirs, second, step)
            assert masked_are_zero(ours, mask)
    for key, keep in mask.keep.items():
        # The module's own `weight` is that of its last pass, one step behind.
        state = theirs.state_dict()
        trained = state[f"{key}_orig"] * state[f"{key}_mask"]
        assert ours.state_dict()[key].equal(trained), key
        assert trained[keep].all()
    for key in ("conv.bias", "norm.weight", "norm.running_var", "head.bias"):
        assert ours.state_dict()[key].equal(theirs.state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_from_before_moves_nothing(name: str) -> None:
    model = small()
    mask = half_mask(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    one_step(model, optimizer, 0)
    one_step(model, optimizer, 1)
    with held(model, mask):
        for step in range(3):
            one_step(model, optimizer, step)
            assert masked_are_zero(model, mask)
    one_step(model, optimizer, 4)
    assert not masked_are_zero(model, mask)


def test_gradients_of_masked_weights_are_zero_before_anyone_reads_them() -> None:
    model = small()
    mask = half_mask(model)
    with held(model, mask):
        for _ in range(2):
            functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        parameters = dict(model.named_parameters())
        for name, keep in mask.keep.items():
            gradient = parameters[name].grad
            assert gradient is not None
            assert not gradient[~keep].any()
            assert gradient[keep].any()


def hooks_of(model: nn.Module) -> list[int]:
    return [
        *(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()),
        *(len(m._load_state_dict_post_hooks) for m in model.modules()),
        *(len(m._forward_pre_hooks) for m in model.modules()),
        len(_global_optimizer_post_hooks),
    ]


def test_nothing_is_left_on_leaving() -> None:
    model = small()
    mask = half_mask(model)
    names, objects = list(model.state_dict()), list(model.parameters())
    before = hooks_of(model)
    with pytest.raises(ZeroDivisionError), held(model, mask):
        assert list(model.state_dict()) == names
        assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
        assert hooks_of(model) != before
        _ = 1 // 0
    assert hooks_of(model) == before
    model.load_state_dict(small(5).state_dict())
    assert not masked_are_zero(model, mask)
    with pytest.raises(MaskError, match="does not fit"), held(nn.Linear(2, 2), mask):
        pass


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_brings_no_weight_back(assign: bool) -> None:
    model = small()
    mask = half_mask(model)
    with held(model, mask):
        model.load_state_dict(small(5).state_dict(), assign=assign)
        assert masked_are_zero(model, mask)
        model.hidden.load_state_dict(small(6).hidden.state_dict(), assign=assign)
        assert masked_are_zero(model, mask)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            one_step(model, optimizer, step)
            assert masked_are_zero(model, mask)


def test_averages_of_weights_are_masked_too() -> None:
    model = small()
    mask = half_mask(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with held(model, mask):
        averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for step in range(4):
            one_step(model, optimizer, step)
            averages.update_parameters(model)
            assert masked_are_zero(averages.module, mask)
        copied = copy.deepcopy(model)
    state = small(5).state_dict()
    copied.load_state_dict(state)
    assert all(copied.state_dict()[name].equal(value) for name, value in state.items())


def test_our_own_training_from_a_state_that_is_not_masked() -> None:
    data, recipe = TensorDataset(*batch(24)), Recipe(epochs=2, lr=0.1, batch_size=6, ema_decay=0.9)
    states: list[TrainingState] = []
    train(small(3), data, recipe, keep=[Step(iteration=2)], on_state=states.append)
    [dense] = states
    assert dense.momentum
    assert dense.ema is not None
    model = small()
    mask = half_mask(model)
    zero: list[bool] = []
    with held(model, mask):
        train(
            model,
            data,
            recipe,
            start=dense,
            on_step=lambda progress: zero.append(masked_are_zero(model, mask)),
        )
        assert masked_are_zero(model, mask)
    assert zero == [True] * 6


def test_a_gradient_scaler_and_mixed_precision() -> None:
    model = small()
    mask = half_mask(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    inputs, labels = batch()
    with held(model, mask):
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert masked_are_zero(model, mask)


def test_half_precision() -> None:
    model = small().bfloat16()
    mask = half_mask(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    inputs, labels = batch()
    with held(model, mask):
        for _ in range(3):
            functional.cross_entropy(model(inputs.bfloat16()), labels).backward()
            optimizer.step()
            assert masked_are_zero(model, mask)


def test_shared_frozen_and_nested() -> None:
    model = Tied()
    model.first.bias.requires_grad_(False)
    first, second = half_mask(model, 1), half_mask(model, 2)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with held(model, first), held(model, second):
        for _ in range(3):
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            assert masked_are_zero(model, first)
            assert masked_are_zero(model, second)
    assert model.first.weight is model.second.weight
    frozen = small()
    frozen.requires_grad_(False)
    with held(frozen, half_mask(frozen)):
        assert masked_are_zero(frozen, half_mask(frozen))


def test_another_optimizers_step_leaves_a_graph_alone() -> None:
    model, other = small(), small(1)
    with held(model, half_mask(model)):
        loss = functional.cross_entropy(model(batch()[0]), batch()[1])
        one_step(other, OPTIMIZERS["sgd"](other.parameters()), 0)
        # Had the step written to the held weights, autograd would refuse.
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_masks_of_torch_on_and_off() -> None:
    model = small()
    mask = half_mask(model)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert with_prune(model, mask) is model
    assert "conv.weight_mask" in model.state_dict()
    inputs, _ = batch()
    expected = small().eval()
    expected.load_state_dict(mask.apply(dense))
    assert model.eval()(inputs).equal(expected(inputs))
    with pytest.raises(MaskError, match="take that off first"):
        with_prune(model, mask)
    without_prune(model)
    assert set(model.state_dict()) == set(dense)
    assert all(model.state_dict()[n].equal(t) for n, t in expected.state_dict().items())
    with pytest.raises(MaskError, match="no weight of this Small is pruned"):
        without_prune(model)


def test_masks_of_torch_on_a_shared_weight() -> None:
    model = Tied()
    mask = half_mask(model)
    with_prune(model, mask)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    without_prune(model)
    assert model.first.weight is model.second.weight
    assert masked_are_zero(model, mask)


def train_shares(rank: int, ranks: int, folder: str) -> None:
    """One of the processes: steps on its share of the samples."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    model = small()
    mask = half_mask(model)
    with held(model, mask):
        parallel = DistributedDataParallel(model)
        optimizer = OPTIMIZERS["nesterov"](parallel.parameters())
        for step in range(3):
            one_step(parallel, optimizer, ranks * step + rank)
            assert masked_are_zero(model, mask)
    save_file(model.state_dict(), f"{folder}/rank{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert all(first[n].equal(second[n]) for n, _ in small().named_parameters())
    for name, keep in half_mask(small()).keep.items():
        assert not first[name][~keep].any()
        assert first[name][keep].all()


if __name__ == "__main__":
    train_shares(int(sys.argv[1]), 2, sys.argv[2])
