"""Dtypes: a ticket that is moved to another dtype asks about it anew, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.recording.law import Trial, right_or_refused, right_where
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


def moved(dtype: torch.dtype, train: bool = False) -> Trial:
    """Return a trial in which model and features are of another dtype."""
    inputs = (features(3, 4).to(dtype), padded(3, 4))
    return Trial(inputs, train, prepare=lambda module: module.to(dtype))


TRIALS = [moved(torch.bfloat16), moved(torch.double, train=True), moved(torch.half)]

# --------------------------------------------------- only handed on, which must be right


def handed_to_to(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask[..., None].to(x.dtype)


def handed_to_a_constructor(x: Tensor, mask: Tensor) -> Tensor:
    return x + torch.ones(x.shape[1], 1, dtype=x.dtype) + torch.zeros(1, dtype=x.dtype)


def handed_to_arange(x: Tensor, mask: Tensor) -> Tensor:
    return x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]


def made_like(x: Tensor, mask: Tensor) -> Tensor:
    return x + x.new_full((1,), 0.5) + torch.ones_like(x) + mask.new_zeros(1).type_as(x)


def raised_and_lowered(x: Tensor, mask: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def kept_in_a_variable(x: Tensor, mask: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    return x.softmax(-1).to(dtype)


def softmax_with_a_dtype(x: Tensor, mask: Tensor) -> Tensor:
    return functional.softmax(x, -1, dtype=torch.float32).to(x.dtype)


def as_another(x: Tensor, mask: Tensor) -> Tensor:
    return mask[..., None].to(x) * x.type(x.dtype)


def summed_in(x: Tensor, mask: Tensor) -> Tensor:
    return x + x.sum(1, keepdim=True, dtype=torch.float32).to(dtype=x.dtype)


HANDED_ON: list[Act] = [
    handed_to_to,
    handed_to_a_constructor,
    handed_to_arange,
    made_like,
    raised_and_lowered,
    kept_in_a_variable,
    softmax_with_a_dtype,
    as_another,
    summed_in,
]


@on_hosts(HANDED_ON, "block")
def test_a_dtype_that_is_handed_on(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


@on_hosts([handed_to_to, raised_and_lowered, handed_to_a_constructor], "root", "child")
def test_a_dtype_that_is_handed_on_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right")


# --------------------------------------------------------------------- questions

HALF = {torch.float16, torch.bfloat16}


def in_a_set(x: Tensor, mask: Tensor) -> Tensor:
    return x.clamp(-0.1, 0.1) if x.dtype in HALF else x


def in_a_tuple(x: Tensor, mask: Tensor) -> Tensor:
    return x.clamp(-0.1, 0.1) if x.dtype in (torch.half, torch.bfloat16, torch.double) else x


def same_object(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 else x * 10


def other_object(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.dtype is not torch.float32 else x


def equal(x: Tensor, mask: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        return x.clip(-0.1, 0.1)
    return x


def unequal(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.dtype != torch.float32 else x


def key_of_a_dict(x: Tensor, mask: Tensor) -> Tensor:
    return x * {torch.float32: 1.0, torch.bfloat16: 5.0}.get(x.dtype, 9.0)


def least_number(x: Tensor, mask: Tensor) -> Tensor:
    floor = torch.finfo(x.dtype).min
    bias = (1 - mask[:, None, :].to(x.dtype)) * floor
    return (x @ x.transpose(1, 2) * 0.1 + bias).softmax(-1) @ x


def filled_with_the_least_number(x: Tensor, mask: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2) * 0.1
    scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ x


def smallest_step(x: Tensor, mask: Tensor) -> Tensor:
    return x / (x.abs() + torch.finfo(x.dtype).eps ** 0.5)


def bits_of(x: Tensor, mask: Tensor) -> Tensor:
    return x * (torch.finfo(x.dtype).bits / 32) + x.element_size() + x.dtype.itemsize


def type_as_text(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.type() == "torch.FloatTensor" else x * 10


def dtype_as_text(x: Tensor, mask: Tensor) -> Tensor:
    return x if str(x.dtype) == "torch.float32" else x * 10


def formatted(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if f"{x.dtype}".endswith("16") else x


def legacy_class(x: Tensor, mask: Tensor) -> Tensor:
    return x if isinstance(x, torch.FloatTensor) else x * 10


def match_of_a_dtype(x: Tensor, mask: Tensor) -> Tensor:
    match x.dtype:
        case torch.float32:
            return x
        case torch.float64:
            return x * 3
        case _:
            return x * 10


def half_precision(x: Tensor, mask: Tensor) -> Tensor:
    return x * 10 if x.dtype.is_floating_point and x.dtype.itemsize < 4 else x


def promoted(x: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x if wide == x.dtype and wide is torch.float32 else x * 10


def result_type(x: Tensor, mask: Tensor) -> Tensor:
    return x if torch.result_type(x, mask) == torch.float32 else x * 10


def default_dtype(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.dtype == torch.get_default_dtype() else x * 10


def infinite(x: Tensor, mask: Tensor) -> Tensor:
    if x.dtype == torch.float16 and torch.isinf(x).any():
        return x.clamp(-100, 100)
    return x * 2


QUESTIONS: list[Act] = [
    in_a_set,
    in_a_tuple,
    same_object,
    other_object,
    equal,
    unequal,
    key_of_a_dict,
    least_number,
    filled_with_the_least_number,
    smallest_step,
    bits_of,
    type_as_text,
    dtype_as_text,
    formatted,
    legacy_class,
    match_of_a_dtype,
    half_precision,
    promoted,
    result_type,
    default_dtype,
    infinite,
]


@on_hosts(QUESTIONS, "block")
def test_a_question_is_asked_again_or_refused(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right_or_refused")


@on_hosts(
    [in_a_set, same_object, least_number, type_as_text, equal],
    *("removed", "child", "root", "kept_root"),
)
def test_a_question_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, TRIALS, demand="right_or_refused")


@pytest.mark.parametrize("act", [in_a_set, same_object, key_of_a_dict], ids=lambda a: a.__name__)
def test_a_model_cut_in_low_precision_and_raised(act: Act) -> None:
    net = Net(Block(act), Block()).bfloat16()
    example = (features().bfloat16(), ones())
    trial = Trial((features(), padded()), prepare=nn.Module.float)
    right_or_refused(net, example, [trial], cut="blocks.1", zero="blocks.1.f")


class ByWeights(Block):
    """Follows the dtype of its own weights, and asks about it in some ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        dtype = self.f.weight.dtype
        if self.how == "next":
            dtype = next(self.parameters()).dtype
        if self.how == "asked" and dtype in HALF:
            x = x * 10
        return x + self.f(x.to(dtype)).to(x.dtype)


