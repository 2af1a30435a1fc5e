"""Memory: what leaves a ticket is shared where it is in the dense model, and nowhere else."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.oracle import flatten
from tests.recording.law import (
    Trial,
    assert_that_it_says_why,
    reference,
    right,
    right_or_refused,
    same,
    untouched,
)
from tests.recording.nets import WIDTH, Block, features

pytestmark = pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")


class Returns(nn.Module):
    """Blocks, and a choice of what is returned."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Any:
        first = self.stem(x)
        second = self.blocks[0](first)
        third = self.blocks[1](second)
        return self.how(x, first, second, third)


@dataclasses.dataclass
class Output:
    """What a library returns in the place of a tuple."""

    before: Any
    after: Any


OUTPUTS: dict[str, Callable[..., Any]] = {
    "both_ends": lambda x, a, b, c: (a, b, c),
    "a_list": lambda x, a, b, c: [b, c],
    "a_dict": lambda x, a, b, c: {"before": b, "after": c},
    "a_dataclass": lambda x, a, b, c: Output(before=b, after=c),
    "a_dataclass_of_lists": lambda x, a, b, c: Output(before=[b, (a,)], after={"last": c}),
    "nested": lambda x, a, b, c: {"all": [a, (b, c)], "last": c * 1},
    "views": lambda x, a, b, c: (b[0], c[:, 1:], b.transpose(1, 2)),
    "detached": lambda x, a, b, c: (b.detach(), c),
    "flattened": lambda x, a, b, c: (a.flatten(1), b.flatten(1), c.view(-1)),
    "twice_in_the_dense_model": lambda x, a, b, c: (c, c, b),
    "chunks": lambda x, a, b, c: (*b.chunk(2, -1), *c.split(4, -1)),
}


def sharing(output: Any) -> list[list[bool]]:
    """Return which tensors of an output share memory."""
    tensors = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [[a == b for a in pointers] for b in pointers]


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("cut", ["blocks.0", "blocks.1"])
@pytest.mark.parametrize("how", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_share_what_the_dense_ones_share(
    how: Callable[..., Any], cut: str, preserve_root: bool
) -> None:
    net = Returns(how)
    ticket = right(
        net,
        features(),
        [Trial(features(3, 4))],
        cut=cut,
        zero=f"{cut}.f",
        preserve_root=preserve_root,
    )
    expected = reference(net, f"{cut}.f")
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found, wanted = ticket(features()), expected(features())
        assert sharing(found) == sharing(wanted)


@pytest.mark.parametrize("cut", ["blocks.0", "blocks.1"])
def test_an_output_can_be_written_into(cut: str) -> None:
    net = Returns(OUTPUTS["both_ends"])
    ticket = blockprune.remove_blocks(net, cut, features())
    expected = reference(net, f"{cut}.f")
    with torch.no_grad():
        found, wanted = ticket(features()), expected(features())
        for output in (found, wanted):
            for i, tensor in enumerate(output):
                tensor.mul_(i + 2)
    same(found, wanted)


class Bare(nn.Module):
    """Nothing but blocks: without them the output is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("model", [Bare, lambda: nn.Sequential(Bare(), nn.Identity())])
def test_an_input_is_not_given_back(model: Callable[[], nn.Module], preserve_root: bool) -> None:
    net, x = model(), features()
    names = blockprune.find_blocks(net, x, preserve_root=preserve_root).names
    assert len(names) == 2
    ticket = blockprune.remove_blocks(net, names, x, preserve_root=preserve_root)
    with torch.no_grad():
        output = ticket(x)
    same(output, features())
    assert output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    output.zero_()
    assert torch.equal(x, features())


def test_a_weight_is_not_given_out() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 5, WIDTH))
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.table)

    net = Table()
    with untouched(net):
        try:
            ticket = blockprune.remove_blocks(net, "block", features())
        except blockprune.BlockpruneError as error:
            assert_that_it_says_why(error)
            return
    with torch.no_grad():
        output = ticket(features())
    pointers = {p.untyped_storage().data_ptr() for p in ticket.parameters()}
    assert output.untyped_storage().data_ptr() not in pointers


class CodeAround(nn.Module):
    """A root that reads numbers, and writes into what its children return."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write = write
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.pair = Pair()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(self.stem(x))
        if second.sum().item() > 1e9:
            second = -second
        first, second = self.write(first, second)
        return self.head(first) + 2 * self.head(second)


class Pair(nn.Module):
    """Returns the input of its block, and the block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.block(x)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "second": lambda a, b: (a, b.mul_(3)),
    "rows": lambda a, b: (a, b.index_fill_(0, torch.tensor([0]), 0.5)),
    "slice": lambda a, b: (a, b.transpose(0, 1).add_(1).transpose(0, 1)),
    "out": lambda a, b: (a, torch.nn.functional.relu(b, inplace=True)),
    "out_of_place_first": lambda a, b: (a.mul(3), b.sub_(1)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("preserve_root", [False, True])
def test_code_around_may_write(write: Callable[..., Any], preserve_root: bool) -> None:
    right(
        CodeAround(write),
        features(),
        [Trial(features(3))],
        cut="pair.block",
        zero="pair.block.f",
        preserve_root=preserve_root,
    )


class InPlace(Block):
    """Works in place on the merge."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.f(x)
        if self.how == "relu":
            return y.relu_()
        if self.how == "slice":
            y[:, 0] = 0.0
            return y
        if self.how == "masked":
            return y.masked_fill_(y > 0.3, 0.3)
        return y.copy_(y * 2)


@pytest.mark.parametrize("how", ["relu", "slice", "masked", "copy"])
@pytest.mark.parametrize("cut", ["1", "2"])
def test_what_is_written_behind_a_merge(how: str, cut: str) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), InPlace(how), InPlace(how), nn.Linear(WIDTH, 2))
    right_or_refused(net, features(), [Trial(features(3, 2))], cut=cut, zero=f"{cut}.f")


