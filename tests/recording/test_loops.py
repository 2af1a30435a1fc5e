"""Loops over layers that count them, when one is taken out of its list.

Under `preserve_root` a layer that became a pass-through leaves the `ModuleList` or `Sequential`
that holds it. Where the code around the list counts, the others must go on by their old numbers:
either the layer stays in its place as a pass-through, or the cut is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.recording.law import Trial, right, right_or_refused
from tests.recording.nets import WIDTH, Block, features

pytestmark = pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")

COUNT = 4


class Stack(nn.Module):
    """Layers in a list, and what a loop over them may read beside."""

    def __init__(self, loop: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.loop = loop
        self.layers = nn.ModuleList([Layer() for _ in range(COUNT)])
        self.scales = nn.Parameter(torch.linspace(0.5, 2, COUNT))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(COUNT)])
        self.factors = [1.0, 2.0, 0.5, 3.0]
        self.special = {1, 3}
        for i, norm in enumerate(self.norms):
            nn.init.constant_(norm.weight, 1 + i)

    def forward(self, x: Tensor) -> Any:
        return self.loop(self, x)


class Layer(Block):
    """Takes its number or a factor, if it is given one."""

    def forward(self, x: Tensor, factor: Any = 1.0) -> Tensor:
        return x + self.f(x) * factor


def plain(self: Stack, x: Tensor) -> Any:
    for layer in self.layers:
        x = layer(x)
    return x


def parity(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(self.layers):
        x = layer(x)
        if n % 2:
            x = x * 3
    return x


def parity_before(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(self.layers):
        if n % 2 == 0:
            x = x.roll(1, 1)
        x = layer(x)
    return x


def number_given(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(self.layers):
        x = layer(x, n + 1)
    return x


def factor_given(self: Stack, x: Tensor) -> Any:
    for layer, factor in zip(self.layers, self.factors, strict=False):
        x = layer(x, factor)
    return x


def norm_beside(self: Stack, x: Tensor) -> Any:
    for layer, norm in zip(self.layers, self.norms, strict=False):
        x = norm(layer(x))
    return x


def scale_by_index(self: Stack, x: Tensor) -> Any:
    for i in range(len(self.layers)):
        x = self.layers[i](x) * self.scales[i]
    return x


def by_literal_index(self: Stack, x: Tensor) -> Any:
    x = self.layers[0](x)
    x = self.layers[1](x)
    x = self.layers[2](x) * 2
    return self.layers[3](x)


def from_the_end(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(reversed(self.layers)):
        x = layer(x) / (n + 1)
    return x


def last_is_special(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(self.layers):
        x = layer(x)
        if n == len(self.layers) - 1:
            x = x * 3
    return x


def by_identity(self: Stack, x: Tensor) -> Any:
    for layer in self.layers:
        x = layer(x)
        if layer is self.layers[-1]:
            x = x * 3
    return x


def depth_as_factor(self: Stack, x: Tensor) -> Any:
    for layer in self.layers:
        x = layer(x)
    return x / len(self.layers)


def number_in_a_set(self: Stack, x: Tensor) -> Any:
    for n, layer in enumerate(self.layers, start=1):
        x = layer(x)
        if n in self.special:
            x = -x
    return x


def all_outputs(self: Stack, x: Tensor) -> Any:
    outputs = [x]
    for layer in self.layers:
        x = layer(x)
        outputs.append(x)
    return tuple(outputs)


def chosen_outputs(self: Stack, x: Tensor) -> Any:
    outputs = {}
    for n, layer in enumerate(self.layers):
        x = layer(x)
        if n in self.special:
            outputs[f"feature{n}"] = x
    return outputs


def skipped_connections(self: Stack, x: Tensor) -> Any:
    saved = []
    half = len(self.layers) // 2
    for n, layer in enumerate(self.layers):
        if n < half:
            x = layer(x)
            saved.append(x)
        else:
            x = layer(x * 0.5 + saved.pop())
    return x


def sliced(self: Stack, x: Tensor) -> Any:
    for layer in self.layers[:2]:
        x = layer(x)
    x = x * 3
    for layer in self.layers[2:]:
        x = layer(x)
    return x


def every_other(self: Stack, x: Tensor) -> Any:
    for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
        x = second(first(x) * 2)
    return x


def counted_by_hand(self: Stack, x: Tensor) -> Any:
    n = 0
    for layer in self.layers:
        x = layer(x) * (1 + n % 2)
        n += 1  # noqa: SIM113
    return x


def by_name(self: Stack, x: Tensor) -> Any:
    for name, layer in self.layers.named_children():
        x = layer(x) * (3 if int(name) % 2 else 1)
    return x


def looped_twice(self: Stack, x: Tensor) -> Any:
    for n in range(2 * len(self.layers)):
        x = self.layers[n % len(self.layers)](x) * 0.9
    return x


LOOPS = [
    plain,
    parity,
    parity_before,
    number_given,
    factor_given,
    norm_beside,
    scale_by_index,
    by_literal_index,
    from_the_end,
    last_is_special,
    by_identity,
    depth_as_factor,
    number_in_a_set,
    all_outputs,
    chosen_outputs,
    skipped_connections,
    sliced,
    every_other,
    counted_by_hand,
    by_name,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("cut", [(1,), (0, 2), (3,)], ids=str)
def test_the_others_keep_their_numbers(loop: Callable[..., Any], cut: tuple[int, ...]) -> None:
    right_or_refused(
        Stack(loop),
        features(),
        [Trial(features(3, 4), train=True)],
        cut=[f"layers.{i}" for i in cut],
        zero=[f"layers.{i}.f" for i in cut],
        preserve_root=True,
    )


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_root_that_is_a_graph_has_no_lists(loop: Callable[..., Any]) -> None:
    right(
        Stack(loop),
        features(),
        [Trial(features(3, 4))],
        cut=["layers.1", "layers.2"],
        zero=["layers.1.f", "layers.2.f"],
    )


class Hidden(nn.Module):
    """A question of numbers that the example answers with no difference."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleList([Layer() for _ in range(COUNT)])
        self.drops = [0.0, 0.5, 0.0, 0.5]

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: Tensor | None = None) -> Any:
        for n, layer in enumerate(self.layers):
            if self.how == "drops" and self.training:
                x = nn.functional.dropout(x, self.drops[n])
            if self.how == "masks" and n % 2 and mask is not None:
                x = x.masked_fill(mask[..., None] == 0, -3.0)
            if self.how == "shifts" and n == 2 and shift is not None:
                x = x + shift
            x = layer(x)
        return x


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("how", ["drops", "masks", "shifts"])
def test_numbers_that_the_example_hides(how: str, cut: int) -> None:
    """Dropout of some layers, a mask that masks nothing, a shift of zero."""
    mask = torch.ones(2, 5)
    padded = mask.clone()
    padded[:, 3:] = 0
    inputs = {"x": features(), "mask": mask, "shift": torch.zeros(WIDTH)}
    later = {"x": features(), "mask": padded, "shift": torch.ones(WIDTH)}
    right_or_refused(
        Hidden(how),
        inputs,
        [Trial(later), Trial(later, train=True)],
        cut=f"layers.{cut}",
        zero=f"layers.{cut}.f",
        preserve_root=True,
    )


