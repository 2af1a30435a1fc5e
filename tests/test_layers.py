"""Whole layers: of sub-layers, post-norm ones, and taken out of the lists that hold them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from tests import oracle

D = 8


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.drop = nn.LayerNorm(D), nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.f(self.norm(x)))


class Feed(Mix):
    pass


class Sub(nn.Module):
    """A layer of sub-layers, each of which does its own add."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Mix(), Feed()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x))


class Stage(nn.Module):
    """A row of equal layers, which is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Sub(), Sub())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm1 = nn.Linear(D, D), nn.LayerNorm(D)
        self.feed, self.norm2 = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mix(x).relu())
        return self.norm2(x + self.feed(x).relu())


class Stack(nn.Module):
    """A loop over a list of layers, with a head."""

    def __init__(self, *layers: nn.Module, first: int | None = None) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(D, 3)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.first is not None:
            x = x + self.layers[self.first].f.bias
        return self.head(x)

    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def built(*layers: type[nn.Module], **options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(*(layer() for layer in layers), **options)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, D, generator=torch.Generator().manual_seed(batch))


def bypassing(model: nn.Module, *names: str) -> nn.Module:
    """Return the model with the named modules handing their input on."""
    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: args[0])
    return model


def agree(ticket: nn.Module, reference: nn.Module) -> None:
    """Compare outputs and gradients in both modes."""
    for train in (False, True):
        for batch in (1, 3):
            found = oracle.outcome(ticket, (tokens(batch),), train=train)
            wanted = oracle.outcome(reference, (tokens(batch),), train=train)
            assert not oracle.disagreements(found, wanted)


# --- what is one layer --------------------------------------------------------------------------


def test_a_layer_of_sub_layers_is_one_block() -> None:
    model = built(Sub, Sub, Sub)
    branches = blockprune.find_blocks(model, tokens()).names
    assert branches == tuple(f"layers.{i}.parts.{j}" for i in range(3) for j in range(2))
    layers = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert layers.names == ("layers.0", "layers.1", "layers.2")
    assert layers.blocks[1].branches == ("layers.1.parts.0", "layers.1.parts.1")
    assert layers.blocks[1].params == sum(p.numel() for p in model.layers[1].parameters())
    ticket = blockprune.remove_blocks(model, "layers.1", tokens())
    agree(ticket, bypassing(model, "layers.1"))


def test_a_row_of_equal_layers_is_no_layer() -> None:
    model = built(Stage, Stage)
    layers = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert layers.names == tuple(f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2))


class Twice(nn.Module):
    """Two sub-layers of one class: a row, not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Mix(), Mix()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_sub_layers_of_one_class_stay_layers_of_their_own() -> None:
    layers = blockprune.find_blocks(built(Twice), tokens(), granularity="layer")
    assert layers.names == ("layers.0.a", "layers.0.b")


class Flat(nn.Module):
    """Works on tokens in a row for its second half, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x).relu()
        shape = x.shape
        x = x.reshape(-1, D)
        x = x + self.g(x).relu()
        return x.view(shape)


def test_a_layer_that_reshapes_and_restores_its_stream_is_a_layer() -> None:
    model = built(Flat, Flat)
    layers = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert layers.names == ("layers.0", "layers.1")
    agree(blockprune.remove_blocks(model, "layers.0", tokens()), bypassing(model, "layers.0"))


class Around(nn.Module):
    """A layer with an add of its own around a sub-layer that does another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mlp = Mix(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.mlp(x)


def test_a_name_shared_by_a_branch_and_a_layer_means_the_block_asked_for() -> None:
    model = built(Around, Around)
    branches = blockprune.find_blocks(model, tokens())
    assert branches.names == ("layers.0.inner", "layers.0", "layers.1.inner", "layers.1")
    ticket = blockprune.remove_blocks(model, "layers.1", tokens())
    lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in ticket.parameters())
    assert lost == branches.block("layers.1").params == D * D + D
    layers = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert layers.names == ("layers.0", "layers.1")
    plan = blockprune.make_plan(layers, {"layers.0": 1.0, "layers.1": 0.0}, p=1)
    agree(blockprune.remove_blocks(model, plan, tokens()), bypassing(model, "layers.1"))


