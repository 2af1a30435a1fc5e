"""Models, data and arguments that users tried before the tests did."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import blockprune
from blockprune.errors import CheckpointError, RecoveryError, StalePlanError
from blockprune.recovery import Distillation, Progress
from tests.recovery.test_promises import cut, first, same, state, texts, transformer

WIDTH = 6


class Stack(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=norm is None)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(F.relu(self.up(x))))


def stacked(*blocks: nn.Module) -> Stack:
    torch.manual_seed(0)
    for module in blocks:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return Stack(*blocks).double().eval()


def inputs(count: int = 40) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def error_of(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


def test_a_norm_that_others_read_as_well_stays_as_it_is() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    dense, x = stacked(*(Block(norm) for _ in range(4))), inputs()
    dense.train()(x)
    dense.eval()
    with pytest.warns(UserWarning, match="its statistics will be those of the calls that stay"):
        ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x, ridge=0.0)
    before, after = state(ticket), state(found)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "blocks.0.down.weight"
    }
    assert error_of(found, dense, x) < error_of(ticket, dense, x)


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate = (x[..., :1] > -0.3).to(x)
        return x + self.down(F.relu(self.up(x))) * gate


def test_positions_that_a_gate_shuts_in_any_order() -> None:
    dense, x = stacked(*(Gated() for _ in range(4))), inputs()
    with torch.no_grad():
        is_open = (dense.stem(x)[:, 0] > -0.3).nonzero().flatten()
        shut = (dense.stem(x)[:, 0] <= -0.3).nonzero().flatten()
    assert len(is_open) > 2
    assert len(shut) > 2
    gaps, states = [], []
    for order in (torch.cat([is_open, shut]), torch.cat([is_open[:1], shut, is_open[1:]])):
        data = x[order]
        ticket = blockprune.remove_blocks(dense, ["blocks.1"], data[:2], verify=False)
        found = blockprune.recover(ticket, dense, data, ridge=0.0)
        gaps += blockprune.recovery_of(found).gaps
        states.append(state(found))
        net = copy.deepcopy(dense)
        net.load_state_dict({**dense.state_dict(), **found.state_dict()})
        with torch.no_grad():
            stream = net.blocks[0](net.stem(data))
            wanted = dense.blocks[1](dense.blocks[0](dense.stem(data)))
        by_hand = float(((stream - wanted) ** 2).sum() / (wanted**2).sum())
        assert gaps[-1].residual_after == pytest.approx(by_hand, rel=1e-6)
    assert gaps[0].residual_after == pytest.approx(gaps[1].residual_after, rel=1e-6)
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-8), name


class Tied(Stack):
    """Decodes with the weight of a block, by an attribute of it."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.relu(x @ self.blocks[0].down.weight) @ self.blocks[0].down.weight.T


def test_a_weight_that_is_read_by_an_attribute_is_left_alone() -> None:
    torch.manual_seed(0)
    dense, x = Tied(*(Block() for _ in range(4))).double().eval(), inputs()
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    found = blockprune.recover(ticket, dense, x)
    assert torch.equal(
        found.get_parameter("blocks.0.down.weight"), dense.get_parameter("blocks.0.down.weight")
    )


def test_a_kept_block_that_is_silent_on_the_example_parts_two_gaps() -> None:
    dense, x = stacked(*(Block() for _ in range(5))), inputs()
    with torch.no_grad():
        for layer in (dense.blocks[2].up, dense.blocks[2].down):
            layer.bias.zero_()
        # It is silent where the first number of the stream is negative.
        dense.blocks[2].up.weight.zero_()[:, 0] = 1.0
        quiet = dense.blocks[0](dense.stem(x))[:, 0] < 0
    x = torch.cat([x[quiet], x[~quiet]])
    assert 2 < int(quiet.sum()) < len(x)
    ticket = blockprune.remove_blocks(dense, ["blocks.1", "blocks.3"], x[:2], verify=False)
    gaps = blockprune.recovery_of(blockprune.recover(ticket, dense, x)).gaps
    assert [gap.blocks for gap in gaps] == [("blocks.1",), ("blocks.3",)]