@pytest.mark.parametrize("cut", [(1,), (0, 1), (3,)], ids=str)
def test_a_plain_list_becomes_shorter(cut: tuple[int, ...]) -> None:
    ticket = right(
        Stack(plain),
        features(),
        [Trial(features(3, 4))],
        cut=[f"layers.{i}" for i in cut],
        zero=[f"layers.{i}.f" for i in cut],
        preserve_root=True,
    )
    assert len(ticket.get_submodule("layers")._modules) == COUNT - len(cut)


def test_a_stack_run_twice() -> None:
    analysis = blockprune.find_blocks(Stack(looped_twice), features())
    assert len(analysis.names) == 2 * COUNT


class Nested(nn.Module):
    """The list is in a child, and the root counts children of that list."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        super().__init__()
        self.body = Stack(loop)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x)) / len(self.body.layers)


@pytest.mark.parametrize("loop", [plain, parity, scale_by_index], ids=lambda loop: loop.__name__)
def test_a_list_further_down(loop: Callable[..., Any]) -> None:
    right_or_refused(
        Nested(loop),
        features(),
        [Trial(features(3, 4))],
        cut="body.layers.1",
        zero="body.layers.1.f",
        preserve_root=True,
    )


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_sequential_that_is_indexed(where: str) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Layer(), Layer(), Layer())

        def forward(self, x: Tensor) -> Any:
            if where == "middle":
                return self.body[2](self.body[:2](x) * 2)
            return self.body(x) * len(self.body)

    right_or_refused(
        Indexed(),
        features(),
        [Trial(features(3))],
        cut="body.1",
        zero="body.1.f",
        preserve_root=True,
    )