class Hidden(nn.Module):
    """A branch in a module that no trace can follow, with a branch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Mix()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) if float(x.abs().max()) >= 0 else x


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = Hidden()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(x)


def test_a_branch_counts_what_lies_in_regions_inside_it() -> None:
    model = built(Outside, Outside)
    analysis = blockprune.find_blocks(model, tokens())
    outer = analysis.block("layers.1")
    assert outer.contains == ("layers.1.hidden.inside",)
    assert outer.params == sum(p.numel() for p in model.layers[1].parameters())
    ticket = blockprune.remove_blocks(model, "layers.1", tokens())
    agree(ticket, bypassing(model, "layers.1"))
    assert blockprune.prune(model, "l1", 2, example_inputs=tokens()) is not None


# --- post-norm layers ---------------------------------------------------------------------------


def test_a_post_norm_layer_goes_whole_only_where_asked_for_and_with_a_warning() -> None:
    model = built(PostNorm, PostNorm, PostNorm)
    exact = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert all(block.is_exact for block in exact.blocks)
    assert "layers.1" not in exact.names
    with pytest.raises(blockprune.BlockNotRemovableError, match="layer_approx"):
        blockprune.remove_blocks(model, "layers.1", tokens())
    analysis = blockprune.find_blocks(model, tokens(), granularity="layer_approx")
    assert analysis.names == ("layers.0", "layers.1", "layers.2")
    assert not any(block.is_exact for block in analysis.blocks)
    assert analysis.blocks[0].params == sum(p.numel() for p in model.layers[0].parameters())
    with pytest.warns(blockprune.ApproximationWarning, match=r"layers\.1"):
        ticket = blockprune.remove_blocks(model, "layers.1", tokens(), granularity="layer_approx")
    agree(ticket, bypassing(model, "layers.1"))
    assert blockprune.plan_of(ticket).granularity == "layer_approx"


def test_prune_ranks_post_norm_layers_and_the_ticket_can_be_stored(tmp_path: Path) -> None:
    model = built(PostNorm, PostNorm, PostNorm)
    with pytest.warns(blockprune.ApproximationWarning):
        ticket = blockprune.prune(
            model, "l1", 2, example_inputs=tokens(), granularity="layer_approx"
        )
    blockprune.save_ticket(ticket, tmp_path / "ticket")
    with pytest.warns(blockprune.ApproximationWarning):
        again = blockprune.load_ticket(model, tmp_path / "ticket")
    assert torch.equal(again(tokens()), ticket(tokens()))
    assert len([name for name, _ in ticket.named_modules() if "norm" in name]) == 2


def test_branches_of_a_post_norm_layer_keep_its_norms() -> None:
    model = built(PostNorm, PostNorm)
    ticket = blockprune.remove_blocks(model, ["layers.1.mix", "layers.1.feed"], tokens())
    assert any(name.startswith("layers.1.norm1") for name in ticket.state_dict())


# --- lists --------------------------------------------------------------------------------------


def test_a_kept_root_has_shorter_lists_and_its_methods() -> None:
    model = built(Sub, Sub, Sub, Sub)
    ticket = blockprune.remove_blocks(model, ["layers.0", "layers.2"], tokens(), preserve_root=True)
    assert type(ticket) is Stack
    assert [type(layer) for layer in ticket.layers] == [Sub, Sub]
    assert set(ticket.state_dict()) < set(model.state_dict())
    ticket.eval()
    assert torch.equal(ticket.head(ticket.features(tokens())), ticket(tokens()))
    agree(ticket, bypassing(model, "layers.0", "layers.2"))


def test_all_branches_of_a_layer_by_name_are_the_layer() -> None:
    model = built(Sub, Sub, Sub)
    names = ["layers.1.parts.0", "layers.1.parts.1"]
    ticket = blockprune.remove_blocks(model, names, tokens(), preserve_root=True)
    assert len(ticket.layers) == 2


def test_a_list_that_is_read_by_number_keeps_pass_throughs() -> None:
    model = built(Mix, Mix, Mix, first=2)
    with pytest.warns(UserWarning, match="pass-throughs stay"):
        ticket = blockprune.remove_blocks(model, "layers.0", tokens(), preserve_root=True)
    assert len(ticket.layers) == 3
    assert not list(ticket.layers[0].parameters())
    agree(ticket, bypassing(model, "layers.0"))


def test_one_stubborn_list_does_not_keep_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(built(Mix, Mix, Mix), nn.Linear(3, D), built(Mix, Mix, Mix, first=2))
    names = ["0.layers.0", "2.layers.1"]
    ticket = blockprune.remove_blocks(model, names, tokens(), preserve_root=True)
    assert type(ticket[0]) is Stack
    assert len(ticket[0].layers) == 2
    assert isinstance(ticket[2], torch.fx.GraphModule)
    for train in (False, True):
        found = oracle.outcome(ticket, (tokens(),), train=train)
        wanted = oracle.outcome(bypassing(model, *names), (tokens(),), train=train)
        assert torch.equal(found.leaves[0], wanted.leaves[0])


def test_a_layer_that_loses_one_branch_stays() -> None:
    model = built(Sub, Sub, Sub)
    names = ["layers.0", "layers.2.parts.1"]
    ticket = blockprune.remove_blocks(model, names, tokens(), preserve_root=True)
    reference = bypassing(model, *names)
    for train in (False, True):
        found = oracle.outcome(ticket, (tokens(),), train=train)
        wanted = oracle.outcome(reference, (tokens(),), train=train)
        assert torch.equal(found.leaves[0], wanted.leaves[0])


@pytest.mark.parametrize("kept", [True, False])
def test_a_ticket_cut_again_and_stored_is_described_in_dense_names(
    kept: bool, tmp_path: Path
) -> None:
    model = built(Sub, Sub, Sub, Sub)
    once = blockprune.remove_blocks(model, "layers.1", tokens(), preserve_root=kept)
    names = blockprune.find_blocks(once, tokens(), granularity="layer", preserve_root=kept).names
    twice = blockprune.remove_blocks(once, names[-1], tokens(), preserve_root=kept)
    removed = {name.partition(".parts")[0] for name in blockprune.plan_of(twice).remove}
    assert removed == {"layers.1", "layers.3"}
    reference = bypassing(model, "layers.1", "layers.3").eval()
    assert torch.equal(twice.eval()(tokens()), reference(tokens()))
    blockprune.save_ticket(twice, tmp_path / "ticket")
    again = blockprune.load_ticket(model, tmp_path / "ticket")
    assert torch.equal(again.eval()(tokens()), reference(tokens()))
    assert set(again.state_dict()) == set(twice.state_dict())


def test_without_a_kept_root_keys_stay_those_of_the_dense_model() -> None:
    class Undecided(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    torch.manual_seed(0)
    model = Undecided(Sub(), Sub(), Sub())
    ticket = blockprune.remove_blocks(model, "layers.1", tokens())
    assert set(ticket.state_dict()) < set(model.state_dict())
    assert not any(name.startswith("layers.1.") for name in ticket.state_dict())
    agree(ticket, bypassing(model, "layers.1"))


def test_the_dense_model_keeps_its_lists() -> None:
    model = built(Sub, Sub, Sub)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blockprune.remove_blocks(model, "layers.1", tokens(), preserve_root=True)
    assert len(model.layers) == 3
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_a_wrong_shorter_list_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a layer too many taken out is noticed."""
    from blockprune.surgery import settle

    def too_many(ticket: nn.Module, gone: Any) -> None:
        del ticket.layers._modules["1"], ticket.layers._modules["2"]

    model = built(Sub, Sub, Sub)
    monkeypatch.setattr(settle, "take_out", too_many)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ticket = blockprune.remove_blocks(model, "layers.1", tokens(), preserve_root=True)
    assert len(ticket.layers) == 3
    assert torch.equal(ticket.eval()(tokens()), bypassing(model, "layers.1").eval()(tokens()))


