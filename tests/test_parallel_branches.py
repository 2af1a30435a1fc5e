"""Branches that share their beginning, and the order of the adds, which decides nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from blockprune import Reason
from blockprune.costs import RemainingCosts
from tests import oracle

D = 8


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(batch))


def _in_place(x: Tensor, a: Tensor, m: Tensor) -> Tensor:
    m += a
    return x + m


ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x + a + m": lambda x, a, m: x + a + m,
    "a + x + m": lambda x, a, m: a + x + m,
    "x + m + a": lambda x, a, m: x + m + a,
    "a + (m + x)": lambda x, a, m: a + (m + x),
    "a + m + x": lambda x, a, m: a + m + x,
    "m + a + x": lambda x, a, m: m + a + x,
    "x + (a + m)": lambda x, a, m: x + (a + m),
    "x + clone of (a + m)": lambda x, a, m: x + (a + m).clone(),
    "x + (m += a)": _in_place,
}


class Parallel(nn.Module):
    """Attention and feed-forward side by side on one norm."""

    def __init__(
        self, order: str, *, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(D), p: float = 0.0
    ) -> None:
        super().__init__()
        self.n, self.a = norm(), nn.Linear(D, D)
        self.m = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.order, self.p = order, p

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return ORDERS[self.order](x, self.a(h), self.m(h))


class DroppedSum(Parallel):
    """A dropout on the sum of both, as in Falcon."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        total = self.a(h) + self.m(h)
        return x + F.dropout(total, self.p, training=self.training)


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def built(*layers: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(*(layer() for layer in layers))


def silenced(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return the dense model with the last linear map of each named child set to zero."""
    model = copy.deepcopy(model)
    for name in names:
        *_, last = (m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def agree(ticket: nn.Module, reference: nn.Module, *, buffers: bool = True) -> None:
    """Compare outputs, gradients and buffers of the kept in both modes, on other batches too."""
    for train, batch in itertools.product((False, True), (2, 3)):
        found = oracle.outcome(ticket, (tokens(batch),), train=train)
        wanted = oracle.outcome(reference, (tokens(batch),), train=train)
        assert not oracle.disagreements(found, wanted, buffers=buffers)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- one norm, two branches ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_adds_decides_nothing(order: str) -> None:
    model = built(*[lambda: Parallel(order)] * 2)
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names == ("layers.0.a", "layers.0.m", "layers.1.a", "layers.1.m")
    assert analysis.rejections == ()
    assert [b.owner for b in analysis.blocks[:2]] == ["layers.0", "layers.0"]
    parts = [model.layers[0].a, model.layers[0].m]
    assert [block.params for block in analysis.blocks[:2]] == [size(part) for part in parts]
    assert all(block.contains == () for block in analysis.blocks)
    layers = blockprune.find_blocks(model, tokens(), "layer")
    assert layers.names == ("layers.0", "layers.1")
    assert layers.blocks[0].branches == ("layers.0.a", "layers.0.m")
    # The norm goes with the last of its readers.
    assert layers.blocks[0].params == size(model.layers[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", [("a",), ("m",), ("a", "m")], ids="+".join)
def test_the_ticket_is_the_dense_model_with_silent_branches(
    order: str, names: tuple[str, ...]
) -> None:
    model = built(*[lambda: Parallel(order)] * 2)
    removed = [f"layers.0.{name}" for name in names]
    analysis = blockprune.find_blocks(model, tokens())
    ticket = blockprune.remove_blocks(model, removed, tokens())
    agree(ticket, silenced(model, removed))
    # What two branches share goes with the second.
    gone = size(model.layers[0]) if len(names) == 2 else size(model.get_submodule(removed[0]))
    assert size(model) - size(ticket) == gone
    assert RemainingCosts(analysis).without(removed).params == size(ticket)


@pytest.mark.parametrize("order", ORDERS)
def test_one_after_the_other_is_both_at_once(order: str) -> None:
    model = built(*[lambda: Parallel(order)] * 2)
    both = blockprune.remove_blocks(model, ["layers.0.a", "layers.0.m"], tokens())
    for first, second in itertools.permutations(("layers.0.a", "layers.0.m")):
        once = blockprune.remove_blocks(model, first, tokens())
        assert blockprune.find_blocks(once, tokens()).names == (second, "layers.1.a", "layers.1.m")
        twice = blockprune.remove_blocks(once, second, tokens())
        assert twice.state_dict().keys() == both.state_dict().keys()
        assert torch.equal(twice(tokens(3)), both(tokens(3)))
        assert set(blockprune.plan_of(twice).remove) == {"layers.0.a", "layers.0.m"}


def test_three_terms_keep_their_names_whichever_goes() -> None:
    class Three(Parallel):
        def __init__(self) -> None:
            super().__init__("")
            self.k = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.n(x)
            return ((self.a(h) + self.m(h)) + self.k(h)) + x

    model = built(Three, Three)
    names = ("layers.0.a", "layers.0.m", "layers.0.k")
    assert blockprune.find_blocks(model, tokens()).names[:3] == names
    for count in (1, 2, 3):
        for gone in itertools.combinations(names, count):
            ticket = blockprune.remove_blocks(model, gone, tokens())
            agree(ticket, silenced(model, gone))
            left = tuple(name for name in names if name not in gone)
            found = blockprune.find_blocks(ticket, tokens()).names
            assert tuple(name for name in found if name.startswith("layers.0")) == left
            for one in left:
                twice = blockprune.remove_blocks(ticket, one, tokens())
                agree(twice, silenced(model, (*gone, one)))


def test_a_dropout_may_stand_around_the_sum() -> None:
    model = built(*[lambda: DroppedSum("", p=0.4)] * 2)
    assert blockprune.find_blocks(model, tokens()).names == (
        "layers.0.a",
        "layers.0.m",
        "layers.1.a",
        "layers.1.m",
    )
    assert blockprune.find_blocks(model, tokens(), "layer").names == ("layers.0", "layers.1")
    for names in (["layers.0.a"], ["layers.0.m"], ["layers.0.a", "layers.0.m"]):
        agree(blockprune.remove_blocks(model, names, tokens()), silenced(model, names))


def test_statistics_of_the_beginning_are_kept_while_it_has_a_reader() -> None:
    class Images(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            h = self.n(x.transpose(1, 2)).transpose(1, 2)
            return x + self.a(h) + self.m(h)

    model = built(*[lambda: Images("", norm=lambda: nn.BatchNorm1d(D))] * 2)
    ticket = blockprune.remove_blocks(model, "layers.0.m", tokens())
    agree(ticket, silenced(model, ["layers.0.m"]))
    ticket.train()(tokens())
    assert ticket.get_buffer("layers.0.n.running_mean").any()
    both = blockprune.remove_blocks(model, ["layers.0.a", "layers.0.m"], tokens())
    agree(both, silenced(model, ["layers.0.a", "layers.0.m"]))
    assert not any(key.startswith("layers.0.") for key in both.state_dict())


def test_a_block_in_the_shared_beginning_goes_with_the_last_reader() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x).relu()

    def begun() -> nn.Module:
        return Parallel("x + (a + m)", norm=lambda: nn.Sequential(nn.LayerNorm(D), Inner()))

    model = built(begun, begun)
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names[:3] == ("layers.0.n.1", "layers.0.a", "layers.0.m")
    assert all(block.contains == () for block in analysis.blocks)
    layers = blockprune.find_blocks(model, tokens(), "layer")
    [whole] = (block for block in layers.blocks if block.name == "layers.0")
    assert whole.params == size(model.layers[0])
    assert whole.contains == ("layers.0.n.1",)
    both = blockprune.remove_blocks(model, ["layers.0.a", "layers.0.m"], tokens())
    three = blockprune.remove_blocks(model, list(analysis.names[:3]), tokens())
    agree(both, silenced(model, ["layers.0.a", "layers.0.m"]))
    assert both.state_dict().keys() == three.state_dict().keys()
    assert torch.equal(both(tokens()), three(tokens()))
    one = blockprune.remove_blocks(model, ["layers.0.n.1", "layers.0.a"], tokens())
    agree(one, silenced(model, ["layers.0.n.1", "layers.0.a"]))


def test_a_plan_counts_and_budgets_see_what_is_shared() -> None:
    model = built(*[lambda: Parallel("x + (a + m)")] * 3)
    ticket = blockprune.prune(model, "l1", p=4, example_inputs=tokens())
    assert len(blockprune.plan_of(ticket).remove) == 4
    for share in (0.4, 0.7):
        ticket = blockprune.prune(model, "l1", keep_params=share, example_inputs=tokens())
        assert size(ticket) <= share * size(model)
    scores = [
        blockprune.score_blocks(
            built(*[partial(Parallel, order)] * 2),
            "block_influence",
            tokens(4),
            example_inputs=tokens(),
        )
        for order in ("x + (a + m)", "a + m + x")
    ]
    assert scores[0].scores == pytest.approx(scores[1].scores, rel=1e-4)


# --- what is one branch -------------------------------------------------------------------------


class Residual(nn.Module):
    """x + what `value` says of the layers f and g."""

    def __init__(self, value: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g, self.value = nn.Linear(D, D), nn.Linear(D, D), value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value(self, x)


def _chained(layer: Any, x: Tensor) -> Tensor:
    h = layer.f(x)
    return h + layer.g(h)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (_chained, ("layers.0.g", "layers.0.f")),
        (lambda s, x: s.f(x) + x.mean(1, keepdim=True), ("layers.0",)),
        (lambda s, x: s.f(x) + x.tanh(), ("layers.0",)),
        (lambda s, x: (s.f(x) + s.g(x)).relu(), ("layers.0",)),
        (lambda s, x: s.f(x) + s.g(x).mean(1, keepdim=True), ("layers.0",)),
        (lambda s, x: torch.add(s.f(x), s.g(x), alpha=2), ("layers.0",)),
    ],
    ids=["chained", "broadcast", "no parameters", "activated", "of other shapes", "scaled"],
)
def test_a_sum_of_which_not_every_term_is_a_branch_is_one(
    value: Callable[[Any, Tensor], Tensor], names: tuple[str, ...]
) -> None:
    model = built(lambda: Residual(value), lambda: Parallel("x + a + m"))
    found = [n for n in blockprune.find_blocks(model, tokens()).names if n.startswith("layers.0")]
    assert tuple(found) == names
    ticket = blockprune.remove_blocks(model, names[-1], tokens())
    for batch in (2, 3):
        x = tokens(batch)
        assert torch.equal(ticket(x), model.head(model.layers[1](x)))


def test_a_sum_that_a_module_returns_is_one_branch() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + self.g(x)

    model = nn.Sequential(Residual(lambda s, x: s.f(x)), nn.Identity())
    model[0].f = Pair()
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names == ("0",)
    assert analysis.blocks[0].params == size(model[0].f)


# --- what goes of a branch that is read elsewhere ------------------------------------------------


class Joint(nn.Module):
    """Attention over two streams joined, and an end for each."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.other_qkv = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.out, self.other_out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.qkv(self.n(x)), self.other_qkv(self.m(y))], dim=1)
        q, k, v = both.chunk(3, dim=-1)
        z = F.scaled_dot_product_attention(q, k, v)
        first, second = z.split([x.shape[1], y.shape[1]], dim=1)
        return x + self.out(first), y + self.other_out(second)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Joint(), Joint()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x, y = layer(x, y)
        return torch.cat([x, y], dim=1)


def test_the_ends_of_joint_attention_can_go() -> None:
    torch.manual_seed(0)
    model = TwoStreams()
    inputs = (tokens(2, 5), tokens(2, 3))
    analysis = blockprune.find_blocks(model, inputs)
    assert analysis.names == tuple(
        f"layers.{i}.{end}" for i in range(2) for end in ("out", "other_out")
    )
    assert [block.params for block in analysis.blocks] == [size(model.layers[0].out)] * 4
    for names in (analysis.names[:1], analysis.names[1:2], analysis.names[:2], analysis.names):
        ticket = blockprune.remove_blocks(model, names, inputs)
        reference = silenced(model, names)
        for train in (False, True):
            found = oracle.outcome(ticket, inputs, train=train)
            assert not oracle.disagreements(found, oracle.outcome(reference, inputs, train=train))
    both = blockprune.remove_blocks(model, analysis.names[:2], inputs)
    assert not any(key.startswith("layers.0.") for key in both.state_dict())


class Watched(nn.Module):
    """A layer that returns what its branch computes in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.f(x).softmax(-1)
        return x + self.g(weights), weights


class Watching(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layers, self.reads = nn.ModuleList([Watched(), Watched()]), reads

    def forward(self, x: Tensor) -> Any:
        seen = []
        for layer in self.layers:
            x, weights = layer(x)
            seen.append(weights)
        return (x, seen) if self.reads else x


def test_a_layer_is_called_by_its_name_only_where_it_goes_whole() -> None:
    torch.manual_seed(0)
    for reads, names in ((False, ("layers.0", "layers.1")), (True, ("layers.0.g", "layers.1.g"))):
        model = Watching(reads)
        for granularity in ("branch", "layer"):
            analysis = blockprune.find_blocks(model, tokens(), granularity)
            assert analysis.names == names
            part = model.layers[0].g if reads else model.layers[0]
            assert analysis.blocks[0].params == size(part)
        ticket = blockprune.remove_blocks(model, names[0], tokens())
        agree(ticket, silenced(model, ["layers.0.g"]))


def test_a_branch_that_is_all_needed_elsewhere_stays() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.f(x)
            return x + y.tanh(), y

    analysis = blockprune.find_blocks(Returned(), tokens())
    assert analysis.names == ()
    assert [rejection.reason for rejection in analysis.rejections] == [Reason.BRANCH_ESCAPES]
    assert "f of the branch is also read by output" in analysis.rejections[0].detail


def test_a_term_that_is_needed_elsewhere_stays_and_the_other_goes() -> None:
    class Half(Parallel):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.n(x)
            a, m = self.a(h), self.m(h)
            return ORDERS[self.order](x, a, m), a

    for order in ORDERS:
        torch.manual_seed(0)
        model = Half(order)
        if order == "x + (m += a)":
            continue
        analysis = blockprune.find_blocks(model, tokens())
        assert (analysis.names, [r.reason for r in analysis.rejections]) == (
            ("m",),
            [Reason.BRANCH_ESCAPES],
        )
        agree(blockprune.remove_blocks(model, "m", tokens()), silenced(model, ["m"]))


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_written_into_the_beginning_is_not_the_branches_own(order: str) -> None:
    class Writing(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            h = self.n(x)
            a = self.a(F.relu(h, inplace=True))
            return ORDERS[self.order](x, a, self.m(h))

    model = built(lambda: Writing(order), lambda: Writing(order))
    assert blockprune.find_blocks(model, tokens()).names[:2] == ("layers.0.a", "layers.0.m")
    for names in (["layers.0.a"], ["layers.0.m"], ["layers.0.a", "layers.0.m"]):
        agree(blockprune.remove_blocks(model, names, tokens()), silenced(model, names))


# --- reasons ------------------------------------------------------------------------------------


def test_a_multiple_of_the_input_is_a_scaled_shortcut_whatever_the_branch_is_made_of() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Parallel("x + a + m")

        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5 + self.f(x)

    analysis = blockprune.find_blocks(nn.Sequential(Scaled()), tokens())
    assert analysis.names == ("0.f.a", "0.f.m")
    assert [(r.name, r.reason) for r in analysis.rejections] == [("0", Reason.SCALED_SHORTCUT)]