@pytest.mark.parametrize("how", ["read", "next", "asked"])
def test_the_dtype_of_a_weight(how: str) -> None:
    net, example = Net(ByWeights(how), Block()), (features(), ones())
    right_where(how != "asked", net, example, TRIALS, cut="blocks.1", zero="blocks.1.f")


class ByMask(nn.Module):
    """Takes masks of several dtypes, as attention does."""

    def __init__(self, ask: str) -> None:
        super().__init__()
        self.ask = ask
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2) * 0.1
        boolean = {
            "is": mask.dtype is torch.bool,
            "equals": mask.dtype == torch.bool,
            "floating": not torch.is_floating_point(mask),
            "method": not mask.is_floating_point(),
        }[self.ask]
        if boolean:
            scores = scores.masked_fill(~mask.bool()[:, None], -1e4)
        else:
            scores = scores + mask[:, None]
        return x + self.f(scores.softmax(-1) @ x)


@pytest.mark.parametrize("ask", ["is", "equals", "floating", "method"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_mask_of_another_dtype(ask: str, preserve_root: bool) -> None:
    right_or_refused(
        Net(ByMask(ask), ByMask(ask)),
        (features(), ones().bool()),
        [
            Trial((features(), padded().bool())),
            Trial((features(), (1 - padded().float()) * -1e4)),
        ],
        cut="blocks.1",
        zero="blocks.1.f",
        preserve_root=preserve_root,
    )
