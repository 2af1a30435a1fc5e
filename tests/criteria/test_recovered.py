"""`recovered_loss` is what the public functions measure: cut, recover, take the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from blockprune.criteria import RecoveredLoss
from blockprune.errors import BlockNotFoundError, CriterionError
from tests.criteria.test_contract import Classifier
from tests.recovery.nets import built, images
from tests.recovery.test_promises import same, state

Batches = list[tuple[Any, Tensor]]


def residual(kind: str) -> Callable[[], tuple[nn.Module, Batches]]:
    def make() -> tuple[nn.Module, Batches]:
        x = images(24)
        labels = torch.arange(24) % 4
        return built(kind, depth=4), list(zip(x.split(6), labels.split(6), strict=True))

    return make


def regional() -> tuple[nn.Module, Batches]:
    """A transformer whose root does not trace: each layer is a region of its own."""
    torch.manual_seed(3)
    x = torch.randn(24, 5, 3, dtype=torch.float64)
    labels = torch.arange(24) % 3
    model = Classifier().double().eval()
    return model, list(zip(x.split(8), labels.split(8), strict=True))


def language() -> tuple[nn.Module, Batches]:
    """A decoder, and sequences of which the shorter ones are padded."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(11, (16, 6))
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6] * 4)[:, None]).long()
    parts = zip(ids.split(4), mask.split(4), strict=True)
    return model, [({"input_ids": i, "attention_mask": m}, i) for i, m in parts]


NETS = {
    "post-activation": residual("batch norm"),
    "pre-activation": residual("pre-activation"),
    "regional": regional,
    "language": language,
}


def called(model: nn.Module, inputs: Any) -> Any:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, Tensor) else found.logits


def loss(model: nn.Module, batches: Batches) -> float:
    """Return the cross entropy of all samples, written out."""
    total = 0.0
    with torch.no_grad():
        for inputs, labels in batches:
            logits = called(model, inputs)
            if logits.dim() == 3:
                logits = logits.transpose(1, 2)
            each = F.cross_entropy(logits, labels, reduction="none")
            total += float(each.flatten(1).mean(1).sum() if each.dim() > 1 else each.sum())
    return total / sum(len(labels) for _, labels in batches)


def after_recovery(model: nn.Module, gone: Iterable[str], batches: Batches) -> float:
    names = list(gone)
    if not names:
        return loss(model, batches)
    ticket = blockprune.remove_blocks(model, names, batches[0][0], verify=False)
    return loss(blockprune.recover(ticket, model, batches), batches)


@pytest.mark.parametrize("net", NETS)
def test_the_score_is_the_loss_after_recover_minus_the_dense_loss(net: str) -> None:
    model, batches = NETS[net]()
    table = blockprune.score_blocks(model, "recovered_loss", batches)
    dense = loss(model, batches)
    assert len(table.scores) == 4
    for name, score in table.scores.items():
        expected = after_recovery(model, [name], batches) - dense
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-12)
    plain = blockprune.score_blocks(model, "loss_increase", batches).scores
    assert any(table.scores[name] != pytest.approx(plain[name], rel=1e-3) for name in plain)


def test_beside_what_is_gone_the_scores_add_up_to_the_loss_of_the_set() -> None:
    model, batches = residual("batch norm")()
    scores = blockprune.score_blocks(model, RecoveredLoss(gone=("blocks.1",)), batches).scores
    before = after_recovery(model, ["blocks.1"], batches)
    assert scores.pop("blocks.1") == 0
    for name, score in scores.items():
        expected = after_recovery(model, ["blocks.1", name], batches) - before
        assert score == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_how_many_share_a_pass_does_not_matter() -> None:
    model, batches = residual("batch norm")()
    found = [
        blockprune.score_blocks(model, "recovered_loss", batches, max_cache_bytes=size).scores
        for size in (0, 20_000, 2**30)
    ]
    assert found[0] == pytest.approx(found[2], rel=1e-9)
    assert found[1] == pytest.approx(found[2], rel=1e-9)


def test_a_dense_pass_over_the_data_serves_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it each block takes one pass, for its loss, and runs on two samples."""
    model, batches = residual("pre-activation")()
    seen = {2: 0, 6: 0}
    convolve = F.conv2d

    def counted(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if weight.shape[1] == 3:
            seen[len(x)] += 1
        return convolve(x, weight, *args)

    monkeypatch.setattr(
        nn.Conv2d,
        "_conv_forward",
        lambda own, x, weight, bias: counted(x, weight, bias, own.stride, own.padding),
    )
    blocks = blockprune.score_blocks(model, "recovered_loss", batches).scores
    assert seen[6] <= len(batches) * (len(blocks) + 2)
    assert seen[2] > 0


class Pooled(nn.Module):
    """Behind the pooling nothing is linear, so that the first block leaves a gap as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = built("pre-activation", depth=3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.net.stem(x)), 2)
        out: Tensor = self.net.head(self.net.blocks(x).mean((2, 3)))
        return out


