"""Numbers in tensors: what a forward decides by them is decided anew on every call.

A module that reads a number is called and not looked into, and its children are looked into for
themselves, so that the ticket has to be right wherever the block that goes is another one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.recording.law import Trial, right
from tests.recording.nets import (
    WIDTH,
    Act,
    Block,
    Host,
    Net,
    features,
    hold,
    on_hosts,
    ones,
    padded,
)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask[:, :, None] == 0, -3.0)


def if_all(x: Tensor, mask: Tensor) -> Tensor:
    return x if mask.all() else masked(x, mask)


def if_not_all(x: Tensor, mask: Tensor) -> Tensor:
    if not torch.all(mask == 1):
        x = masked(x, mask)
    return x


def if_any(x: Tensor, mask: Tensor) -> Tensor:
    return masked(x, mask) if (mask == 0).any() else x


def if_bool_of(x: Tensor, mask: Tensor) -> Tensor:
    return masked(x, mask) if bool(mask.eq(0).any()) else x


def and_or(x: Tensor, mask: Tensor) -> Tensor:
    padding = mask.min() == 0 and mask.max() == 1
    return masked(x, mask) if padding or mask.sum() < 3 else x


def conditional_expression(x: Tensor, mask: Tensor) -> Tensor:
    used = None if mask.bool().all() else mask
    return x if used is None else masked(x, used)


def item(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.sum().item()


def item_compared(x: Tensor, mask: Tensor) -> Tensor:
    return x if mask.float().mean().item() == 1 else masked(x, mask)


def as_a_float(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(mask.sum())


def as_an_int(x: Tensor, mask: Tensor) -> Tensor:
    return x * int(mask.sum(1).min())


def as_a_list(x: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1).tolist()
    return torch.stack([row / n for row, n in zip(x, lengths, strict=True)])


def as_an_array(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(mask.numpy().sum()) + float(np.asarray(mask).min())


def array_of_features(x: Tensor, mask: Tensor) -> Tensor:
    return x * (1 + float(np.abs(x.detach().cpu().numpy()).max() > 2.5))


def through_numpy(x: Tensor, mask: Tensor) -> Tensor:
    return masked(x, torch.from_numpy(1 - (1 - mask.numpy())))


def new_tensor_of_numbers(x: Tensor, mask: Tensor) -> Tensor:
    return masked(x, torch.tensor([[int(n) for n in row] for row in mask]))


def longest(x: Tensor, mask: Tensor) -> Tensor:
    length = int(mask.sum(1).max())
    mean = x[:, :length].mean(1, keepdim=True)
    return x - mean


def slice_by_a_tensor(x: Tensor, mask: Tensor) -> Tensor:
    return x - x[:, : mask.sum(1).min()].mean(1, keepdim=True)


def index_of_a_list(x: Tensor, mask: Tensor) -> Tensor:
    return x * [0, 1, 2, 3, 4, 5, 6, 7, 8][mask[0].sum()]


def as_an_index(x: Tensor, mask: Tensor) -> Tensor:
    return x * operator.index(mask[0].sum())


def key_of_a_dict(x: Tensor, mask: Tensor) -> Tensor:
    return x * {5: 1.0, 3: 7.0}.get(int(mask[0].sum()), 2.0)


def looped_over_a_tensor(x: Tensor, mask: Tensor) -> Tensor:
    for n in mask.sum(1):
        x = x * 2 if n > 4 else x / 2
    return x


def range_of_a_tensor(x: Tensor, mask: Tensor) -> Tensor:
    for i in range(int(mask[0].sum())):
        x = x + 0.1 * i
    return x


def while_it_is_large(x: Tensor, mask: Tensor) -> Tensor:
    steps = mask[0].sum()
    while steps > 0:
        x, steps = x * 0.8, steps - 1
    return x


def formatted(x: Tensor, mask: Tensor) -> Tensor:
    return x if f"{mask.min()}" == "1" else masked(x, mask)


def as_text(x: Tensor, mask: Tensor) -> Tensor:
    return x if "0" not in str(mask) else masked(x, mask)


def equal_to(x: Tensor, mask: Tensor) -> Tensor:
    return x if torch.equal(mask, torch.ones_like(mask)) else masked(x, mask)


def close_to(x: Tensor, mask: Tensor) -> Tensor:
    same = torch.allclose(mask.float(), torch.ones(mask.shape))
    return x if same else masked(x, mask)


def is_nonzero(x: Tensor, mask: Tensor) -> Tensor:
    return x if torch.is_nonzero(mask.min()) else masked(x, mask)


def contains(x: Tensor, mask: Tensor) -> Tensor:
    return masked(x, mask) if 0 in mask else x


def math_of_a_tensor(x: Tensor, mask: Tensor) -> Tensor:
    return x / math.sqrt(mask.sum()) * max(mask.sum(), 3) * round(float(mask.float().mean()), 1)


def asserted(x: Tensor, mask: Tensor) -> Tensor:
    assert mask.max() <= 1, "no mask"
    assert not torch.isnan(x).any()
    return masked(x, mask)


def raised(x: Tensor, mask: Tensor) -> Tensor:
    if (mask.sum(1) == 0).any():
        raise ValueError("an empty row")
    return masked(x, mask)


def number_of_padded(x: Tensor, mask: Tensor) -> Tensor:
    return x * (1 + len((mask == 0).nonzero()))


def found_places(x: Tensor, mask: Tensor) -> Tensor:
    rows, tokens = torch.where(mask == 0)
    if rows.numel() == 0:
        return x
    x = x.clone()
    x[rows, tokens] = -3.0
    return x


def packed(x: Tensor, mask: Tensor) -> Tensor:
    """Work on the tokens that are no padding, in one row."""
    keep = mask.bool()
    out = torch.zeros_like(x)
    out[keep] = x[keep] * x[keep].shape[0]
    return out


def packed_by_index(x: Tensor, mask: Tensor) -> Tensor:
    places = mask.flatten().nonzero().flatten()
    tokens = x.flatten(0, 1)[places]
    tokens = tokens - tokens.mean(0)
    return torch.zeros_like(x.flatten(0, 1)).index_copy(0, places, tokens).view(x.shape)


def distinct(x: Tensor, mask: Tensor) -> Tensor:
    return x * len(mask.unique()) + mask.flatten().unique().sum()


def repeated(x: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1)
    rows = torch.repeat_interleave(lengths)
    return x + x[rows].mean(0) * rows.numel()


def switched(x: Tensor, mask: Tensor) -> Tensor:
    match mask.sum().item():
        case 10:
            return x
        case n if n < 8:
            return x * 5
        case _:
            return masked(x, mask)


def of_the_features(x: Tensor, mask: Tensor) -> Tensor:
    return x / 10 if x.abs().max() > 3 else x


def moving_mean(x: Tensor, mask: Tensor) -> Tensor:
    return x * 3 if x.mean().item() > 0 else x


ACTS: list[Act] = [
    if_all,
    if_not_all,
    if_any,
    if_bool_of,
    and_or,
    conditional_expression,
    item,
    item_compared,
    as_a_float,
    as_an_int,
    as_a_list,
    as_an_array,
    array_of_features,
    through_numpy,
    new_tensor_of_numbers,
    longest,
    slice_by_a_tensor,
    index_of_a_list,
    as_an_index,
    key_of_a_dict,
    looped_over_a_tensor,
    range_of_a_tensor,
    while_it_is_large,
    formatted,
    as_text,
    equal_to,
    close_to,
    is_nonzero,
    contains,
    math_of_a_tensor,
    asserted,
    raised,
    number_of_padded,
    found_places,
    packed,
    packed_by_index,
    distinct,
    repeated,
    switched,
    of_the_features,
    moving_mean,
]

TRIALS = [
    Trial((features(), padded())),
    Trial((features(3, 6, seed=1) * 3, padded(3, 6)), train=True),
]


@on_hosts(ACTS, "block")
def test_a_number_is_read_anew(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


@on_hosts(
    [if_all, conditional_expression, item, as_an_array, longest, packed, as_text, moving_mean],
    *("stream", "child", "root", "kept_root"),
)
def test_a_number_is_read_anew_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


@on_hosts([if_all, item, longest, packed, through_numpy, contains], "removed")
def test_a_number_read_in_what_goes(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right_or_refused")


@pytest.mark.parametrize("act", [if_all, item, as_text], ids=lambda act: act.__name__)
def test_the_other_way_round(act: Act) -> None:
    """The example is padded, and a later mask is not."""
    net = Net(Block(act), Block())
    trials = [Trial((features(), ones()))]
    right(net, (features(), padded()), trials, cut="blocks.1", zero="blocks.1.f")


class Reads(nn.Module):
    """A root that makes the mask that its layers get, as models of language do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Block(bias_added) for _ in range(3)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.stem(torch.nn.functional.one_hot(input_ids, WIDTH).float())
        bias = None
        if attention_mask is not None and not (self.how == "all" and attention_mask.all()):
            bias = (1.0 - attention_mask[:, None, :].float()) * -1e4
        if self.how == "item" and attention_mask is not None:
            x = x / attention_mask.sum().item()
        for layer in self.layers:
            x = layer(x, bias)
        return {"last": x, "pooled": x.mean(1)}