def test_adapters_go_by_whole_names() -> None:
    class Nested(Stack):
        def __init__(self) -> None:
            super().__init__(*(Block() for _ in range(4)))
            self.sub = nn.ModuleDict({"head": nn.Linear(3, 3)})

        def forward(self, x: Tensor) -> Any:
            return self.sub["head"](super().forward(x))

    torch.manual_seed(0)
    dense, x = Nested().double().eval(), inputs()
    dense.sub.requires_grad_(False)
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    recipe = Distillation(lora_rank=2, batch_size=8, lr=1e-2)
    found = blockprune.recover(ticket, dense, x, "distill", recipe=recipe)
    before, after = state(ticket), state(found)
    assert torch.equal(after["sub.head.weight"], before["sub.head.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_what_a_checkpoint_depends_on(tmp_path: Path) -> None:
    dense, x = stacked(*(Block() for _ in range(3))), inputs()
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    file, batches = tmp_path / "c", [(part, None) for part in x.split(10)]

    def go(one: nn.Module, data: Any, **options: Any) -> nn.Module:
        return blockprune.recover(one, dense, data, "distill", checkpoint=file, **options)

    wanted = state(go(ticket, batches))
    frozen = copy.deepcopy(ticket)
    frozen.get_parameter("head.weight").requires_grad_(False)
    with pytest.raises(CheckpointError, match="another ticket"):
        go(frozen, batches)
    with pytest.raises(CheckpointError, match="another data"):
        go(ticket, [*batches[:-1], (x[:10] + 1, None)])
    with pytest.raises(CheckpointError, match="another mask"):
        go(ticket, batches, mask_fn=lambda call: torch.ones(len(call.args[0]), 1))
    with pytest.raises(CheckpointError, match="another recipe"):
        go(ticket, batches, recipe=Distillation(epochs=2))
    with pytest.raises(CheckpointError, match="another loss"):
        go(ticket, batches, loss_fn=lambda outputs, targets: outputs.sum())
    assert same(state(go(ticket, batches)), wanted)


@pytest.mark.parametrize("method", ["refit", "distill", "norms"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(method: str, context: Any) -> None:
    dense, ticket, x = cut()
    plain = state(blockprune.recover(ticket, dense, x, method))
    with context():
        found = blockprune.recover(ticket, dense, x, method)
    assert same(state(found), plain)


def test_autocast_around_changes_nothing() -> None:
    dense, ticket, x = (one.float() for one in cut("no bias"))
    plain = blockprune.recover(ticket, dense, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blockprune.recover(ticket, dense, x)
    assert same(state(found), state(plain))
    assert blockprune.recovery_of(found) == blockprune.recovery_of(plain)


class Several(Stack):
    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return {"logits": found, "is_large": found > 0, "none": found[:, :0]}


@pytest.mark.parametrize("method", ["refit", "distill"])
def test_outputs_that_are_no_numbers(method: str) -> None:
    torch.manual_seed(0)
    dense, x = Several(*(Block() for _ in range(3))).double().eval(), inputs()
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, dense, x, method)).gaps
    assert gap.blocks == ("blocks.1",)


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(nn.BatchNorm1d(WIDTH)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.mul_(0.5))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("method", ["refit", "distill", "norms"])
def test_the_data_and_the_generators_are_as_they_were(method: str) -> None:
    torch.manual_seed(0)
    dense, x = WritesIntoItsInput().double().eval(), inputs()
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    before = x.clone()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=8, shuffle=True)
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    blockprune.recover(ticket, dense, loader, method)
    blockprune.recover(ticket, dense, [(x, None)], method)
    assert torch.equal(torch.get_rng_state(), wanted)
    assert torch.equal(x, before)


def test_norms_refuse_what_the_other_methods_refuse() -> None:
    dense, ticket, x = cut("batch norm")
    before = state(ticket)
    with pytest.raises(RecoveryError, match="not finite"):
        blockprune.recover(ticket, dense, x * torch.nan, "norms", in_place=True)
    assert same(state(ticket), before)
    others = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2))).double()
    with pytest.raises(StalePlanError):
        blockprune.recover(ticket, others, x, "norms")
    plain, cut_plain = stacked(Block(), Block()), inputs()
    ticket = blockprune.remove_blocks(plain, ["blocks.1"], cut_plain[:2], verify=False)
    with pytest.raises(RecoveryError, match="none"):
        blockprune.recover(ticket, plain, cut_plain, "norms")


@pytest.mark.parametrize("method", ["refit", "distill"])
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.zeros(16, 9), "no position counts"),
        (-torch.ones(16, 9), "at least 0"),
        (torch.full((16, 9), torch.nan), "at least 0"),
        (torch.ones(16, 9, dtype=torch.complex64), "at least 0"),
        (torch.ones(9), r"not shape \(9,\)"),
        (torch.ones(3, 2), r"not shape \(3, 2\)"),
        ("mask", "<class 'str'>"),
    ],
)
def test_masks_that_are_none(method: str, mask: Any, match: str) -> None:
    dense = transformer()
    ticket = blockprune.remove_blocks(dense, ["layers.2.up"], first(texts()), verify=False)

    def given(call: Any) -> Any:
        is_whole = isinstance(mask, Tensor) and len(mask) == 16
        return mask[: len(call.kwargs["ids"])] if is_whole else mask

    with pytest.raises(RecoveryError, match=match):
        blockprune.recover(ticket, dense, texts(), method, mask_fn=given)