# --- what stays of a layer ----------------------------------------------------------------------


class Clamped(nn.Module):
    """A block with an activation behind its merge."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.act = nn.Linear(D, D), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.f(x))


def unit(x: Tensor) -> Tensor:
    return F.hardtanh(x)


def upper(x: Tensor) -> Tensor:
    return F.hardtanh(x, 0.0, max_val=1)


CLAMP_FUNCTIONS = (F.relu, F.relu6, F.hardtanh, F.hardtanh_)
CLAMPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = {
    "relu6 twice": (F.relu6, F.relu6, True),
    "relu6 within relu": (F.relu6, F.relu, True),
    "relu beyond relu6": (F.relu, F.relu6, False),
    "hardtanh twice": (unit, unit, True),
    "its bounds by place and by name": (upper, upper, True),
    "the narrower first": (upper, unit, True),
    "the wider first": (unit, upper, False),
    "hardtanh written in place": (unit, F.hardtanh_, True),
    "pooled by name": (
        lambda x: F.max_pool1d(input=F.relu(x), kernel_size=3, stride=1, padding=1),
        F.relu,
        True,
    ),
    "pooled by a name that is not followed": (
        lambda x: torch.max_pool1d(x1=F.relu(x), kernel_size=3, stride=1, padding=1),
        F.relu,
        False,
    ),
    "given by name": (F.relu, lambda x: F.relu(input=x), True),
    "handed on by name": (lambda x: torch.clone(input=F.relu(x)), F.relu, True),
    "of the other sign": (lambda x: -F.relu(x), F.relu, False),
}


@pytest.mark.parametrize("case", CLAMPS)
def test_an_activation_goes_with_its_branch_only_where_it_has_been_applied(case: str) -> None:
    before, act, is_idle = CLAMPS[case]
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(D, D), Clamped(act), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(before(4 * self.stem(x))))

    model = Net()
    ticket = blockprune.remove_blocks(model, "block", tokens())
    reference = copy.deepcopy(model)
    reference.block.f.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    agree(ticket, reference)
    clamps = [node for node in ticket.graph.nodes if node.target in CLAMP_FUNCTIONS]
    assert len(clamps) == (1 if is_idle else 2)


def test_a_layer_that_reshapes_by_name_is_a_layer() -> None:
    class ByName(Flat):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.flatten(input=x + self.f(x).relu(), end_dim=1)
            return torch.reshape(input=y + self.g(y).relu(), shape=x.shape)

    model = built(ByName, ByName)
    layers = blockprune.find_blocks(model, tokens(), granularity="layer")
    assert layers.names == ("layers.0", "layers.1")
    agree(blockprune.remove_blocks(model, "layers.0", tokens()), bypassing(model, "layers.0"))


class MixedOnStream(PostNorm):
    """What stays without its branches has a weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.Linear(D, D)  # type: ignore[assignment]