def bias_added(x: Tensor, bias: Tensor | None) -> Tensor:
    scores = x @ x.transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ x


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("how", ["all", "item", "never"])
def test_a_mask_made_by_the_root(how: str, preserve_root: bool) -> None:
    ids = torch.tensor([[1, 4, 2, 7, 0], [3, 3, 5, 1, 6]])
    right(
        Reads(how),
        {"input_ids": ids, "attention_mask": ones()},
        [
            Trial({"input_ids": ids, "attention_mask": padded()}),
            Trial({"input_ids": ids[:, :3].repeat(2, 1), "attention_mask": padded(4, 3)}),
        ],
        cut=["layers.0", "layers.2"],
        zero=["layers.0.f", "layers.2.f"],
        preserve_root=preserve_root,
    )


@pytest.mark.parametrize("preserve_root", [False, True])
def test_blocks_under_a_root_that_reads_are_found(preserve_root: bool) -> None:
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": ones()}
    analysis = blockprune.find_blocks(Reads("all"), inputs, preserve_root=preserve_root)
    assert analysis.names == ("layers.0", "layers.1", "layers.2")


class Experts(nn.Module):
    """A mixture of experts: each is called with the tokens that it is given, if any."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            places = (chosen == i).nonzero().flatten()
            if self.skip and places.numel() == 0:
                continue
            out.index_add_(0, places, expert(flat[places]))
        return out.view_as(x)


class Sparse(nn.Module):
    """A block whose branch ends in a mixture of experts."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.moe = Experts(skip)
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.moe(x))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("which", ["0", "1", "2"])
def test_experts(skip: bool, which: str) -> None:
    net = nn.Sequential(Sparse(skip), Sparse(skip), Sparse(skip))
    trials = [Trial(features(1, 1)), Trial(features(3, 7, seed=2))]
    right(net, features(), trials, cut=which, zero=f"{which}.f")


class Halting(nn.Module):
    """Stops at a layer that depends on the features, and tells at which."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor, limit: float = 10.0) -> dict[str, Any]:
        used = 0
        for layer in self.layers:
            if x.abs().max().item() > limit:
                break
            x, used = layer(x), used + 1
        return {"x": x, "layers": used}


@pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")
@pytest.mark.parametrize("preserve_root", [False, True])
def test_early_exit(preserve_root: bool) -> None:
    right(
        Halting(),
        features(),
        [Trial(features() * 100), Trial(features() * 3)],
        cut="layers.1",
        zero="layers.1.f",
        preserve_root=preserve_root,
    )
