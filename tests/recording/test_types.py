"""What a tensor is: a forward that asks for a type gets the answer of an eager run.

Each act lets the mask in by a test of a type. The mask of the example masks nothing, so that a
wrong answer shows in no proof on the example.
"""

from __future__ import annotations

import collections.abc
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.recording.law import Trial, right
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


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask[:, :, None] == 0, -3.0)


def isinstance_of_tensor(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask, Tensor) else x


def isinstance_of_several(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask, (list, Tensor)) else x


def isinstance_of_union(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask, Tensor | None) else x


def not_isinstance(x: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, torch.Tensor):
        return x
    return masked(x, mask)


def type_is(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if type(mask) is Tensor else x


def type_equals(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if type(mask) == Tensor else x  # noqa: E721


def type_in_a_tuple(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if type(mask) in (Tensor, nn.Parameter) else x


def type_in_a_dict(x: Tensor, mask: Any) -> Tensor:
    apply = {Tensor: masked}.get(type(mask))
    return apply(x, mask) if apply else x


def class_attribute(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if mask.__class__ is Tensor else x


def name_of_the_type(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if type(mask).__name__ == "Tensor" else x


def issubclass_of_tensor(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if issubclass(type(mask), Tensor) else x


def match_of_class(x: Tensor, mask: Any) -> Tensor:
    match mask:
        case Tensor():
            return masked(x, mask)
        case _:
            return x


def match_of_attributes(x: Tensor, mask: Any) -> Tensor:
    match mask:
        case Tensor(ndim=2):
            return masked(x, mask)
        case Tensor(ndim=3) | None:
            return x * 2
    return x


def is_tensor(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if torch.is_tensor(mask) else x


def is_tensor_of_features(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if torch.is_tensor(x) else x


def has_method(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if hasattr(mask, "masked_fill") else x


def has_no_such_attribute(x: Tensor, mask: Any) -> Tensor:
    return x if hasattr(mask, "lengths") else masked(x, mask)


def has_note(x: Tensor, mask: Any) -> Tensor:
    return x if getattr(mask, "is_nested_list", False) else masked(x, mask)


def attribute_error(x: Tensor, mask: Any) -> Tensor:
    try:
        return x * mask.data_of_a_batch
    except AttributeError:
        return masked(x, mask)


def protocol(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask, collections.abc.Sized) else x


def not_a_parameter(x: Tensor, mask: Any) -> Tensor:
    return x if isinstance(mask, nn.Parameter) else masked(x, mask)


def not_a_sequence(x: Tensor, mask: Any) -> Tensor:
    return x if isinstance(mask, collections.abc.Sequence) else masked(x, mask)


def callable_attribute(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if callable(getattr(mask, "bool", None)) else x


@functools.singledispatch
def dispatched(mask: Any, x: Tensor) -> Tensor:
    return x


@dispatched.register
def _(mask: Tensor, x: Tensor) -> Tensor:
    return masked(x, mask)


def single_dispatch(x: Tensor, mask: Any) -> Tensor:
    return dispatched(mask, x)


def size_is_an_int(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask.shape[0], int) else x


def shape_is_a_size(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask.shape, torch.Size) else x


def shape_is_a_tuple(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask.size(), tuple) else x


def dtype_is_a_dtype(x: Tensor, mask: Any) -> Tensor:
    return masked(x, mask) if isinstance(mask.dtype, torch.dtype) else x


def result_is_a_tensor(x: Tensor, mask: Any) -> Tensor:
    keep = mask.bool()
    return masked(x, keep) if isinstance(keep, Tensor) and not isinstance(keep, tuple) else x


def chunks_are_a_tuple(x: Tensor, mask: Any) -> Tensor:
    parts = x.chunk(2, -1)
    return masked(torch.cat(parts, -1), mask) if isinstance(parts, tuple) else x


def comparison_is_a_tensor(x: Tensor, mask: Any) -> Tensor:
    gone = mask == 0
    return x.masked_fill(gone[:, :, None], -3.0) if torch.is_tensor(gone) else x


ACTS: list[Act] = [
    isinstance_of_tensor,
    isinstance_of_several,
    isinstance_of_union,
    not_isinstance,
    type_is,
    type_equals,
    type_in_a_tuple,
    type_in_a_dict,
    class_attribute,
    name_of_the_type,
    issubclass_of_tensor,
    match_of_class,
    match_of_attributes,
    is_tensor,
    is_tensor_of_features,
    has_method,
    has_no_such_attribute,
    has_note,
    attribute_error,
    protocol,
    not_a_parameter,
    not_a_sequence,
    callable_attribute,
    single_dispatch,
    size_is_an_int,
    shape_is_a_size,
    shape_is_a_tuple,
    dtype_is_a_dtype,
    result_is_a_tensor,
    chunks_are_a_tuple,
    comparison_is_a_tensor,
]

LATER = [
    Trial((features(), padded())),
    Trial((features(4, 7), padded(4, 7))),
    Trial((features(), padded()), train=True),
]


@on_hosts(ACTS, "block", "root")
def test_the_mask_is_not_overlooked(act: Act, host: Host) -> None:
    hold(act, host, LATER, demand="right")


@on_hosts(
    [isinstance_of_tensor, type_is, match_of_class, is_tensor],
    *("removed", "stream", "child", "kept_root"),
)
def test_nor_anywhere_else(act: Act, host: Host) -> None:
    hold(act, host, LATER, demand="right")


@pytest.mark.parametrize("act", [isinstance_of_tensor, type_is], ids=lambda act: act.__name__)
@pytest.mark.parametrize("host", ["block", "root"])
def test_nor_is_one_given_by_name(act: Act, host: str) -> None:
    right(
        HOSTS[host].build(act),
        {"x": features(), "mask": ones()},
        [Trial({"mask": padded(), "x": features()})],
        cut="blocks.1",
        zero="blocks.1.f",
    )


class Batch(NamedTuple):
    """Features and their mask in one argument."""

    x: Tensor
    mask: Tensor


class FromBatch(nn.Module):
    """Takes both out of one argument, whose type it asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self.net(batch["x"], batch["mask"])
        if isinstance(batch, Batch):
            return self.net(batch.x, batch.mask)
        x, mask = batch
        return self.net(x, mask) * 1


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize(
    "pack",
    [lambda x, m: {"x": x, "mask": m}, Batch, lambda x, m: [x, m], lambda x, m: (x, m)],
    ids=["dict", "namedtuple", "list", "tuple"],
)
def test_containers_keep_their_types(pack: Any, preserve_root: bool) -> None:
    right(
        FromBatch(Net(Block(isinstance_of_tensor), Block())),
        (pack(features(), ones()),),
        [Trial((pack(features(), padded()),))],
        cut="net.blocks.1",
        zero="net.blocks.1.f",
        preserve_root=preserve_root,
    )


class WeightType(Block):
    """Asks for the types of its own weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor(0.0))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        is_weight = {
            "parameter": isinstance(self.scale, nn.Parameter),
            "type": type(self.scale) is nn.Parameter,
            "buffer": not isinstance(self.shift, nn.Parameter),
            "submodule": isinstance(self.f, nn.Linear) and type(self.f) is nn.Linear,
            "requires_grad": self.scale.requires_grad and not self.shift.requires_grad,
            "is_leaf": self.f.weight.is_leaf,
        }[self.how]
        factor = self.scale + self.shift if is_weight else self.scale * 0
        return x + self.f(masked(x, mask) * factor)


@pytest.mark.parametrize(
    "how", ["parameter", "type", "buffer", "submodule", "requires_grad", "is_leaf"]
)
def test_weights_keep_their_types(how: str) -> None:
    net = Net(WeightType(how), Block())
    ticket = right(net, (features(), ones()), LATER, cut="blocks.1", zero="blocks.1.f")
    assert "blocks.0.scale" in dict(ticket.named_parameters())


@on_hosts([*ACTS[::5]], "block")
def test_no_block_is_lost_to_a_test_of_a_type(act: Act, host: Host) -> None:
    assert blockprune.find_blocks(host.build(act), (features(), ones())).names == (
        "blocks.0",
        "blocks.1",
    )


def test_a_step_that_may_be_a_number() -> None:
    """A root that makes a tensor of a number, and is given a tensor."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(Block(), Block())
            self.time = nn.Linear(1, WIDTH)

        def forward(self, x: Tensor, t: Any) -> Tensor:
            if not torch.is_tensor(t):
                t = torch.tensor([t])
            if t.ndim == 0:
                t = t[None]
            t = t.expand(len(x))[:, None, None].float()
            return self.net(x + self.time(t))

    right(
        Timed(),
        (features(), torch.tensor([3, 4])),
        [Trial((features(), torch.tensor([5, 9])))],
        cut="net.blocks.0",
        zero="net.blocks.0.f",
    )
