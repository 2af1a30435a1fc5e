"""What a forward may ask of an argument: its type, its items, its numbers, at the root or below."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn as rnn_utils

import blockprune
from tests.recording.law import Trial, right, right_or_refused
from tests.recording.nets import WIDTH, Block, features


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float = 1.0
    mask: Tensor | None = None


class Named(NamedTuple):
    x: Tensor
    scale: float = 1.0
    mask: Tensor | None = None


ONE, OTHER, MASK = features(), features(seed=1), features(seed=2)
Act = Callable[[Any], Tensor]


def _of_fields(given: Any) -> Tensor:
    x: Tensor = given.x * given.scale
    return x if given.mask is None else x * given.mask


def _of_items(given: Any) -> Tensor:
    x: Tensor = given["x"] * given["scale"]
    return x if given["mask"] is None else x * given["mask"]


ASKED: dict[str, tuple[Act, Any, Any]] = {
    "dict_number": (
        _of_items,
        {"x": ONE, "scale": 2.0, "mask": None},
        {"x": ONE, "scale": 3.0, "mask": None},
    ),
    "dict_none": (
        _of_items,
        {"x": ONE, "scale": 2.0, "mask": None},
        {"x": ONE, "scale": 2.0, "mask": MASK},
    ),
    "dataclass_number": (_of_fields, Batch(ONE), Batch(ONE, 3.0)),
    "dataclass_none": (_of_fields, Batch(ONE), Batch(ONE, mask=MASK)),
    "named_number": (_of_fields, Named(ONE), Named(ONE, 3.0)),
    "named_none": (_of_fields, Named(ONE), Named(ONE, mask=MASK)),
    "namespace": (
        _of_fields,
        SimpleNamespace(x=ONE, scale=1.0, mask=None),
        SimpleNamespace(x=ONE, scale=2.0, mask=None),
    ),
    "none_in_a_tuple": (
        lambda given: given[0] if given[1] is None else given[0] * given[1],
        (ONE, None),
        (ONE, MASK),
    ),
    "tensor_in_a_tuple": (
        lambda given: given[0] if given[1] is None else given[0] * given[1],
        (ONE, MASK),
        (ONE, None),
    ),
    "length": (lambda given: given[0] * len(given), [ONE, MASK], [ONE]),
    "emptiness": (lambda given: given[0] * (2 if given[1] else 1), [ONE, [MASK]], [ONE, []]),
    "list_or_tuple": (
        lambda given: given[0] * (2 if isinstance(given, tuple) else 1),
        (ONE, MASK),
        [ONE, MASK],
    ),
    "key": (
        lambda given: given["x"] * (2 if "m" in given else 1),
        {"x": ONE, "m": MASK},
        {"x": ONE, "n": MASK},
    ),
    "order": (
        lambda given: sum(i * value for i, value in enumerate(given.values(), 1)),  # type: ignore[arg-type,return-value]
        {"x": ONE, "m": MASK},
        {"m": MASK, "x": ONE},
    ),
    "one_tensor_twice": (
        lambda given: given["q"] * 3 if given["q"] is given["k"] else given["q"] + given["k"],
        {"q": ONE, "k": MASK},
        {"q": ONE, "k": ONE},
    ),
    "rank": (
        lambda given: given[0] * (given[1][..., None] if given[1].dim() == 2 else given[1]),
        (ONE, MASK),
        (ONE, MASK[..., 0]),
    ),
    "bytes": (lambda given: given[0] * len(given[1]), (ONE, b"ab"), (ONE, b"abc")),
    "whole_numbers": (
        lambda given: given[0] * (given[1] if given[1].dtype == torch.bool else 1 - given[1]),
        (ONE, MASK > 0),
        (ONE, (MASK > 0).long()),
    ),
    "additive_mask": (
        lambda given: given[0] * given[1] if given[1].dtype == torch.bool else given[0] + given[1],
        (ONE, MASK),
        (ONE, MASK > 0),
    ),
    "number_or_tensor": (
        lambda given: given[0] * (given[1].exp() if torch.is_tensor(given[1]) else given[1]),
        (ONE, 2.0),
        (ONE, torch.tensor(2.0)),
    ),
    "requires_grad": (
        lambda given: given[0] * (3 if given[0].requires_grad else 1),
        (ONE, None),
        (ONE.clone().requires_grad_(), None),
    ),
}


class AtRoot(nn.Module):
    """The root looks at its argument, and adds the branches itself."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, given: Any) -> Tensor:
        x = self.act(given)
        for block in self.blocks:
            x = x + block(x)
        return x


