"""Models of libraries: each gap is found, fitted with the right operation, and does better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import blockprune
from blockprune.models import resnet20
from tests.recovery.test_promises import same, state


def randomised(model: nn.Module) -> nn.Module:
    """Give normalisations statistics and weights of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def pictures(size: int, count: int = 16) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, 3, size, size)


VISION: dict[str, tuple[Callable[[], nn.Module], int, list[str], list[tuple[str, ...]]]] = {
    "resnet20": (
        resnet20,
        32,
        ["layer1.0", "layer1.1", "layer3.1"],
        [("conv1.weight",), ("layer3.0.conv2.weight",)],
    ),
    # The end of a branch goes before the projection beside it.
    "resnet50": (
        torchvision.models.resnet50,
        32,
        ["layer1.2", "layer3.1", "layer3.2"],
        [("layer1.1.conv3.weight",), ("layer3.0.conv3.weight",)],
    ),
    # Behind max-pooling nothing is linear.
    "resnet18": (torchvision.models.resnet18, 32, ["layer1.0"], [()]),
    "mobilenet_v2": (
        torchvision.models.mobilenet_v2,
        32,
        ["features.5", "features.6"],
        [("features.4.conv.2.weight",)],
    ),
    # A projection that is used as a function, in windows that are put back.
    "swin_t": (
        torchvision.models.swin_t,
        64,
        ["features.1.0.mlp", "features.5.1.attn"],
        [("features.1.0.attn.proj.weight",), ("features.5.0.mlp.3.weight",)],
    ),
}


@pytest.mark.parametrize(("make", "size", "gone", "weights"), VISION.values(), ids=VISION)
def test_vision(
    make: Callable[[], nn.Module], size: int, gone: list[str], weights: list[tuple[str, ...]]
) -> None:
    torch.manual_seed(0)
    dense, x = randomised(make()), pictures(size)()
    ticket = blockprune.remove_blocks(dense, gone, x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x)
    gaps = blockprune.recovery_of(found).gaps
    assert [gap.weights for gap in gaps] == weights
    assert all(gap.residual_after < 0.95 * gap.residual_before for gap in gaps if gap.weights)
    assert same(state(found), state(ticket)) == (not any(weights))


class Fire(nn.Module):
    """Two branches whose ends are concatenated, as in SqueezeNet and Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.one, self.three = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.squeeze(x))
        return x + torch.cat([self.one(y), self.three(y)], dim=1)


def test_concatenated_ends_are_fitted_together() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), *[Fire() for _ in range(4)], nn.Conv2d(8, 2, 1))
    x = pictures(8)()
    ticket = blockprune.remove_blocks(dense.eval(), "2", x[:2])
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, dense, x)).gaps
    assert set(gap.weights) == {"1.one.weight", "1.three.weight"}
    assert gap.residual_after < 0.9 * gap.residual_before


class Again(nn.Module):
    """Calls its first block once more at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Parallel() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return x


def test_a_weight_that_is_used_elsewhere_too_is_not_fitted() -> None:
    torch.manual_seed(0)
    dense, x = Again().eval(), torch.randn(64, 8)
    ticket = blockprune.remove_blocks(dense, ["blocks.1.mix", "blocks.1.up"], x[:2])
    found = blockprune.recover(ticket, dense, x)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.weights == ()
    assert same(state(found), state(ticket))


def test_a_signal_has_no_sinks_among_its_channels() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(3, 6, 3), *[Signal() for _ in range(4)], nn.Conv1d(6, 2, 1))
    with torch.no_grad():
        dense[0].weight[0] *= 1e4
    x = torch.randn(32, 3, 12)
    ticket = blockprune.remove_blocks(dense.eval(), "2", x[:2])
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    [gap] = blockprune.recovery_of(found).gaps
    streams = []
    for model in (dense, found):
        own = copy.deepcopy(dense)
        own.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            streams.append((own[:3] if model is dense else own[:2])(x))
    error = (streams[1] - streams[0]).square().sum() / streams[0].square().sum()
    assert gap.residual_after == pytest.approx(float(error), rel=1e-2)


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


class Parallel(nn.Module):
    """Attention and MLP on one norm, both added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mix(torch.tanh(y)) + self.down(torch.relu(self.up(y)))


def test_of_parallel_branches_the_wider_is_fitted() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(*[Parallel() for _ in range(4)]).eval()
    x = torch.randn(64, 8)
    names = [name for name in blockprune.find_blocks(dense, x[:2]).names if name.startswith("2.")]
    ticket = blockprune.remove_blocks(dense, names, x[:2])
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, dense, x)).gaps
    assert gap.weights == ("1.down.weight",)
    assert gap.residual_after < gap.residual_before


# --- language models ------------------------------------------------------------------------------


def _llama() -> tuple[nn.Module, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config), "model.layers.{}.mlp.down_proj.weight"


def _gpt2() -> tuple[nn.Module, str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=5,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), "transformer.h.{}.mlp.c_proj.weight"


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_layers_of_a_language_model(
    make: Callable[[], tuple[nn.Module, str]], preserve_root: bool
) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense, pattern = make()
    dense.eval()
    ids = torch.randint(0, 64, (32, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    few = {name: value[:2] for name, value in batch.items()}
    layers = pattern.split(".{}")[0]
    options: dict[str, Any] = {"preserve_root": preserve_root, "granularity": "layer"}
    # Two layers in a row: one gap, though each is a region of its own; and one behind them.
    gone = [f"{layers}.{i}" for i in (1, 2, 4)]
    ticket = blockprune.remove_blocks(dense, gone, few, verify=False, **options)
    found = blockprune.recover(ticket, dense, batch, ridge=1e-3)
    first, second = blockprune.recovery_of(found).gaps
    assert [first.weights, second.weights] == [(pattern.format(0),), (pattern.format(3),)]
    assert first.residual_after < 0.9 * first.residual_before
    assert second.residual_after < 0.9 * second.residual_before
    before, after = state(ticket), state(found)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # With its class kept, the layers move up: 3 is the second of two.
    last = pattern.format(1 if preserve_root else 3)
    biases = {name.replace("weight", "bias") for name in (pattern.format(0), last)}
    assert changed == {pattern.format(0), last, *(biases & before.keys())}
    with torch.no_grad():
        wanted = dense(**batch).logits
        assert (found(**batch).logits - wanted).norm() < (ticket(**batch).logits - wanted).norm()
