"""Distillation: one step against one written out by hand, what stays, and what resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import blockprune
from blockprune.errors import (
    CheckpointError,
    CriterionError,
    MissingExtraError,
    RecoveryError,
    TrainingDivergedError,
)
from blockprune.recovery import Distillation, Progress, checkpoint
from blockprune.sparsity import recalibrate_norms
from tests.recovery.nets import Net, built, images
from tests.recovery.test_promises import GONE, cut, first, same, state, texts, transformer

SHORT = Distillation(epochs=2, batch_size=8, lr=1e-2)


def distilled(ticket: nn.Module, dense: nn.Module, data: Any, **options: Any) -> nn.Module:
    return blockprune.recover(ticket, dense, data, "distill", **{"recipe": SHORT, **options})


def streams(net: Net, x: Tensor, gone: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Return the sum of each block before its activation, and the logits, by hand."""
    x, found = F.relu(net.stem(x)), []
    for number, block in enumerate(net.blocks):
        if number != gone:
            total = x + block.behind(block.last(block.inner(x)))
            found.append(total)
            x = block.act(total)
    return found, net.head(x.mean((2, 3)))


def assert_one_step(found: nn.Module, net: Net, loss: Tensor, weight_decay: float) -> None:
    """Take one step of `net`, and expect what it has become."""
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=weight_decay).step()
    expected = state(net)
    for name, value in state(found).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize("kind", ["pre-activation", "batch norm", "linear"])
