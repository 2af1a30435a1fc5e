"""What a recovery leaves as it is, what it refuses, and what its record and its file say."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from blockprune.errors import DataError, RecoveryError, StalePlanError
from blockprune.models import resnet20
from blockprune.recovery.data import Batches
from tests.recovery.nets import built, images

METHODS = ("norms", "scale", "map", "refit", "moments")


def cut(kind: str = "batch norm", gone: Any = "blocks.2") -> tuple[nn.Module, nn.Module, Tensor]:
    dense, x = built(kind), images()
    return dense, blockprune.remove_blocks(dense, gone, x[:2], verify=False), x


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_changes(method: str, training: bool) -> None:
    dense, ticket, x = cut()
    dense.train(training)
    ticket.train(training)
    first = next(dense.parameters())
    first.requires_grad_(False)
    fired: list[int] = []
    dense.register_forward_hook(lambda *_: fired.append(1))
    before, cut_before = state(dense), state(ticket)
    asked = [[p.requires_grad for p in model.parameters()] for model in (dense, ticket)]
    identities = [id(p) for p in dense.parameters()]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = blockprune.recover(ticket, dense, x, method)
    assert torch.equal(torch.rand(3), wanted)
    assert same(state(dense), before)
    assert same(state(ticket), cut_before)
    assert not fired
    assert dense.training is ticket.training is found.training is training
    assert asked == [[p.requires_grad for p in model.parameters()] for model in (dense, ticket)]
    assert identities == [id(p) for p in dense.parameters()]
    assert sum(asked[0]) == len(asked[0]) - 1
    assert all(p.grad is None for m in (dense, ticket, found) for p in m.parameters())
    assert blockprune.recovery_of(ticket) is None
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in cut_before.items()
    }
    assert not same(state(found), cut_before)
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in ticket.parameters()
    ]
    assert blockprune.plan_of(found) == blockprune.plan_of(ticket)


def test_in_place_is_the_ticket_itself() -> None:
    dense, ticket, x = cut()
    apart = blockprune.recover(ticket, dense, x)
    found = blockprune.recover(ticket, dense, x, in_place=True)
    assert found is ticket
    assert same(state(found), state(apart))


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_it_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    dense, ticket, x = cut()
    found = blockprune.recover(ticket, dense, x, method)
    blockprune.save_ticket(found, tmp_path / "t")
    again = blockprune.load_ticket(dense, tmp_path / "t")
    assert same(state(again), state(found))
    assert blockprune.recovery_of(again) == blockprune.recovery_of(found)
    blockprune.save_ticket(ticket, tmp_path / "u")
    assert blockprune.recovery_of(blockprune.load_ticket(dense, tmp_path / "u")) is None


def test_the_record_says_what_was_done() -> None:
    dense, ticket, x = cut(gone=["blocks.1", "blocks.2", "blocks.4"])
    record = blockprune.recovery_of(blockprune.recover(ticket, dense, x))
    assert (record.method, record.samples) == ("refit", len(x))
    assert [gap.blocks for gap in record.gaps] == [("blocks.1", "blocks.2"), ("blocks.4",)]
    assert [gap.weights for gap in record.gaps] == [
        ("blocks.0.last.weight",),
        ("blocks.3.last.weight",),
    ]
    assert all(gap.residual_after < gap.residual_before for gap in record.gaps)
    norms = blockprune.recovery_of(blockprune.recover(ticket, dense, x, "norms"))
    assert (norms.method, norms.samples, norms.gaps) == ("norms", len(x), ())


def test_a_recovered_ticket_that_is_cut_again_says_so_still() -> None:
    dense, ticket, x = cut()
    found = blockprune.recover(ticket, dense, x)
    again = blockprune.remove_blocks(found, "blocks.3", x[:2])
    assert blockprune.recovery_of(again) == blockprune.recovery_of(found)
    # Both gaps are one now, in front of the dense model's stream behind the last.
    last = blockprune.recover(again, dense, x)
    [gap] = blockprune.recovery_of(last).gaps
    assert gap.blocks == ("blocks.2", "blocks.3")
    assert gap.residual_after < gap.residual_before


def test_batches_in_any_order_and_of_any_size() -> None:
    dense, ticket, x = cut()
    whole = state(blockprune.recover(ticket, dense, x, ridge=1e-3))
    for batches in (x.split(5), x.split(8)[::-1], iter([(part, None) for part in x.split(7)])):
        found = state(blockprune.recover(ticket, dense, batches, ridge=1e-3))
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)


def test_held_out_batches_choose_no_worse_a_ridge_than_none_at_all() -> None:
    dense, ticket, _ = cut("post-activation")
    few, new = images(4, seed=3), images(64, seed=4)
    wanted = dense(new)
    found = blockprune.recover(ticket, dense, few)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.ridge is not None
    assert (found(new) - wanted).norm() < (ticket(new) - wanted).norm()


@pytest.mark.parametrize(
    ("sizes", "held"),
    [([1], [False]), ([8], [False, True]), ([4, 4], [False, True]), ([4, 4, 1], [0, 0, 1])],
)
def test_something_is_held_out_where_there_are_samples_for_it(
    sizes: list[int], held: list[bool]
) -> None:
    dense, _, x = cut()
    batches = Batches(dense, [(part, None) for part in x[: sum(sizes)].split(sizes)])
    found = list(batches)
    assert [is_held_out for _, is_held_out in found] == held
    assert batches.samples == sum(sizes)
    assert torch.equal(torch.cat([call.args[0] for call, _ in found]), x[: sum(sizes)])


def test_every_fourth_batch_is_held_out() -> None:
    dense, _, x = cut()
    found = [is_held_out for _, is_held_out in Batches(dense, [(p, None) for p in x.split(2)])]
    assert found == [False, False, False, True] * 3


def test_max_batches() -> None:
    dense, ticket, x = cut()
    batches = [(part, None) for part in x.split(4)]
    found = blockprune.recover(ticket, dense, batches, max_batches=2)
    assert blockprune.recovery_of(found).samples == 8
    assert same(state(found), state(blockprune.recover(ticket, dense, batches[:2])))


def test_training_mode_computes_about_what_evaluation_mode_does() -> None:
    """The normalisation behind a fit has the statistics of what it is given."""
    dense, ticket, x = cut()
    found = blockprune.recover(ticket, dense, x)
    norm = found.get_submodule("blocks.1.behind")
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found(x)
    mean, variance = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    dense, x = built("post-activation").to(dtype), images().to(dtype)
    ticket = blockprune.remove_blocks(dense, "blocks.2", x[:2])
    found = blockprune.recover(ticket, dense, x)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.residual_after < 0.5 * gap.residual_before
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert (found(x) - dense(x)).norm() < (ticket(x) - dense(x)).norm()


def test_prune_recovers_in_one_call() -> None:
    dense, x = built("batch norm"), images()
    ticket = blockprune.prune(
        dense, "l1", p=2, data=iter([(x, torch.zeros(24).long())]), recover="refit"
    )
    record = blockprune.recovery_of(ticket)
    assert record.method == "refit"
    plain = blockprune.prune(dense, "l1", p=2, example_inputs=x[:2])
    assert blockprune.plan_of(ticket).remove == blockprune.plan_of(plain).remove
    assert (ticket(x) - dense(x)).norm() < (plain(x) - dense(x)).norm()


# --- transformers -------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, padded: Tensor | None) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=padded, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Layer() for _ in range(4)])
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, attention_mask == 0)
        return self.head(x)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer().double().eval()


def texts(padding: int = 0, fill: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (16, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids, mask = F.pad(ids, (0, padding), value=fill), F.pad(mask, (0, padding))
    return {"ids": ids, "attention_mask": mask}


GONE = ["layers.2.attention", "layers.2.up"]


def first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:2] for name, value in batch.items()}


@pytest.mark.parametrize(
    ("gone", "weight"),
    [
        (GONE, "layers.1.down.weight"),
        (["layers.1.up"], "layers.1.attention.out_proj.weight"),
        (["layers.0.attention"], None),
    ],
)
def test_a_branch_of_a_transformer(gone: list[str], weight: str | None) -> None:
    dense, batch = transformer(), texts()
    names = blockprune.find_blocks(dense, first(batch)).names
    assert set(gone) <= set(names)
    ticket = blockprune.remove_blocks(dense, gone, first(batch))
    found = blockprune.recover(ticket, dense, batch, ridge=0.0)
    [gap] = blockprune.recovery_of(found).gaps
    assert gap.weights == (() if weight is None else (weight,))
    if weight is None:
        # An embedding is no linear operation: what is left is said, and nothing changes.
        assert gap.residual_after == gap.residual_before
        assert same(state(found), state(ticket))
        return
    assert gap.residual_after < 0.9 * gap.residual_before
    # The optimum: no small change of the weight makes the stream any better.
    assert _is_stationary(found, dense, batch, weight)


def _is_stationary(
    found: nn.Module, dense: nn.Module, batch: dict[str, Tensor], weight: str
) -> bool:
    streams: list[Tensor] = []
    for model in (dense, found):
        own = transformer()
        own.load_state_dict(model.state_dict(), strict=False)
        gone = set(own.state_dict()) - set(model.state_dict())
        with torch.no_grad():
            for name in gone:
                own.state_dict()[name].zero_()
        parameter = own.get_parameter(weight)
        index = int(weight.split(".")[1])
        layer = own.layers[index + 1 if weight.endswith("down.weight") else index]
        layer.register_forward_hook(lambda _, args, output: streams.append(output))
        own(**batch)
    loss = (streams[1] - streams[0].detach()).square().sum()
    size = float(loss.detach())
    [gradient] = torch.autograd.grad(loss, parameter)
    return float(gradient.abs().max()) < 1e-7 * size


def test_padding_changes_nothing() -> None:
    dense = transformer()
    ticket = blockprune.remove_blocks(dense, GONE, first(texts()), verify=False)
    wanted = state(blockprune.recover(ticket, dense, texts(), ridge=1e-3))
    for fill in (0, 7):
        found = state(blockprune.recover(ticket, dense, texts(4, fill), ridge=1e-3))
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def test_a_mask_function_says_what_counts() -> None:
    dense = transformer()
    ticket = blockprune.remove_blocks(dense, GONE, first(texts()), verify=False)

    def half(call: Any) -> Tensor:
        return call.kwargs["attention_mask"] * (torch.arange(9) < 4)

    found = blockprune.recover(ticket, dense, texts(), ridge=1e-3, mask_fn=half)
    plain = blockprune.recover(ticket, dense, texts(), ridge=1e-3)
    assert not same(state(found), state(plain))
    with pytest.raises(RecoveryError, match=r"\(samples, positions\)"):
        blockprune.recover(ticket, dense, texts(), mask_fn=lambda call: torch.ones(16))


def test_a_mask_that_is_passed_by_position_counts_as_well() -> None:
    dense, padded = transformer(), texts(4, 7)
    few = tuple(first(padded).values())
    ticket = blockprune.remove_blocks(dense, GONE, few, verify=False)
    named = blockprune.recover(ticket, dense, padded, ridge=1e-3)
    data = [(tuple(padded.values()), None)]
    assert same(state(named), state(blockprune.recover(ticket, dense, data, ridge=1e-3)))


def test_tokens_that_dwarf_all_others_do_not_decide() -> None:
    dense = transformer()
    ticket = blockprune.remove_blocks(dense, GONE, first(texts()), verify=False)
    with torch.no_grad():
        for model in (dense, ticket):
            model.embed.weight[0] = 1e4
    batch = texts()
    batch["ids"][:, 0] = 0
    batch["ids"][:, 1:].clamp_(min=1)
    found = blockprune.recover(ticket, dense, batch, ridge=1e-3)
    kept = blockprune.recover(
        ticket, dense, batch, ridge=1e-3, mask_fn=lambda call: (call.kwargs["ids"] != 0).double()
    )
    for name, value in state(kept).items():
        torch.testing.assert_close(state(found)[name], value, rtol=1e-9, atol=1e-12)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "magic"}, RecoveryError, "there are norms, refit, map, scale"),
        ({"ridge": -1.0}, RecoveryError, "at least 0"),
        ({"ridge": math.nan}, RecoveryError, "at least 0"),
        ({"max_batches": 0}, DataError, "at least 1"),
        ({"data": []}, DataError, "empty"),
        ({"data": images()[:, :2]}, Exception, "channels"),
        ({"data": images(1)[..., :3, :3], "ridge": 0.0}, RecoveryError, "Pass more samples"),
        ({"data": images() * math.inf}, RecoveryError, "not finite"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], match: str) -> None:
    dense, ticket, x = cut()
    before = state(ticket)
    with pytest.raises(error, match=match):
        blockprune.recover(ticket, dense, options.pop("data", x), in_place=True, **options)
    assert same(state(ticket), before)
    assert blockprune.recovery_of(ticket) is None


def test_a_ticket_and_a_model_that_do_not_belong_together() -> None:
    dense, ticket, x = cut()
    with pytest.raises(StalePlanError, match="another structure"):
        blockprune.recover(ticket, built("linear"), x)
    with pytest.raises(RecoveryError, match="not a ticket"):
        blockprune.recover(dense, dense, x)
    with pytest.raises(RecoveryError, match="not a ticket"):
        blockprune.recovery_of(dense)
    with pytest.raises(RecoveryError, match="needs data"):
        blockprune.prune(resnet20(), "l1", p=1, recover="refit")


def test_a_model_without_linear_operations_in_front_is_left_and_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*[copy.deepcopy(built("pre-activation").blocks[0])] * 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(torch.cat([x, x], dim=1))

    dense, x = Odd().double().eval(), images()
    ticket = blockprune.remove_blocks(dense, "blocks.0", x[:2])
    [gap] = blockprune.recovery_of(blockprune.recover(ticket, dense, x)).gaps
    assert gap.weights == ()
    assert gap.ridge is None