def test_an_example_is_not_written_into() -> None:
    net, x = nn.Sequential(InPlace("relu"), InPlace("slice")), features()
    blockprune.remove_blocks(net, "0", x)
    assert torch.equal(x, features())


class SharedNorm(nn.Module):
    """One norm, called by each of the branches."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(WIDTH),
        lambda: nn.BatchNorm1d(WIDTH, momentum=None),
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU()),
    ],
    ids=["batch", "cumulative", "layer", "nested"],
)
@pytest.mark.parametrize("cut", ["layers.0", "layers.1"])
def test_a_norm_that_a_kept_branch_calls_too(make: Callable[[], nn.Module], cut: str) -> None:
    """The averages of such a norm are those of the calls that stay, and a warning says so."""
    net = SharedNorm(make()).eval()
    x = torch.randn(6, WIDTH)
    with untouched(net), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ticket = blockprune.remove_blocks(net, cut, x)
    has_averages = any(True for _ in net.buffers())
    assert any("its statistics" in str(w.message) for w in caught) == has_averages
    expected = reference(net, cut)
    same(ticket.eval()(x), expected.eval()(x))
    same(ticket.train()(x), expected.train()(x))


class Tied(nn.Module):
    """A layer that a removed and a kept branch share."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.shared(x))
        return x + self.b(self.shared(x).relu())


@pytest.mark.parametrize("cut", ["a", "b"])
def test_a_layer_that_a_kept_branch_calls_too(cut: str) -> None:
    net = Tied()
    found = blockprune.find_blocks(net, features()).names
    [name] = [found[0] if cut == "a" else found[1]]
    ticket = right(net, features(), [Trial(features(3))], cut=name, zero=cut)
    assert "shared.weight" in dict(ticket.named_parameters())


class Outermost(nn.Module):
    """Adds what it has computed to its input, and hands that out in a container."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.how = how
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.how(x + self.f(torch.relu(x)))


@pytest.mark.parametrize(
    "how",
    [lambda y: y, lambda y: (y,), lambda y: {"y": y}, lambda y: Output(y, None)],
    ids=["tensor", "tuple", "dict", "dataclass"],
)
def test_a_model_that_is_one_block_hands_out_memory_of_its_own(
    how: Callable[[Tensor], Any],
) -> None:
    model = Outermost(how)
    right(model, features(), [Trial(features(3, 4))], cut="f", zero="f")