def test_a_step_is_that_of_a_loop_written_out(kind: str) -> None:
    dense, x = built(kind), images(12)
    ticket = blockprune.remove_blocks(dense, "blocks.2", x[:2], verify=False)
    recipe = Distillation(
        epochs=1, lr=0.01, warmup=0.0, weight_decay=0.1, temperature=3.0, stream=0.5, labels=0.3
    )
    labels = torch.arange(12) % 4
    found = distilled(ticket, dense, (x, labels), recipe=recipe)

    net = copy.deepcopy(dense)
    with torch.no_grad():
        wanted, teacher = streams(dense, x)
    net.train()
    own, student = streams(net, x, gone=2)
    # Sums 0, 1, 3, 4 are left; what stands at 1 is to be what follows the removed block.
    targets = [wanted[number] for number in (0, 2, 3, 4)]
    terms = [((u - h) ** 2).sum() / (h**2).sum() for u, h in zip(own, targets, strict=True)]
    divergence = 9 * F.kl_div(
        (student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
    )
    loss = divergence + 0.5 * sum(terms) / 4 + 0.3 * F.cross_entropy(student, labels)
    assert_one_step(found, net, loss, weight_decay=0.1)


def test_outputs_that_are_no_logits() -> None:
    dense, ticket, x = cut("no bias")
    recipe = Distillation(epochs=1, lr=0.01, warmup=0.0, outputs="mse", stream=0.0)
    found = distilled(ticket, dense, x, recipe=recipe)
    net = copy.deepcopy(dense).train()
    with torch.no_grad():
        teacher = dense(x)
    loss = ((streams(net, x, gone=2)[1] - teacher) ** 2).sum() / (teacher**2).sum()
    assert_one_step(found, net, loss, weight_decay=0.0)


def settled() -> Net:
    """Return a network whose normalisations have the statistics of the images."""
    net = built("pre-activation")
    recalibrate_norms(net, [images(200, seed=3)])
    return net.eval()


def test_it_comes_closer_to_the_dense_model() -> None:
    dense, x = settled(), images()
    ticket = blockprune.remove_blocks(dense, ["blocks.1", "blocks.3"], x[:2])
    refitted = blockprune.recover(ticket, dense, x)
    seen: list[Progress] = []
    recipe = Distillation(epochs=20, batch_size=8, lr=3e-3, fixed_norms=True)
    found = distilled(refitted, dense, x, recipe=recipe, on_progress=seen.append)

    def divergence(model: nn.Module, inputs: Tensor) -> float:
        with torch.no_grad():
            own, wanted = (m.eval()(inputs).log_softmax(1) for m in (model, dense))
            return float(F.kl_div(own, wanted, log_target=True, reduction="batchmean"))

    others = images(40, seed=7)
    assert divergence(found, x) < 0.5 * divergence(refitted, x)
    assert divergence(found, others) < divergence(refitted, others) < divergence(ticket, others)
    assert [progress.done for progress in seen] == list(range(1, 61))
    assert {progress.total for progress in seen} == {60}
    assert seen[-1].loss < 0.7 * seen[0].loss
    record = blockprune.recovery_of(found)
    assert (record.method, record.samples) == ("distill", len(x))
    assert record.before == blockprune.recovery_of(refitted)
    assert [gap.blocks for gap in record.gaps] == [("blocks.1",), ("blocks.3",)]
    for gap, before in zip(record.gaps, record.before.gaps, strict=True):
        assert gap.residual_before == pytest.approx(before.residual_after, rel=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_changes(training: bool, tmp_path: Path) -> None:
    dense, ticket, x = cut("batch norm")
    frozen = "blocks.0.inner.0.weight"
    for model in (dense, ticket):
        model.train(training)
        model.get_parameter(frozen).requires_grad_(False)
    before, cut_before = state(dense), state(ticket)
    asked = [[p.requires_grad for p in model.parameters()] for model in (dense, ticket)]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = distilled(ticket, dense, x)
    assert torch.equal(torch.rand(3), wanted)
    assert same(state(dense), before)
    assert same(state(ticket), cut_before)
    assert dense.training is ticket.training is found.training is training
    assert asked == [[p.requires_grad for p in model.parameters()] for model in (dense, ticket)]
    assert asked[1] == [p.requires_grad for p in found.parameters()]
    assert all(p.grad is None for m in (dense, ticket, found) for p in m.parameters())
    after = state(found)
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in cut_before.items()
    }
    changed = {name for name in after if not torch.equal(after[name], cut_before[name])}
    assert changed == after.keys() - {frozen}
    blockprune.save_ticket(found, tmp_path / "t")
    again = blockprune.load_ticket(dense, tmp_path / "t")
    assert same(state(again), after)
    assert blockprune.recovery_of(again) == blockprune.recovery_of(found)
    assert found is not ticket
    assert distilled(ticket, dense, x, in_place=True) is ticket
    assert same(state(ticket), after)


def loader(x: Tensor) -> DataLoader[Any]:
    """Shuffles by the global generator."""
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 4), batch_size=8, shuffle=True)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_killed_distillation_resumes_to_the_same_numbers(
    stop: int, rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    dense, ticket, x = cut("scale and dropout")
    recipe = Distillation(epochs=2, lr=1e-2, lora_rank=rank)
    wanted = state(distilled(ticket, dense, loader(x), recipe=recipe))
    before, file = state(ticket), tmp_path / "checkpoint"

    def die(progress: Progress) -> None:
        if progress.done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(
            ticket, dense, loader(x), recipe=recipe, checkpoint=file, on_progress=die, in_place=True
        )
    assert same(state(ticket), before)
    torch.manual_seed(99)
    steps: list[int] = []
    found = distilled(
        ticket,
        dense,
        loader(x),
        recipe=recipe,
        checkpoint=file,
        on_progress=lambda progress: steps.append(progress.done),
    )
    assert steps == list(range(stop + 1, 7))
    assert same(state(found), wanted)
    # What is there already is not computed again.
    again = distilled(ticket, dense, loader(x), recipe=recipe, checkpoint=file)
    assert same(state(again), wanted)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    dense, ticket, x = cut("no bias")
    file = tmp_path / "checkpoint"
    distilled(ticket, dense, x, checkpoint=file)
    written = file.read_bytes()
    other = built("no bias")
    with torch.no_grad():
        other.head.bias.add_(1)
    cases: list[tuple[nn.Module, nn.Module, Tensor, dict[str, Any]]] = [
        (ticket, dense, x + 1, {}),
        (ticket, dense, x, {"recipe": Distillation(epochs=2, batch_size=8, lr=2e-2)}),
        (blockprune.recover(ticket, dense, x), dense, x, {}),
        (ticket, other, x, {}),
        (blockprune.remove_blocks(dense, "blocks.3", x[:2]), dense, x, {}),
    ]
    for one, model, data, options in cases:
        with pytest.raises(CheckpointError, match="of a distillation with another"):
            distilled(one, model, data, checkpoint=file, **options)
        assert file.read_bytes() == written
    file.write_bytes(written[:-20] + bytes(20))
    with pytest.raises(CheckpointError):
        distilled(ticket, dense, x, checkpoint=file)


def test_small_steps_of_half_precision_add_up() -> None:
    dense, ticket, x = cut("no bias")
    half, cut_half = copy.deepcopy(dense).bfloat16(), copy.deepcopy(ticket).bfloat16()
    with torch.no_grad():
        # One step moves a weight by about lr, a tenth of what bfloat16 tells apart at 1.
        for model in (half, cut_half):
            model.stem.bias.fill_(1.0)
    recipe = Distillation(epochs=60, batch_size=8, lr=4e-4)
    found = distilled(cut_half, half, x.bfloat16(), recipe=recipe)
    assert found.stem.bias.dtype == torch.bfloat16
    moved = (found.stem.bias.detach().float() - 1).abs()
    assert int((moved > 0).sum()) >= 3
    assert math.isfinite(blockprune.recovery_of(found).gaps[0].residual_after)


def test_padding_changes_nothing() -> None:
    dense = transformer()
    ticket = blockprune.remove_blocks(dense, GONE, first(texts()), verify=False)
    found = [
        state(distilled(ticket, dense, texts(padding, fill)))
        for padding, fill in ((0, 0), (3, 1), (3, 2))
    ]
    for other in found[1:]:
        for name, value in other.items():
            assert torch.allclose(value, found[0][name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("kind", ["pre-activation", "linear", "groups"])
def test_adapters_are_of_low_rank_and_leave_no_trace(kind: str) -> None:
    dense, ticket, x = cut(kind)
    recipe = Distillation(epochs=3, batch_size=8, lr=1e-2, lora_rank=2, fixed_norms=True)
    found = distilled(ticket, dense, x, recipe=recipe)
    before, after = state(ticket), state(found)
    assert [type(m) for m in found.children()] == [type(m) for m in ticket.children()]
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    weights = {name for name in changed if name.endswith("weight")}
    assert "blocks.0.inner.0.weight" in weights
    assert ("blocks.0.last.weight" in weights) == (kind == "pre-activation")
    assert changed == weights
    for name in weights:
        moved = (after[name] - before[name]).flatten(1)
        assert torch.linalg.matrix_rank(moved, rtol=1e-5) <= 2 * math.prod(before[name].shape[2:])
    assert blockprune.recovery_of(found).gaps[0].residual_after < (
        blockprune.recovery_of(found).gaps[0].residual_before
    )


def test_adapters_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    dense, ticket, x = cut()
    with pytest.raises(MissingExtraError, match=r"blockprune\[lora\]"):
        distilled(ticket, dense, x, recipe=Distillation(lora_rank=2))


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_mixed_precision(bf16: Accelerator) -> None:
    dense, ticket, x = cut("no bias")
    dense, ticket, x = dense.float(), ticket.float(), x.float()
    exact = state(distilled(ticket, dense, x))
    found = distilled(ticket, dense, x, accelerator=bf16)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert not same(state(found), exact)
    for name, value in state(found).items():
        assert torch.allclose(value, exact[name], rtol=0, atol=0.1), name


def test_a_loss_that_is_not_finite_leaves_the_ticket() -> None:
    dense, ticket, x = cut("no bias")
    before = state(ticket)
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ of 6"):
        distilled(ticket, dense, x, recipe=SHORT.model_copy(update={"lr": 1e200}), in_place=True)
    assert same(state(ticket), before)
    assert blockprune.recovery_of(ticket) is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"recipe": Distillation(labels=1.0)}, CriterionError, "needs labels"),
        ({"data": torch.full((4, 3, 6, 6), torch.nan)}, RecoveryError, "not finite"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], match: str) -> None:
    dense, ticket, x = cut("no bias")
    data = options.pop("data", x.double()).double()
    before = state(ticket)
    with pytest.raises(error, match=match):
        distilled(ticket, dense, data, in_place=True, **options)
    assert same(state(ticket), before)


def test_a_ticket_without_anything_to_train() -> None:
    dense, ticket, x = cut("no bias")
    ticket.requires_grad_(False)
    with pytest.raises(RecoveryError, match="requires a gradient"):
        distilled(ticket, dense, x)


def test_prune_distils_in_one_call() -> None:
    dense, x = settled(), images()
    batches = [(part, None) for part in x.split(4)] * 5
    found = blockprune.prune(dense, "block_influence", p=2, data=batches, recover="distill")
    record = blockprune.recovery_of(found)
    assert (record.method, record.samples) == ("distill", 5 * len(x))
    assert all(gap.residual_after < gap.residual_before for gap in record.gaps)


@pytest.mark.parametrize("are_fixed", [False, True])
def test_fixed_norms_keep_their_statistics(are_fixed: bool) -> None:
    dense, ticket, x = cut("batch norm")
    recipe = SHORT.model_copy(update={"fixed_norms": are_fixed})
    before, after = state(ticket), state(distilled(ticket, dense, x, recipe=recipe))
    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(after[name], before[name]) is are_fixed for name in statistics)