class OwnLoss(Stack):
    """Computes a loss of labels among its inputs, as models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found = super().forward(x)
        loss = None if labels is None else F.cross_entropy(found, labels)
        return {"loss": loss, "logits": found}


def test_labels_among_the_inputs() -> None:
    torch.manual_seed(0)
    dense, x = OwnLoss(*(Block() for _ in range(3))).double().eval(), inputs()
    labels = torch.arange(len(x)) % 3
    data = {"x": x, "labels": labels}
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], {"x": x[:2], "labels": labels[:2]})
    recipe = Distillation(labels=1.0, batch_size=8)
    own = blockprune.recover(ticket, dense, data, "distill", recipe=recipe)
    given = blockprune.recover(
        ticket,
        dense,
        data,
        "distill",
        recipe=recipe,
        loss_fn=lambda outputs, targets: F.cross_entropy(outputs["logits"], labels[:8]),
    )
    without = blockprune.recover(
        ticket, dense, data, "distill", recipe=recipe.model_copy(update={"labels": 0.0})
    )
    assert not same(state(own), state(without))
    assert not same(state(own), state(given))  # labels[:8] are those of the first batch alone


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("refit", {"recipe": Distillation()}),
        ("refit", {"checkpoint": "c"}),
        ("map", {"loss_fn": F.cross_entropy}),
        ("distill", {"ridge": 0.1}),
        ("norms", {"mask_fn": lambda call: torch.ones(2, 2)}),
    ],
)
def test_options_of_other_methods_are_refused(method: str, options: dict[str, Any]) -> None:
    dense, ticket, x = cut()
    with pytest.raises(RecoveryError, match=f"{next(iter(options))} is an option of"):
        blockprune.recover(ticket, dense, x, method, **options)


def test_a_dense_model_without_its_trained_weights_is_warned_of() -> None:
    dense, x = stacked(*(Block() for _ in range(3))), inputs()
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    torch.manual_seed(7)
    other = Stack(*(Block() for _ in range(3))).double().eval()
    with pytest.warns(UserWarning, match="shares no weight"):
        blockprune.recover(ticket, other, x)
    # One that was trained since is no such ticket.
    trained = blockprune.recover(ticket, dense, x, "distill", recipe=Distillation(batch_size=8))
    blockprune.recover(trained, dense, x)


def test_gaps_have_the_names_of_the_plan() -> None:
    dense, batch = transformer(), texts()
    analysis = blockprune.find_blocks(dense, first(batch), "layer")
    layer = analysis.names[2]
    ticket = blockprune.prune(
        dense,
        lambda context: {b.name: float(b.name != layer) for b in context.blocks},
        p=1,
        data=batch,
        granularity="layer",
    )
    assert blockprune.plan_of(ticket).remove == (layer,)
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, dense, batch)).gaps
    assert gap.blocks == (layer,)


def test_a_ticket_that_was_untied_is_refused() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(WIDTH, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    dense, ids = Text().eval(), torch.arange(8)[:, None] % 9
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], ids[:2], preserve_root=True)
    head = ticket.get_submodule("head")
    head.weight = nn.Parameter(head.weight.detach() + 1)
    with pytest.raises(RecoveryError, match="shares its memory"):
        blockprune.recover(ticket, dense, ids)


def test_channels_of_a_convolution_are_no_positions() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 2, 1)
            self.blocks = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(F.relu(x))
            return self.head(x)

    torch.manual_seed(0)
    dense, x = Line().double().eval(), torch.randn(8, 2, 7, dtype=torch.float64)
    with torch.no_grad():
        dense.stem.weight[0] *= 200
    ticket = blockprune.remove_blocks(dense, ["blocks.1"], x[:2], verify=False)
    seen: list[Progress] = []
    recipe = Distillation(lr=1e-12, batch_size=4)
    found = blockprune.recover(ticket, dense, x, "distill", recipe=recipe, on_progress=seen.append)
    [refit] = blockprune.recovery_of(blockprune.recover(ticket, dense, x)).gaps
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.residual_before == pytest.approx(refit.residual_before, rel=1e-6)