class Summing(PostNorm):
    """What stays without its branches adds two ways through it."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.relu() + x.tanh()


@pytest.mark.parametrize("kind", [MixedOnStream, Summing])
def test_a_layer_of_which_more_than_norms_would_stay_is_never_left_out_whole(
    kind: type[nn.Module],
) -> None:
    model = built(PostNorm, kind)
    names = blockprune.find_blocks(model, tokens(), granularity="layer_approx").names
    assert names == ("layers.0", "layers.1.mix", "layers.1.feed")
    with pytest.raises((blockprune.BlockNotFoundError, blockprune.BlockNotRemovableError)):
        blockprune.remove_blocks(model, "layers.1", tokens(), granularity="layer_approx")


class Optional(nn.Module):
    """Adds its input, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor, adds: bool = True) -> Tensor:
        return x + self.f(x) if adds else self.f(x)


class OnceAdding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Optional()])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](self.inner[0](x), adds=False)


def test_a_module_that_is_a_branch_in_one_call_only_stays_for_the_other() -> None:
    torch.manual_seed(0)
    model = OnceAdding()
    names = blockprune.find_blocks(model, tokens(), granularity="layer").names
    assert names == ("inner.0",)
    ticket = blockprune.remove_blocks(model, names, tokens())
    for train in (False, True):
        assert torch.equal(ticket.train(train)(tokens()), model.inner[0].f(tokens()))
    assert len(list(ticket.parameters())) == 2
    # As a region of its own it would have to be one graph for both calls.
    kept = blockprune.find_blocks(model, tokens(), preserve_root=True)
    assert kept.names == ()
    assert "different constant arguments" in kept.traced.opaque["inner.0"]


