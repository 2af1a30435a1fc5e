"""Identity: whether two arguments are one tensor, and whether one is given at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recording.law import Trial, right_or_refused, right_where
from tests.recording.nets import WIDTH, Block, features, ones, padded

Same = Callable[[Tensor, Tensor], bool]

SAME: dict[str, Same] = {
    "is": lambda q, k: q is k,
    "is_not": lambda q, k: not (q is not k),
    "id": lambda q, k: id(q) == id(k),
    "ids_in_a_set": lambda q, k: len({id(q), id(k)}) == 1,
    "tensors_in_a_set": lambda q, k: len({q, k}) == 1,
    "tensor_as_a_key": lambda q, k: {q: True}.get(k, False),
    "any_of_a_list": lambda q, k: any(k is t for t in [q]),
    "pointer": lambda q, k: q.data_ptr() == k.data_ptr(),
    "storage": lambda q, k: (
        q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and q.shape == k.shape
    ),
    "is_set_to": lambda q, k: q.is_set_to(k),
    "equal": lambda q, k: torch.equal(q, k),
}


class Attention(nn.Module):
    """Attends in another way where queries and keys are one tensor."""

    def __init__(self, same: Same) -> None:
        super().__init__()
        self.same = same
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if self.same(q, k):
            q = k = self.q(q) * 2
        else:
            q, k = self.q(q), self.k(k)
        return (q @ k.transpose(1, 2) * 0.2).softmax(-1) @ k


class Cross(nn.Module):
    """A block of attention; the stream is the query."""

    def __init__(self, same: Same) -> None:
        super().__init__()
        self.attention = Attention(same)
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.f(self.attention(x, memory))


class TwoStreams(nn.Module):
    """The question is asked of the two arguments of the root, at the root or in a child."""

    def __init__(self, same: Same, where: str) -> None:
        super().__init__()
        self.where, self.same = where, same
        self.attention = Attention(same)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if self.where == "root":
            x = x * 3 if self.same(x, memory) else x + memory
        else:
            x = self.attention(x, memory)
        for block in self.blocks:
            x = block(x)
        return x


ONE, OTHER = features(), features(seed=1)


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
@pytest.mark.parametrize("where", ["root", "child"])
@pytest.mark.parametrize(("first", "later"), [(True, False), (False, True)], ids=["one", "two"])
def test_arguments_of_the_root(same: Same, where: str, first: bool, later: bool) -> None:
    def inputs(together: bool) -> Any:
        x = ONE.clone()
        return (x, x) if together else (x, OTHER.clone())

    right_or_refused_as_is(TwoStreams(same, where), inputs(first), inputs(later))


def right_or_refused_as_is(net: nn.Module, example: Any, later: Any, **options: Any) -> None:
    right_or_refused(net, example, [Trial(later)], cut="blocks.1", zero="blocks.1.f", **options)


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
@pytest.mark.parametrize("cut", ["blocks.0", "blocks.1", "blocks.2"])
def test_values_inside(same: Same, cut: str) -> None:
    """The first block gets one tensor twice, the second two."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([Cross(same), Cross(same), Cross(same)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            memory = x
            x = self.blocks[0](x, memory)
            x = self.blocks[1](x, memory)
            return self.blocks[2](x, x)

    # Where the first branch goes, its merge *is* the memory, and was not in the dense model.
    right_or_refused(Inside(), ONE, [Trial(OTHER)], cut=cut, zero=f"{cut}.f")


@pytest.mark.parametrize("preserve_root", [False, True])
def test_one_tensor_given_twice_by_name(preserve_root: bool) -> None:
    right_or_refused_as_is(
        TwoStreams(SAME["is"], "child"),
        {"x": ONE, "memory": ONE},
        {"x": ONE, "memory": OTHER},
        preserve_root=preserve_root,
    )


class Optional(nn.Module):
    """Arguments that may be absent, and some that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        mode: str = "plain",
        extra: Any = None,
    ) -> Any:
        x = self.stem(x)
        if mask is not None:
            x = x * mask[..., None]
        if mode == "negative":
            x = -x
        for block in self.blocks:
            x = block(x)
        for tensor in extra or ():
            x = x + tensor
        return x * scale


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize(
    ("example", "later"),
    [
        ({}, {"mask": padded()}),
        ({"mask": padded()}, {}),
        ({"mask": ones()}, {"mask": None}),
        ({"mask": None}, {"mask": padded()}),
        ({"scale": 1.0}, {"scale": 3.0}),
        ({}, {"scale": 3.0}),
        ({}, {"mode": "negative"}),
        ({"mode": "plain"}, {"mode": "negative"}),
        ({"extra": [OTHER]}, {"extra": [OTHER, OTHER]}),
        ({"extra": [OTHER, OTHER]}, {"extra": [OTHER]}),
        ({"extra": [OTHER]}, {"extra": []}),
        ({}, {"extra": [OTHER]}),
        ({"extra": (OTHER,)}, {"extra": (ONE,)}),
    ],
    ids=[
        *("mask_later", "mask_before", "mask_to_none", "none_to_mask", "scale", "scale_later"),
        *("mode_later", "mode", "longer_list", "shorter_list", "empty_list", "list_later"),
        "other_tuple",
    ],
)
def test_what_may_be_absent(
    example: dict[str, Any], later: dict[str, Any], preserve_root: bool
) -> None:
    right_where(
        preserve_root,
        Optional(),
        {"x": ONE, **example},
        [Trial({"x": ONE, **later})],
        cut="blocks.1",
        zero="blocks.1.f",
        preserve_root=preserve_root,
    )