class Below(nn.Module):
    """A block looks at what a root that is no graph gives it."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Looking(act), Block()])

    def forward(self, given: Any, trigger: Tensor) -> Tensor:
        x = torch.zeros_like(ONE) if trigger.sum() > 1e9 else self.blocks[0](given)
        return self.blocks[1](x)  # type: ignore[no-any-return]


class Looking(Block):
    def forward(self, given: Any, mask: Any = None) -> Tensor:
        x = self.act(given)
        return x + self.f(x)


class Variadic(AtRoot):
    """It comes as `*args`."""

    def forward(self, *given: Any) -> Tensor:
        return super().forward(given)


@pytest.mark.parametrize(("act", "example", "later"), ASKED.values(), ids=ASKED)
def test_of_the_root(act: Act, example: Any, later: Any) -> None:
    right_or_refused(AtRoot(act), (example,), [Trial((later,))], cut="blocks.1", zero="blocks.1")


@pytest.mark.parametrize(("act", "example", "later"), ASKED.values(), ids=ASKED)
def test_of_a_block(act: Act, example: Any, later: Any) -> None:
    trigger = torch.zeros(2)
    right_or_refused(
        Below(act),
        (example, trigger),
        [Trial((later, trigger))],
        cut="blocks.1",
        zero="blocks.1.f",
    )


VARIADIC = [
    name for name, (_, *given) in ASKED.items() if all(type(each) is tuple for each in given)
]


@pytest.mark.parametrize("name", VARIADIC)
def test_of_several_at_once(name: str) -> None:
    act, example, later = ASKED[name]
    right_or_refused(Variadic(act), example, [Trial(later)], cut="blocks.1", zero="blocks.1")


def test_other_tensors_in_containers_are_taken() -> None:
    wide = torch.cat([ONE, OTHER])
    example = {"x": ONE, "scale": 2.0, "mask": None}
    trials = [
        Trial(({**example, "x": x},), train=train) for x in (OTHER, wide) for train in (False, True)
    ]
    right(AtRoot(_of_items), (example,), trials, cut="blocks.1", zero="blocks.1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dict_number", "given['scale']=2.0 and only knows that case; got 3.0"),
        ("dataclass_none", "given.mask=None and only knows that case; got a tensor of shape"),
        ("tensor_in_a_tuple", "a tensor as given[1] and only knows that case; got None"),
        ("length", "2 items in given and only knows that case; got 1"),
        ("key", "'x', 'm' in given and only knows that case; got 'x', 'n'"),
        ("list_or_tuple", "a tuple as given and only knows that case; got a list"),
    ],
)
def test_a_refusal_names_the_item(name: str, said: str) -> None:
    act, example, later = ASKED[name]
    ticket = blockprune.remove_blocks(AtRoot(act), "blocks.1", (example,))
    with pytest.raises(blockprune.TraceError, match=re.escape(said)):
        ticket(later)


class AsksForDevice(Block):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        device = x.device
        if device.type == self.kind:
            x = x * 2
        return x + self.f(x)


@pytest.mark.parametrize(
    ("kind", "said"), [("cuda", "'cpu'"), ("cpu", "'cpu'"), ("mps", "'cpu' and 'cuda'")]
)
def test_a_device_is_tried_before_it_is_refused(kind: str, said: str) -> None:
    net = nn.Sequential(AsksForDevice(kind), AsksForDevice(kind))
    ticket = right(net, ONE, [Trial(OTHER)], cut="1", zero="1.f")
    with pytest.raises(blockprune.TraceError, match=f"does on {said}; got a tensor on 'meta'"):
        ticket.to("meta")(ONE.to("meta"))


class Unused(nn.Module):
    """Collects what its branches return beside their output, and leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(2)])
        self.ends = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor, several: bool = False) -> Any:
        seen = []
        for block, end in zip(self.blocks, self.ends, strict=True):
            y, (h, _) = block(x)
            seen.append(h)
            x = x + end(y)
        states = torch.stack(seen)
        return (x, states) if several else x


def test_what_nothing_reads_keeps_no_branch() -> None:
    net = Unused()
    found = blockprune.find_blocks(net, ONE)
    assert len(found.blocks) == 2
    assert not found.rejections
    right(net, ONE, [Trial(OTHER)], cut=found.names[0], zero="ends.0")


def test_what_is_returned_keeps_its_branch() -> None:
    found = blockprune.find_blocks(Unused(), {"x": ONE, "several": True})
    names = [{name.rpartition(".")[0] for name in block.parameters} for block in found.blocks]
    assert names == [{"ends.0"}, {"ends.1"}]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, **flags: bool) -> Tensor:
        y = self.f(x) if mask is None else self.f(x) * mask
        return y * 2 if flags.get("twice") else y