# --- tickets of tickets, and what code around a list tells --------------------------------------


class ByKeyword(Stack):
    """Takes its input by name only, so that no example can be made up for it."""

    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_a_ticket_is_pruned_again_on_the_inputs_it_was_cut_with() -> None:
    torch.manual_seed(0)
    model = ByKeyword(Sub(), Sub(), Sub())
    with pytest.raises(blockprune.TraceError, match="example_inputs"):
        blockprune.prune(model, "l1", 1)
    once = blockprune.remove_blocks(model, "layers.1.parts.0", {"x": tokens()})
    again = blockprune.prune(once, "l1", 1)
    assert len(blockprune.plan_of(again).remove) == 2
    reference = copy.deepcopy(model).eval()
    for name in blockprune.plan_of(again).remove:
        reference.get_submodule(name).register_forward_hook(lambda m, args, output: args[0])
    assert torch.equal(again.eval()(x=tokens(3)), reference(x=tokens(3)))


def test_a_root_that_returns_all_its_layers_keeps_a_place_for_each() -> None:
    class Telling(Stack):
        def forward(self, x: Tensor) -> Any:
            seen = (x,)
            for layer in self.layers:
                seen = (*seen, layer(seen[-1]))
            return seen

    torch.manual_seed(0)
    model = Telling(Mix(), Mix(), Mix())
    with pytest.warns(UserWarning, match=r"pass-throughs stay.*it gives .* instead of"):
        ticket = blockprune.remove_blocks(model, "layers.1", tokens(), preserve_root=True)
    assert len(ticket.eval()(tokens())) == 4
    agree(ticket, bypassing(model, "layers.1"))


def test_a_ticket_file_holds_a_shared_weight_once(tmp_path: Path) -> None:
    model = built(Mix, Mix, Mix)
    model.layers[2].f.weight = model.layers[1].f.weight
    ticket = blockprune.remove_blocks(model, "layers.0", tokens())
    blockprune.save_ticket(ticket, tmp_path / "ticket")
    names = set(load_file(tmp_path / "ticket"))
    assert len(names & {"layers.1.f.weight", "layers.2.f.weight"}) == 1
    other = built(Mix, Mix, Mix)
    with torch.no_grad():
        other.layers[1].f.weight.zero_()
    other.layers[2].f.weight = other.layers[1].f.weight
    again = blockprune.load_ticket(other, tmp_path / "ticket")
    assert torch.equal(again.eval()(tokens()), ticket.eval()(tokens()))
    found = dict(again.named_parameters(remove_duplicate=False))
    assert found["layers.1.f.weight"] is found["layers.2.f.weight"]
