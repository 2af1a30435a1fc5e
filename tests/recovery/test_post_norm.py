"""Behind a norm of positions, as in BERT: what is kept makes the stream better, measured here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.recovery.fitting import FAMILIES
from tests.recovery.test_promises import same, state

WIDTH = 8
approximate = pytest.mark.filterwarnings("ignore::blockprune.errors.ApproximationWarning")


class ByHand(nn.Module):
    """An RMS norm as transformers writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    """x = norm(x + f(x)), twice."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.mix, self.first_norm = nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.up, self.down, self.norm = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(x + self.mix(torch.tanh(x)))
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList([make() for _ in range(4)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def torch_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: Layer(nn.LayerNorm),
    "no weight": lambda: Layer(lambda width: nn.LayerNorm(width, elementwise_affine=False)),
    "no bias": lambda: Layer(lambda width: nn.LayerNorm(width, bias=False)),
    "RMS norm": lambda: Layer(nn.RMSNorm),
    "by hand": lambda: Layer(ByHand),
    "torch": torch_layer,
}


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = Encoder(KINDS[kind]).double()
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return net.eval()


def data(count: int = 48, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 5, generator=generator, dtype=torch.float64)


def cut(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    dense, x = built(kind), data()
    ticket = blockprune.remove_blocks(
        dense, "layers.2", x[:2], granularity="layer_approx", verify=False
    )
    return dense, ticket, x


def residual(dense: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Return what the stream without layer 2 lacks, with the weights of `model`."""
    own = copy.deepcopy(dense)
    own.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        wanted, found = dense.embed(x), own.embed(x)
        for layer in dense.layers[:3]:
            wanted = layer(wanted)
        for layer in own.layers[:2]:
            found = layer(found)
        return float((found - wanted).square().sum() / wanted.square().sum())


@approximate
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_comes_nearer_on_what_was_fitted_and_on_other_data(kind: str) -> None:
    dense, ticket, x = cut(kind)
    before = state(dense)
    found = blockprune.recover(ticket, dense, x)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.residual_before == pytest.approx(residual(dense, ticket, x), rel=1e-6)
    assert gap.residual_after == pytest.approx(residual(dense, found, x), rel=1e-6)
    assert gap.residual_after < 0.6 * gap.residual_before
    other = data(seed=2)
    assert residual(dense, found, other) < 0.8 * residual(dense, ticket, other)
    assert same(state(dense), before)
    shapes = [{k: v.shape for k, v in state(model).items()} for model in (found, ticket)]
    assert shapes[0] == shapes[1]
    down = "layers.1.linear2.weight" if kind == "torch" else "layers.1.down.weight"
    assert down in gap.weights


@approximate
def test_weight_and_bias_of_a_norm_are_the_optimum() -> None:
    """Where nothing else can be fitted: a regression for each channel, written out here."""
    dense, x = built("layer norm"), data()
    dense.embed = Embedding()
    ticket = blockprune.remove_blocks(
        dense, "layers.0", x[:2], granularity="layer_approx", verify=False
    )
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.weights == ("embed.norm.weight",)
    with torch.no_grad():
        wanted = dense.layers[0](dense.embed(x)).flatten(0, 1)
        given = nn.functional.layer_norm(dense.embed.moved(x), (WIDTH,)).flatten(0, 1)
    norm = state(found.embed.norm)
    for channel in range(WIDTH):
        rows = torch.stack([given[:, channel], torch.ones(len(given)).double()], dim=1)
        expected = torch.linalg.lstsq(rows, wanted[:, channel]).solution
        own = torch.stack([norm["weight"][channel], norm["bias"][channel]])
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-9)


class Embedding(nn.Module):
    """A norm behind something without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).double()

    def moved(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[..., :3].sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.moved(x))


@approximate
def test_a_fit_that_makes_the_stream_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(gram: Any, start: Tensor, scales: Tensor, ridge: float, has_bias: bool) -> Tensor:
        return start if len(start) == WIDTH else -start

    monkeypatch.setitem(FAMILIES, "refit", turned)
    dense, ticket, x = cut("layer norm")
    found = blockprune.recover(ticket, dense, x)
    [gap] = blockprune.recovery_of(found).gaps
    assert same(state(found), state(ticket))
    assert gap.weights == ("layers.1.norm.weight",)
    assert gap.residual_after == pytest.approx(gap.residual_before)


@pytest.mark.parametrize("gone", ["layers.2.self_attn", "layers.2.linear1"])
def test_a_branch_of_a_post_norm_layer(gone: str) -> None:
    dense, x = built("torch"), data()
    ticket = blockprune.remove_blocks(dense, gone, x[:2])
    found = blockprune.recover(ticket, dense, x)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.residual_after < gap.residual_before
    for inputs in (x, data(seed=2)):
        wanted = dense(inputs)
        assert (found(inputs) - wanted).norm() < (ticket(inputs) - wanted).norm()


@approximate
@pytest.mark.parametrize("granularity", ["layer_approx", "branch"])
def test_bert(granularity: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    dense = transformers.BertModel(config).eval()
    ids = torch.randint(0, 64, (64, 10))
    mask = (torch.arange(10) < torch.randint(4, 11, (64, 1))).long()
    batch, other = ({"input_ids": ids[part], "attention_mask": mask[part]} for part in HALVES)
    few = {name: value[:2] for name, value in batch.items()}
    gone = {
        "layer_approx": ["encoder.layer.1", "encoder.layer.3"],
        "branch": ["encoder.layer.2.attention.output", "encoder.layer.2.output"],
    }
    ticket = blockprune.remove_blocks(
        dense, gone[granularity], few, granularity=granularity, verify=False
    )
    found = blockprune.recover(ticket, dense, batch)
    first, second = blockprune.recovery_of(found).gaps
    assert first.residual_after < first.residual_before
    assert second.residual_after < second.residual_before

    def missing(model: nn.Module, inputs: dict[str, Tensor]) -> float:
        counts = inputs["attention_mask"].unsqueeze(-1)
        with torch.no_grad():
            wanted, got = (m(**inputs).last_hidden_state * counts for m in (dense, model))
        return float((got - wanted).norm())

    assert missing(found, batch) < missing(ticket, batch)
    assert missing(found, other) < missing(ticket, other)


HALVES = (slice(32), slice(32, 64))
