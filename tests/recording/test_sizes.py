"""Sizes: arithmetic with them stays free, and a question about one is answered anew or refused.

What only computes with sizes must be right on every batch and length. What decides by a size may
be refused where the block around it would be lost otherwise; where the code that decides is in a
child or in the root, which can be called as it is, the ticket has to be right.
"""

from __future__ import annotations

import functools
import math
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from blockprune.errors import TraceError
from tests.recording.law import Trial, right, right_or_refused, right_where
from tests.recording.nets import (
    HOSTS,
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

TRIALS = [
    Trial((features(batch, tokens), padded(batch, tokens)), train)
    for batch, tokens, train in [(1, 9, False), (4, 4, True)]
]

# ------------------------------------------------------------- arithmetic, which must be right


def kept_by_reshape(x: Tensor, mask: Tensor) -> Tensor:
    b, n, c = x.shape
    return x.reshape(b, n * c).view(b, n, c)


def unpacked_into_a_call(x: Tensor, mask: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 2, -1).flip(2).flatten(2)


def unpacked_with_a_number(x: Tensor, mask: Tensor) -> Tensor:
    b, n, _, h = *x.shape, 2
    return x.view(b, n, h, -1).transpose(1, 2).reshape(b, h * n, -1).reshape(b, n, -1)


def unpacked_with_a_star(x: Tensor, mask: Tensor) -> Tensor:
    b, *rest = x.shape
    return x.view(b, -1).view(b, *rest) / rest[0]


def added_to_a_tuple(x: Tensor, mask: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1] + (2, WIDTH // 2)).flatten(-2)  # noqa: RUF005


def joined_of_a_list(x: Tensor, mask: Tensor) -> Tensor:
    return x.view([*x.shape[:2], 2, 4]).view(list(x.size()))


def number_of_dimensions(x: Tensor, mask: Tensor) -> Tensor:
    return x * len(x.shape) / (len(mask.size()) + x.dim() + x.ndim)


def divided_by_the_batch(x: Tensor, mask: Tensor) -> Tensor:
    return x / x.shape[0]


def mean_by_hand(x: Tensor, mask: Tensor) -> Tensor:
    return x - x.sum(1, keepdim=True) / x.size(1)


def power_of_a_size(x: Tensor, mask: Tensor) -> Tensor:
    return x * x.shape[1] ** -0.5 + x.shape[0] ** 2


def powers(x: Tensor, mask: Tensor) -> Tensor:
    return x * 0.5 ** x.shape[1] + pow(x.shape[0], 2) * 2 ** x.size(0)


def count_of_elements(x: Tensor, mask: Tensor) -> Tensor:
    return x * (x.numel() / (mask.numel() + x[0].nelement()))


def count_of_a_shape(x: Tensor, mask: Tensor) -> Tensor:
    return x / mask.shape.numel()


def halves(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1] // 2
    return torch.cat([x[:, n:], x[:, :n]], 1)


def negative_slices(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.cat([x[:, -(n // 2 + 1) :], x[:, : n - n // 2 - 1]], 1)


def every_other(x: Tensor, mask: Tensor) -> Tensor:
    return x + x[:, slice(0, x.shape[1], 2)].mean(1, keepdim=True)


def made_by_size(x: Tensor, mask: Tensor) -> Tensor:
    b, n, c = x.size()
    return x + torch.zeros(n, c) + torch.ones(b, 1, 1) + torch.full((n, 1), 0.5) * torch.eye(n, c)


def positions(x: Tensor, mask: Tensor) -> Tensor:
    return x + torch.arange(x.shape[1], device=x.device)[:, None] * 0.1


def positions_from_the_end(x: Tensor, mask: Tensor) -> Tensor:
    return x + torch.arange(x.shape[1] - 1, -1, -1)[None, :, None] / x.shape[1]


def causal(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    hidden = torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
    return (x @ x.transpose(1, 2) * 0.1 + hidden).softmax(-1) @ x


def split_by_sizes(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    first, second = x.split([n // 2, n - n // 2], 1)
    return torch.cat([second, first], 1)


def divmod_of_a_size(x: Tensor, mask: Tensor) -> Tensor:
    whole, rest = divmod(x.shape[1], 2)
    return x * whole + rest


def remainder(x: Tensor, mask: Tensor) -> Tensor:
    return x * (x.shape[1] % 3 + 1)


def padded_to_a_multiple(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    x = functional.pad(x, (0, 0, 0, -n % 4))
    windows = x.view(x.shape[0], -1, 4, WIDTH)
    return (windows - windows.mean(2, keepdim=True)).flatten(1, 2)[:, :n]


def expanded(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, :1].expand(-1, x.size(1), -1) + x.mean(0).repeat(x.shape[0], 1, 1)


def expanded_to_a_shape(x: Tensor, mask: Tensor) -> Tensor:
    return x * torch.ones(1).expand(x.shape) + torch.zeros_like(x).new_ones(x.shape)


def interpolated(x: Tensor, mask: Tensor) -> Tensor:
    small = functional.adaptive_avg_pool1d(x.transpose(1, 2), 2)
    return functional.interpolate(small, size=x.shape[1], mode="nearest").transpose(1, 2)


def normalised_over_the_last(x: Tensor, mask: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def scaled_by_the_root_of_the_width(x: Tensor, mask: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[-1]) * math.ceil(x.size(-1) / 3)


def asserted_width(x: Tensor, mask: Tensor) -> Tensor:
    assert x.shape[-1] == WIDTH, f"expected {WIDTH} features, got {x.shape[-1]}"
    return x * 2


def asserted_dimensions(x: Tensor, mask: Tensor) -> Tensor:
    if len(x.shape) != 3 or x.ndim == 2:
        raise ValueError(f"expected three dimensions, got {tuple(x.shape)}")
    return x * x.dim()


def agrees_with_the_mask(x: Tensor, mask: Tensor) -> Tensor:
    assert x.shape[:2] == mask.shape
    return x.masked_fill(mask[..., None] == 0, 0.0)


def width_in_a_table(x: Tensor, mask: Tensor) -> Tensor:
    return x * {8: 3.0, 16: 2.0}[x.shape[-1]] + [0, 1, 2, 3][x.dim()]


def width_in_a_loop(x: Tensor, mask: Tensor) -> Tensor:
    for i in range(x.shape[-1] // 4):
        x = x + x.roll(i + 1, -1)
    return x


def zip_of_sizes(x: Tensor, mask: Tensor) -> Tensor:
    assert all(a == b for a, b in zip(x.shape[2:], (WIDTH,), strict=True))
    for _ in range(sum(s % w for s, w in zip(x.shape[2:], (3,), strict=True))):
        x = x * 2
    return x


def chunks_unpacked(x: Tensor, mask: Tensor) -> Tensor:
    a, b, c = (x, *x.chunk(2, -1))
    return a + torch.cat([c, b], -1)


def unbound(x: Tensor, mask: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return torch.cat([b, a], -1)


def tuple_of_two(x: Tensor, mask: Tensor) -> Tensor:
    pair = (x, mask)
    return pair[0] * len(pair)


def number_is_an_int(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    n = n if isinstance(n, int) else 1
    return x / n


def tensor_of_a_size(x: Tensor, mask: Tensor) -> Tensor:
    return x / torch.tensor(x.shape[1], dtype=x.dtype) + x.new_tensor([x.shape[0]])


ARITHMETIC: list[Act] = [
    kept_by_reshape,
    unpacked_into_a_call,
    unpacked_with_a_number,
    unpacked_with_a_star,
    added_to_a_tuple,
    joined_of_a_list,
    number_of_dimensions,
    divided_by_the_batch,
    mean_by_hand,
    power_of_a_size,
    powers,
    count_of_elements,
    halves,
    negative_slices,
    every_other,
    made_by_size,
    positions,
    positions_from_the_end,
    causal,
    split_by_sizes,
    divmod_of_a_size,
    remainder,
    padded_to_a_multiple,
    expanded,
    expanded_to_a_shape,
    interpolated,
    normalised_over_the_last,
    scaled_by_the_root_of_the_width,
    asserted_width,
    asserted_dimensions,
    agrees_with_the_mask,
    width_in_a_table,
    width_in_a_loop,
    zip_of_sizes,
    chunks_unpacked,
    unbound,
    tuple_of_two,
    number_is_an_int,
    tensor_of_a_size,
]


@on_hosts(ARITHMETIC, "block")
def test_arithmetic_is_right_on_every_size(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


@on_hosts(
    [unpacked_into_a_call, power_of_a_size, halves, positions, padded_to_a_multiple],
    *("removed", "root"),
)
def test_arithmetic_is_right_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


def test_no_block_is_lost_to_a_size() -> None:
    net = Net(*[Block(act) for act in ARITHMETIC])
    analysis = blockprune.find_blocks(net, (features(2, 5), ones(2, 5)))
    assert analysis.names == tuple(f"blocks.{i}" for i in range(len(ARITHMETIC)))


# --------------------------------------------------------------------- questions about a size

LOW = {1, 2}
FACTORS = {1: 7.0, 2: 2.0, 3: 5.0}


def in_a_set(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[0] in LOW else x


def in_a_frozenset_of_lengths(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.size(1) in frozenset(range(4, 7)) else x * 10


def in_a_tuple(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[1] in (1, 5) else x


def in_a_range(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[1] in range(3, 6) else x


def key_of_a_dict(x: Tensor, mask: Tensor) -> Tensor:
    return x * FACTORS.get(x.shape[0], 11.0)


def subscript_of_a_dict(x: Tensor, mask: Tensor) -> Tensor:
    return x * {1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}[x.shape[0]]


def index_of_a_list(x: Tensor, mask: Tensor) -> Tensor:
    return x * [0.0, 3.0, 1.0, 2.0, 5.0][x.shape[0]]


def index_of_an_array(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(np.arange(1, 20)[x.shape[1]])


def as_an_int(x: Tensor, mask: Tensor) -> Tensor:
    return x * int(x.shape[1])


def as_a_float(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(x.shape[1])


def as_an_index(x: Tensor, mask: Tensor) -> Tensor:
    return x * operator.index(x.size(0))


def as_a_truth(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[1] - 5 else x


def not_a_truth(x: Tensor, mask: Tensor) -> Tensor:
    return x if not x.shape[0] % 2 else x * 10


def looped_over(x: Tensor, mask: Tensor) -> Tensor:
    for i in range(x.shape[0]):
        x = x + 0.1 * i
    return x


def recurrent(x: Tensor, mask: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for i in range(x.size(1)):
        state = torch.tanh(state + x[:, i])
        states.append(state)
    return torch.stack(states, 1)


def stepped(x: Tensor, mask: Tensor) -> Tensor:
    parts = [x[:, i : i + 2] * (i + 1) for i in range(0, x.shape[1], 2)]
    return torch.cat(parts, 1)


def list_of_that_length(x: Tensor, mask: Tensor) -> Tensor:
    weights = [0.5] * x.shape[1]
    return x * torch.tensor(weights)[:, None] * len(weights)


def formatted(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if f"{x.shape[1]}" == "5" else x


def formatted_by_percent(x: Tensor, mask: Tensor) -> Tensor:
    return x * {"b2": 3.0}.get("b%d" % x.shape[0], 1.0)  # noqa: UP031


def as_text(x: Tensor, mask: Tensor) -> Tensor:
    return x * len(str(x.shape[0] * 4))


def shape_as_text(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if str(tuple(x.shape)).startswith("(2, 5") else x


def length_of_the_batch(x: Tensor, mask: Tensor) -> Tensor:
    return x / len(x)


def rows_of_the_batch(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row / (i + 1) for i, row in enumerate(x)])


def rows_zipped(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row * kept[:, None] for row, kept in zip(x, mask, strict=True)])


def unbound_over_tokens(x: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for i, token in enumerate(x.unbind(1)):
        total = total + token / (i + 1)
    return x + total[:, None]


def split_into_ones(x: Tensor, mask: Tensor) -> Tensor:
    parts = x.split(1, 1)
    return torch.cat(parts[::-1], 1) * len(parts)


def star_of_the_batch(x: Tensor, mask: Tensor) -> Tensor:
    first, *rest = x
    return x + (first + sum(rest)) * (1 + len(rest))


def root_of_a_length(x: Tensor, mask: Tensor) -> Tensor:
    return x / math.sqrt(x.shape[1])


def ceiling_of_a_length(x: Tensor, mask: Tensor) -> Tensor:
    return x * math.ceil(x.shape[1] / 2) + math.floor(x.shape[1] / 3)


def logarithm_of_a_length(x: Tensor, mask: Tensor) -> Tensor:
    return x * math.log(x.shape[1] + 1) + np.sqrt(x.shape[0])


def rounded(x: Tensor, mask: Tensor) -> Tensor:
    return x * round(x.shape[1] * 0.3) + abs(x.shape[0] - 3)


def product_of_sizes(x: Tensor, mask: Tensor) -> Tensor:
    return x / math.prod(x.shape[:2]) + functools.reduce(operator.mul, x.shape[1:])


def sum_of_sizes(x: Tensor, mask: Tensor) -> Tensor:
    return x / sum(x.shape)


def largest(x: Tensor, mask: Tensor) -> Tensor:
    return x * max(x.shape[1], 4) / max(x.shape)


def smallest(x: Tensor, mask: Tensor) -> Tensor:
    return x * min(x.shape[1], 4) + x[:, : min(3, x.shape[1])].sum(1, keepdim=True)


def ordered(x: Tensor, mask: Tensor) -> Tensor:
    return x * sorted([x.shape[1], 4, x.shape[0]])[1]


def bits(x: Tensor, mask: Tensor) -> Tensor:
    return x * ((x.shape[1] & 1) + 1) + (x.shape[0] << 1)


def bit_length(x: Tensor, mask: Tensor) -> Tensor:
    return x * x.shape[1].bit_length()


def compared(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[1] > 4 else x


def compared_in_a_chain(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if 1 < x.shape[0] < 4 else x


def compared_with_another(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[0] < mask.size(1) else x


def compared_with_a_number(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.shape[0] != 2 else x * 10


def parity(x: Tensor, mask: Tensor) -> Tensor:
    if x.shape[1] % 2:
        x = functional.pad(x, (0, 0, 0, 1))
        return (x + x.mean(1, keepdim=True))[:, :-1]
    return x + x.mean(1, keepdim=True)


def padded_if_needed(x: Tensor, mask: Tensor) -> Tensor:
    n = x.shape[1]
    missing = (4 - n % 4) % 4
    if missing > 0:
        x = functional.pad(x, (0, 0, 0, missing))
    windows = x.view(x.shape[0], x.shape[1] // 4, 4, WIDTH)
    windows = windows - windows.mean(2, keepdim=True)
    return windows.flatten(1, 2)[:, :n]


def asserted_length(x: Tensor, mask: Tensor) -> Tensor:
    assert 0 < x.shape[1] <= 9, "too long"
    return x * 2


def shapes_compared(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape[:2] == (2, 5) else x


def shape_unlike(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape != torch.Size([2, 5, WIDTH]) else x


def shape_less_than(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if tuple(x.shape) < (3,) else x


def shape_in_a_set(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if tuple(x.shape) in {(2, 5, WIDTH), (1, 5, WIDTH)} else x


def shape_in_a_list(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.shape in [torch.Size((2, 5, WIDTH))] else x


def size_counted_in_a_shape(x: Tensor, mask: Tensor) -> Tensor:
    return x * x.shape.count(5) + x.shape.index(WIDTH)


def match_of_a_shape(x: Tensor, mask: Tensor) -> Tensor:
    match x.shape:
        case (1, *_):
            return x * 7
        case (_, 5, width):
            return x * width
        case _:
            return x


def match_of_a_size(x: Tensor, mask: Tensor) -> Tensor:
    match x.size(1):
        case 1 | 4:
            return x * 3
        case n if n > 5:
            return x * n
    return x


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.linspace(0, 1, length)[:, None]


def from_a_cached_table(x: Tensor, mask: Tensor) -> Tensor:
    return x + table(x.shape[1])


def or_else(x: Tensor, mask: Tensor) -> Tensor:
    return x * ((x.shape[1] - 5) or 10)


def any_and_all(x: Tensor, mask: Tensor) -> Tensor:
    if all(n > 1 for n in x.shape) and any(n == 5 for n in x.shape):
        return x * 10
    return x


def while_it_is_long(x: Tensor, mask: Tensor) -> Tensor:
    total = x
    while x.shape[1] > 2:
        x = x[:, 2:]
        total = total + x.mean(1, keepdim=True)
    return total


def strides(x: Tensor, mask: Tensor) -> Tensor:
    return x * (x.stride(0) // WIDTH) + x.contiguous().stride()[0] / 8


def bytes_of(x: Tensor, mask: Tensor) -> Tensor:
    return x / (x.nbytes // x.element_size())


def of_a_numpy_shape(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(np.prod(x.shape[:2])) + float(np.asarray(x.shape).max())


def raised_and_caught(x: Tensor, mask: Tensor) -> Tensor:
    try:
        return x.view(2, 5, WIDTH) * 10
    except RuntimeError:
        return x


QUESTIONS: list[Act] = [
    in_a_set,
    in_a_frozenset_of_lengths,
    in_a_tuple,
    in_a_range,
    key_of_a_dict,
    subscript_of_a_dict,
    index_of_a_list,
    index_of_an_array,
    as_an_int,
    count_of_a_shape,
    as_a_float,
    as_an_index,
    as_a_truth,
    not_a_truth,
    looped_over,
    recurrent,
    stepped,
    list_of_that_length,
    formatted,
    formatted_by_percent,
    as_text,
    shape_as_text,
    length_of_the_batch,
    rows_of_the_batch,
    rows_zipped,
    unbound_over_tokens,
    split_into_ones,
    star_of_the_batch,
    root_of_a_length,
    ceiling_of_a_length,
    logarithm_of_a_length,
    rounded,
    product_of_sizes,
    sum_of_sizes,
    largest,
    smallest,
    ordered,
    bits,
    bit_length,
    compared,
    compared_in_a_chain,
    compared_with_another,
    compared_with_a_number,
    parity,
    padded_if_needed,
    asserted_length,
    shapes_compared,
    shape_unlike,
    shape_less_than,
    shape_in_a_set,
    shape_in_a_list,
    size_counted_in_a_shape,
    match_of_a_shape,
    match_of_a_size,
    from_a_cached_table,
    or_else,
    any_and_all,
    while_it_is_long,
    strides,
    bytes_of,
    of_a_numpy_shape,
    raised_and_caught,
]


@on_hosts(QUESTIONS, "block")
def test_a_question_is_asked_again_or_refused(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right_or_refused")


@on_hosts(
    [
        in_a_set,
        in_a_tuple,
        in_a_range,
        key_of_a_dict,
        formatted,
        compared,
        shapes_compared,
        shape_in_a_set,
        match_of_a_size,
        parity,
        any_and_all,
    ],
    *("block", "kept_root"),
)
def test_an_example_that_is_answered_no(act: Act, host: Host) -> None:
    """The example takes the way that what stands for a size could take by mistake."""
    trials = [Trial((features(n, t), padded(n, t))) for n, t in [(2, 5), (1, 4)]]
    hold(act, host, trials, (features(6, 8), ones(6, 8)), demand="right_or_refused")


@on_hosts(
    [in_a_set, key_of_a_dict, formatted, length_of_the_batch, parity, match_of_a_shape],
    *("removed", "child", "root", "kept_root"),
)
def test_a_question_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right_or_refused")


@pytest.mark.parametrize("host", ["removed", "child", "root", "kept_root"])
def test_a_recurrence_elsewhere(host: str) -> None:
    """It adds tensors of one shape, so that it is looked into and its length guarded."""
    where = HOSTS[host]
    right_or_refused(
        where.build(recurrent),
        (features(), ones()),
        TRIALS,
        cut=where.cut,
        zero=f"{where.cut}.f",
        preserve_root=where.preserve_root,
    )


def test_blocks_that_ask_are_found() -> None:
    """A size is no reason to give up a block: its answer is guarded where it cannot be free."""
    asking = [in_a_set, key_of_a_dict, as_an_int, looped_over, compared, parity, shapes_compared]
    net = Net(*[Block(act) for act in asking])
    analysis = blockprune.find_blocks(net, (features(), ones()))
    assert analysis.names == tuple(f"blocks.{i}" for i in range(len(asking)))


@pytest.mark.parametrize("act", [in_a_set, as_an_int, compared, index_of_a_list])
def test_what_is_refused_is_named(act: Act) -> None:
    """A guard names the line, the value that it was cut with and the one that came."""
    net, example = Net(Block(act), Block()), (features(2, 5), ones(2, 5))
    for batch, tokens in ((4, 5), (2, 3)):
        [*refusals] = right_or_refused(
            net,
            example,
            [Trial((features(batch, tokens), ones(batch, tokens)))],
            cut="blocks.1",
            zero="blocks.1.f",
        )
        for refusal in refusals:
            assert isinstance(refusal, TraceError)
            assert Path(__file__).name in str(refusal) or act.__name__ in str(refusal)
            was, came = (2, 4) if batch == 4 else (5, 3)
            assert str(was) in str(refusal)
            assert str(came) in str(refusal)


class Windows(nn.Module):
    """Convolves over windows of an image, as hierarchical transformers do."""

    def __init__(self, ask: bool) -> None:
        super().__init__()
        self.ask = ask
        self.f = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        right_, bottom = -w % 4, -h % 4
        y = x
        if not self.ask or right_ or bottom:
            y = functional.pad(x, (0, right_, 0, bottom))
        hp, wp = y.shape[-2:]
        y = y.view(b, c, hp // 4, 4, wp // 4, 4).permute(0, 2, 4, 1, 3, 5)
        y = y - y.mean((-1, -2), keepdim=True)
        y = y.permute(0, 3, 1, 4, 2, 5).reshape(b, c, hp, wp)[:, :, :h, :w]
        return x + self.f(y)


@pytest.mark.parametrize("example", [(8, 8), (7, 5)], ids=str)
@pytest.mark.parametrize("ask", [False, True])
def test_windows_of_an_image(ask: bool, example: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Windows(ask), Windows(ask), Windows(ask))
    trials = [Trial(torch.rand(n, 3, h, w)) for n, h, w in [(1, 8, 8), (2, 7, 5), (3, 4, 9)]]
    right_where(not ask, net, torch.rand(2, 3, *example), trials, cut="2", zero="2.f")


class Ranks(nn.Module):
    """Adds the batch that an unbatched input lacks, and takes it away again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        alone = x.dim() == 2
        if alone:
            x = x[None]
        x = self.net(x)
        return x[0] if alone else x


@pytest.mark.parametrize("preserve_root", [False, True])
def test_an_input_without_a_batch(preserve_root: bool) -> None:
    right_where(
        preserve_root,
        Ranks(),
        features(),
        [Trial(features()[0]), Trial(features(3, 2))],
        cut="net.blocks.1",
        zero="net.blocks.1.f",
        preserve_root=preserve_root,
    )


class Halves:
    """A library: how it splits a length it keeps in a cache, which the model does not see."""

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of(n: int) -> tuple[int, int]:
        return n // 2, n - n // 2

    @staticmethod
    @functools.cache
    def listed(n: int, *, of: str) -> list[int]:
        return [n - 1, n]


LIBRARY = [Halves]


class Turning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = LIBRARY[0].of(x.shape[1])
        last = LIBRARY[0].listed(x.shape[1], of="tokens")[1]
        turned = torch.cat([x[:, second:last], x[:, :second]], 1)
        return self.f(turned.reshape(len(x), first + second, -1))


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = Turning()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(x)


def test_no_size_stays_in_a_cache_of_a_library() -> None:
    model = nn.Sequential(Turned(), Turned())
    assert blockprune.find_blocks(model, features()).names == ("0", "1")
    assert [type(n) for n in (*Halves.of(5), *Halves.listed(5, of="tokens"))] == [int] * 4
    for x in (features(), features(3, 4)):
        assert model(x).shape == x.shape
    right(model, features(), [Trial(features(3, 4)), Trial(features())], cut="1", zero="1.g.f")


@functools.cache
def parted(n: int) -> tuple[int, int]:
    return n // 2, n - n // 2


@functools.cache
def drawn(n: int) -> Tensor:
    return torch.rand(n, 1)


class Parted(nn.Module):
    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        first, second = parted(x.shape[1])
        y = self.f(torch.cat([x[:, second:], x[:, :second]], 1))
        return x + y.reshape(x.shape[0], first + second, -1) * (
            drawn(x.shape[1]) if self.draws else 1
        )


def test_a_cached_function_of_sizes_is_computed_anew() -> None:
    model = nn.Sequential(Parted(False), Parted(False))
    for _ in range(3):
        assert blockprune.find_blocks(model, features()).names == ("0", "1")
        model(features())
    right(model, features(), [Trial(features(3, 4)), Trial(features())], cut="1", zero="1.f")
    assert type(parted(5)[0]) is int
    assert type(parted) is type(drawn)


def test_a_cached_tensor_is_drawn_once_for_all() -> None:
    model = nn.Sequential(Parted(True), Parted(False), Parted(True))
    right_or_refused(
        model, features(), [Trial(features()), Trial(features(3, 4))], cut="1", zero="1.f"
    )
