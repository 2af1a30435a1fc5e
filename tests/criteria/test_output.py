from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from blockprune.criteria import CRITERIA, Cka, Kl, LossIncrease
from blockprune.errors import CriterionError
from blockprune.scoring import score_blocks
from tests.criteria.nets import context, pair
from tests.criteria.test_activation import NAMES, Mixing, of_batches, split, trained
from tests.test_similarity import hsic_cka


def without(model: nn.Module, name: str) -> nn.Module:
    """The model with a block replaced by the identity: its input is activated already."""
    shallower = copy.deepcopy(model)
    shallower.blocks[int(name[-1])] = nn.Identity()
    return shallower.eval()


def features(model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


@torch.no_grad()
def direct_kl(dense: nn.Module, other: nn.Module, images: Tensor, labels: Tensor) -> float:
    total = 0.0
    for p, q in zip(
        dense(images).softmax(1).tolist(), other(images).softmax(1).tolist(), strict=True
    ):
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return total / len(images)


@torch.no_grad()
def direct_loss(dense: nn.Module, other: nn.Module, images: Tensor, labels: Tensor) -> float:
    loss = functional.cross_entropy
    return float(loss(other(images), labels) - loss(dense(images), labels))


def direct_cka(dense: nn.Module, other: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 1 - hsic_cka(features(dense, images), features(other, images))


DIRECT = {"kl": direct_kl, "loss_increase": direct_loss, "cka": direct_cka}


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("name", DIRECT)
def test_against_a_direct_computation_over_any_split_of_the_data(name: str, limit: int) -> None:
    model, batch = trained(), pair(7)
    expected = {block: DIRECT[name](model, without(model, block), *batch) for block in NAMES}
    assert all(expected.values())
    for batches in ([batch], split(batch, 3)):
        scoring = of_batches(model, *batches)
        scoring.max_cache_bytes = limit
        assert CRITERIA[name](scoring) == pytest.approx(expected, rel=1e-8)


def test_kl_of_two_known_distributions() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([[0.0, math.log(3.0)]]))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x * 0 + self.shift)

    (score,) = Kl()(of_batches(Shift(), (torch.zeros(2, 2), None))).values()
    # q = (1/2, 1/2) without the block, p = (1/4, 3/4) with it.
    assert score == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_the_loss_may_fall() -> None:
    model, (images, labels) = trained(), pair()
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    scores = LossIncrease()(context(model, images, labels))
    assert min(scores.values()) < 0 or max(scores.values()) > 0
    negated = LossIncrease()(
        context(model, images, labels, loss_fn=lambda out, y: -functional.cross_entropy(out, y))
    )
    assert negated == pytest.approx({name: -score for name, score in scores.items()})


def test_labels_are_needed_for_the_loss_only() -> None:
    model, (images, _) = trained(), pair()
    for name in ("kl", "cka"):
        assert len(score_blocks(model, name, images).scores) == 3
    with pytest.raises(CriterionError, match="needs labels, and the batch has none"):
        score_blocks(model, "loss_increase", images)


def test_a_model_that_computes_its_own_loss() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(14).view(2, 7) % 11
    table = score_blocks(model, "loss_increase", {"input_ids": ids, "labels": ids})
    assert len(table.scores) == 4

    def next_token(outputs: Any, targets: Tensor) -> Tensor:
        return functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        )

    own = score_blocks(model, "loss_increase", ({"input_ids": ids}, ids), next_token)
    assert list(table.scores.values()) == pytest.approx(list(own.scores.values()), abs=1e-6)
    mlp = model.transformer.h[1].mlp.c_proj
    with torch.no_grad():
        full = model(ids, labels=ids).loss
        handle = mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        less = model(ids, labels=ids).loss
        handle.remove()
    last = list(table.scores)[-1]
    assert table.scores[last] == pytest.approx(float(less - full), abs=1e-5)


def test_features_of_a_model_without_a_head_are_its_output() -> None:
    class Headless(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model, tokens = Headless(), torch.randn(3, 5, 6)
    with torch.no_grad():
        dense = model(tokens)
        rest = tokens
        for layer in model.layers[1:]:
            rest = rest + layer(rest)
    scores = Cka()(of_batches(model, (tokens, None)))
    expected = 1 - hsic_cka(dense.flatten(0, 1), rest.flatten(0, 1))
    assert scores["layers.0"] == pytest.approx(expected, rel=1e-5)
    assert scores["layers.1"] == pytest.approx(0, abs=1e-9)


def test_features_that_do_not_vary() -> None:
    images = pair()[0][:1].repeat(4, 1, 1, 1)
    with pytest.raises(CriterionError, match=r"4 rows of features.*all the same"):
        Cka()(of_batches(trained(), (images, None)))


def test_features_that_vary_by_one_block_only() -> None:
    class OneWay(nn.Module):
        """All that the head reads of the input comes through the branch."""

        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Linear(4, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x[:, :2], torch.ones_like(x[:, 2:])], 1)
            x = x + self.branch(x)
            out: Tensor = self.head(x[:, 2:])
            return out

    torch.manual_seed(0)
    assert Cka()(of_batches(OneWay(), (torch.randn(5, 4), None))) == {"branch": 1.0}