class Hands(nn.Module):
    """Hands its arguments on to a module that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.f = Inner(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, **flags: bool) -> Tensor:
        x = x + self.inner(x, mask=mask, **flags)
        return x + self.f(x)


class Decides(nn.Module):
    """Gives its layers a mask or none, by the numbers in the mask that it is given itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Hands() for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor, twice: bool = False) -> Tensor:
        given = None if mask.all() else mask[..., None]
        for layer in self.layers:
            x = layer(x, mask=given, twice=twice)
        return x


FULL, PADDED = torch.ones(2, 5), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])


@pytest.mark.parametrize("example", [FULL, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("twice", [False, True])
def test_what_a_layer_only_hands_on_may_be_another(example: Tensor, twice: bool) -> None:
    """Text that is padded in the example, and not later; a flag that is another one later."""
    later = [(OTHER, mask, flag) for mask in (FULL, PADDED) for flag in (False, True)]
    trials = [Trial(given, train=train) for given in later for train in (False, True)]
    right(Decides(), (ONE, example, twice), trials, cut="layers.1.inner", zero="layers.1.inner.f")


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, act: Any = torch.tanh, kind: Any = dict) -> Tensor:
        for block in self.blocks:
            x = block(act(x) if kind is dict else x)
        return x


def test_defaults_that_no_text_can_hold() -> None:
    right_or_refused(
        Defaults(), ONE, [Trial((OTHER, torch.sin))], cut="blocks.1", zero="blocks.1.f"
    )


class Graphs(nn.Module):
    """A layer of a graph, given an adjacency that is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, graph: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(graph @ x)
        return x


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
def test_sparse_tensors(layout: torch.layout) -> None:
    dense, other = torch.eye(5), torch.eye(5).roll(1, 0)
    graph, later = (each.to_sparse(layout=layout) for each in (dense, other))
    x, y = ONE[0], OTHER[0]
    model = Graphs()
    assert blockprune.find_blocks(model, (graph, x)).names == ("layers.0", "layers.1")
    ticket = blockprune.remove_blocks(model, "layers.1", (graph, x))
    for given, features_of in ((graph, x), (later, y)):
        expected = features_of + model.layers[0](given @ features_of)
        assert torch.equal(ticket(given, features_of), expected)
        assert torch.equal(ticket(graph=given, x=features_of), expected)


class Packed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = rnn_utils.pack_padded_sequence(x, lengths, batch_first=True)
        y, _ = rnn_utils.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return x + self.f(y)


def test_packed_sequences() -> None:
    right_or_refused(
        nn.Sequential(Block(), Packed(), Block()), ONE, [Trial(OTHER)], cut="2", zero="2.f"
    )
    assert blockprune.find_blocks(nn.Sequential(Block(), Packed()), ONE).names[:1] == ("0",)


class Scaled(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        weights = (x @ x.mT / np.sqrt(x.shape[-1])).softmax(-1)
        return x + self.f(weights @ x / np.sqrt(float(WIDTH)))


def test_numbers_of_numpy() -> None:
    right(nn.Sequential(Scaled(), Scaled()), ONE, [Trial(features(3, 4))], cut="1", zero="1.f")


MEMO: dict[type, str] = {}


class Remembers(Block):
    """Keeps, once for all, what it found out about a type."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if type(x) not in MEMO:
            MEMO[type(x)] = "tensor"
        return x + self.f(x * len(MEMO[type(x)]))


def test_a_memo_is_no_state() -> None:
    MEMO.clear()
    net = nn.Sequential(Remembers(), Remembers())
    assert blockprune.find_blocks(net, ONE).names == ("0", "1")
    assert not MEMO
    right_or_refused(net, ONE, [Trial(OTHER)], cut="1", zero="1.f")


class Store:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.cat(self.seen, 1)


class AddsInside(nn.Module):
    """Adds what it was given as the residual itself, as layers of BLOOM do."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, residual: Tensor, store: Store | None = None) -> Tensor:
        y = x if store is None else store.update(x)[:, -x.shape[1] :]
        return residual + self.f(y)


class TwoInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention, self.mlp = AddsInside(), AddsInside()

    def forward(self, x: Tensor, store: Store | None = None) -> Tensor:
        x = self.attention(self.norm(x), x, store)
        return self.mlp(self.norm(x), x)


class MakesAStore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoInside() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        store = Store()
        x = -x if x.sum() > 1e9 else x  # So the root is no graph.
        for layer in self.layers:
            x = layer(x, store)
        return x


def test_a_branch_beside_one_that_uses_an_object_is_found() -> None:
    net = MakesAStore()
    names = blockprune.find_blocks(net, ONE).names
    assert names == ("layers.0.mlp", "layers.1.mlp")
    right(net, ONE, [Trial(features(3, 4))], cut=names[0], zero="layers.0.mlp.f")