def test_a_gap_that_nothing_reaches_counts_with_its_loss_as_it_is() -> None:
    model, (_, batches) = Pooled().eval(), residual("pre-activation")()
    first, *others = blockprune.find_blocks(model, batches[0][0]).names
    scores = blockprune.score_blocks(model, "recovered_loss", batches).scores
    plain = blockprune.score_blocks(model, "loss_increase", batches).scores
    ticket = blockprune.remove_blocks(model, first, batches[0][0])
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, model, batches)).gaps
    assert gap.weights == ()
    assert scores[first] == pytest.approx(plain[first], rel=1e-9)
    assert all(scores[name] != pytest.approx(plain[name], rel=1e-3) for name in others)


def test_nothing_is_left_behind() -> None:
    model, batches = residual("batch norm")()
    model.train()
    model.blocks[0].requires_grad_(False)
    fired: list[int] = []
    model.register_forward_hook(lambda *_: fired.append(1))
    before = state(model)
    asked = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    criteria = ("recovered_loss", RecoveredLoss(gone=("blocks.1",)))
    for criterion in criteria:
        first = blockprune.score_blocks(model, criterion, batches)
        assert first == blockprune.score_blocks(model, criterion, batches)
    assert torch.equal(torch.rand(3), wanted)
    assert same(state(model), before)
    assert not fired
    assert model.training
    assert asked == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_it_ranks_by_what_is_lost_for_what_is_saved() -> None:
    model, batches = residual("post-activation")()
    kept = {"p": 1, "data": batches, "by": "score_per_cost"}
    plan = blockprune.plan_of(blockprune.prune(model, "recovered_loss", **kept))
    scores = blockprune.score_blocks(model, "recovered_loss", batches).scores
    # All of these blocks cost the same, and what does harm goes first.
    assert plan.remove == (min(scores, key=scores.__getitem__),)
    assert plan.criterion == "recovered_loss"


def test_step_by_step_it_is_the_loss_of_the_whole_set() -> None:
    model, batches = residual("batch norm")()
    ticket = blockprune.prune(model, "recovered_loss", 2, data=batches, schedule="iterative")
    plan = blockprune.plan_of(ticket)
    dense = loss(model, batches)
    total = sum(plan.scores[name] for name in plan.remove)
    assert total == pytest.approx(after_recovery(model, plan.remove, batches) - dense, rel=1e-9)
    # Written out: the best next block, with everything recovered anew from the dense model.
    gone: list[str] = []
    for _ in range(2):
        others = [name for name in plan.scores if name not in gone]
        gone.append(min(others, key=lambda name: after_recovery(model, [*gone, name], batches)))
    assert set(plan.remove) == set(gone)


def test_a_full_beam_is_the_exhaustive_best() -> None:
    model, batches = residual("post-activation")()
    names = blockprune.find_blocks(model, batches[0][0]).names
    options = {"data": batches, "schedule": "beam", "beam_width": 6}
    plan = blockprune.plan_of(blockprune.prune(model, "recovered_loss", 2, **options))
    best = min(
        itertools.combinations(names, 2), key=lambda gone: after_recovery(model, gone, batches)
    )
    assert plan.remove == best


class Twice(nn.Module):
    """Calls a region twice, so that what one call lacks cannot be told from another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier().double().eval()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embed(x)
        for _ in range(2):
            for layer in inner.layers:
                if float(x.detach().abs().sum()) >= 0:
                    x = layer(x)
        out: Tensor = inner.head(x.mean(1))
        return out


def test_what_cannot_be_recovered_is_said() -> None:
    model, (_, batches) = Twice(), regional()
    with pytest.raises(CriterionError, match=r"called 2 times.*'loss_increase'"):
        blockprune.score_blocks(model, "recovered_loss", batches)


def test_a_block_that_there_is_not_is_no_block_that_is_gone() -> None:
    model, batches = residual("pre-activation")()
    with pytest.raises(BlockNotFoundError, match=r"blocks\.9"):
        blockprune.score_blocks(model, RecoveredLoss(gone=("blocks.9",)), batches)
    with pytest.raises(CriterionError, match="label"):
        blockprune.score_blocks(model, "recovered_loss", images(8))
