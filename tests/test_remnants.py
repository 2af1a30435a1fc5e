"""What stands where a module stood, and what is said of what a ticket cannot keep."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint as checkpoints

import blockprune

REGISTERED: list[type] = []


class Block(nn.Module):
    kind = "residual"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.width = width

    def __init_subclass__(cls) -> None:
        REGISTERED.append(cls)

    def get_bias(self) -> Tensor:
        return self.f(torch.zeros(self.width))

    def extra_repr(self) -> str:
        return f"bias={self.f.bias.sum().item()}"

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = Block()
        self.position = nn.Parameter(torch.rand(4))
        self._stride = 2
        self.own = self.get_stride
        self.first = [self.blocks[0], "first"]

    @property
    def stride(self) -> int:
        return self._stride

    def get_stride(self) -> int:
        return self.stride

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Reading(nn.Module):
    """Its forward cannot become a graph, and reads everything of its child but the call."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.encoder.stride or x.isnan().any():
            raise ValueError("not divisible")
        assert self.encoder.get_stride() == self.encoder.own() == 2
        assert self.encoder.blocks[0].width == 4
        assert isinstance(self.encoder.first[0], Block)
        return self.head(self.encoder(x) + self.encoder.position)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fc = Encoder(), nn.Linear(4, 2)
        self.num_classes = 2
        self.config = {"width": 4}
        self.mean = torch.ones(4)

    @property
    def width(self) -> int:
        return self.config["width"]

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x))


def without(model: nn.Module, *paths: str) -> nn.Module:
    """Return a copy in which these linear layers give zeros."""
    model = copy.deepcopy(model)
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            nn.init.zeros_(parameter)
    return model


def same(ticket: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    torch.testing.assert_close(ticket(*inputs), reference(*inputs), rtol=0, atol=0)


def test_code_around_a_region_reads_class_properties_and_methods() -> None:
    model, x = Reading(), torch.rand(2, 4)
    ticket = blockprune.remove_blocks(model, "encoder.last", x)
    reference = without(model, "encoder.last.f")
    for form in (ticket, copy.deepcopy(ticket)):
        same(form, reference, x)
        assert type(form) is Reading
        assert isinstance(form.encoder, fx.GraphModule)
        assert isinstance(form.encoder, Encoder)
        assert form.encoder.blocks[0].kind == "residual"
        assert form.encoder.own.__self__ is form.encoder
        assert form.encoder.first[0] is form.encoder.blocks[0]


def test_what_code_around_a_region_alone_reads_stays() -> None:
    model, x = Reading(), torch.rand(2, 4)
    ticket = blockprune.remove_blocks(model, "encoder.last", x)
    gone = {"encoder.last.f.weight", "encoder.last.f.bias"}
    assert ticket.state_dict().keys() == model.state_dict().keys() - gone
    ticket(x).sum().backward()
    assert ticket.encoder.position.grad is not None


def test_the_root_keeps_what_its_class_and_instance_offer() -> None:
    model, x = Root(), torch.rand(2, 4)
    ticket = blockprune.remove_blocks(model, "encoder.blocks.1", x)
    for form in (ticket, copy.deepcopy(ticket), copy.copy(ticket)):
        same(form, without(model, "encoder.blocks.1.f"), x)
        assert isinstance(form, Root)
        assert isinstance(form, fx.GraphModule)
        assert type(form).__name__ == "Root"
        assert (form.num_classes, form.config, form.width) == (2, {"width": 4}, 4)
        assert form.get_classifier() is form.fc
        assert torch.equal(form.mean, model.mean)
        assert form.encoder.stride == 2
        assert [type(block).__name__ for block in form.encoder.blocks] == ["Block", "Block"]
        assert "Encoder" in repr(form)


def test_what_went_is_named_when_it_is_needed() -> None:
    ticket = blockprune.remove_blocks(Root(), "encoder.blocks.1", torch.rand(2, 4))
    gone = vars(ticket.encoder.blocks)["remnant_aside"]["1"]
    with pytest.raises(AttributeError, match=r"'encoder\.blocks\.1\.f' cannot be called"):
        gone.get_bias()
    with pytest.raises(AttributeError, match=r"'encoder\.blocks\.1\.f\.weight'"):
        gone.f.weight + 1
    weight = gone.f.weight
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((4, 4), torch.float32, True)
    assert gone.width == 4
    names = {name for name, _ in ticket.named_modules()}
    assert not any(name.startswith("encoder.blocks.1") for name in names)
    with pytest.raises(AttributeError, match=r"'encoder' cannot be called: it became part"):
        ticket.encoder(torch.rand(2, 4))


def test_nobody_is_told_of_the_classes_made() -> None:
    before = list(REGISTERED)
    blockprune.remove_blocks(Root(), "encoder.blocks.1", torch.rand(2, 4))
    assert before == REGISTERED


def test_a_ticket_cut_again_keeps_its_class() -> None:
    model, x = Root(), torch.rand(2, 4)
    once = blockprune.remove_blocks(model, "encoder.blocks.1", x)
    twice = blockprune.remove_blocks(once, "encoder.blocks.2", x)
    same(twice, without(model, "encoder.blocks.1.f", "encoder.blocks.2.f"), x)
    assert isinstance(twice, Root)
    assert type(twice).__mro__.count(Root) == 1
    assert (twice.num_classes, twice.encoder.stride) == (2, 2)


def test_settings_shared_with_a_module_that_stays_stay_shared() -> None:
    class Attention(nn.Module):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.config, self.f = config, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) * self.config["scale"] if float(x.sum()) < 1e9 else x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"scale": 2.0}
            self.attention, self.block = Attention(self.config), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.attention(x))

    x = torch.rand(2, 4)
    ticket = blockprune.remove_blocks(Model(), "block", x)
    before = ticket(x)
    ticket.config["scale"] = 4.0
    assert torch.equal(ticket(x), before * 2)


def test_a_class_that_asks_for_the_version_of_its_state(tmp_path: Path) -> None:
    class Versioned(Root):
        _version = 3

        def _load_from_state_dict(self, state: Any, prefix: str, meta: Any, *others: Any) -> None:
            assert meta.get("version") == 3
            super()._load_from_state_dict(state, prefix, meta, *others)

    x = torch.rand(2, 4)
    ticket = blockprune.remove_blocks(Versioned(), "encoder.blocks.1", x)
    blockprune.save_ticket(ticket, tmp_path / "ticket")
    same(blockprune.load_ticket(Versioned(), tmp_path / "ticket"), ticket, x)


def test_methods_of_the_root_that_are_not_its_own_forward() -> None:
    class Frozen(Root):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.fc.eval()
            self.encoder.blocks.eval()
            return self

    ticket = blockprune.remove_blocks(Frozen(), "encoder.blocks.1", torch.rand(2, 4)).train()
    assert ticket.training
    assert not ticket.fc.training
    assert not ticket.encoder.blocks[0].training


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_what_dissolves_are_told_and_others_run(kind: str) -> None:
    model, x, calls = Root(), torch.rand(2, 4), list[str]()
    for name in ("", "fc", "encoder.blocks.0.f", "encoder.blocks.0"):
        hook = functools.partial(lambda called, *_: calls.append(called), name or "root")
        getattr(model.get_submodule(name), f"register_{kind}_hook")(hook)
    what = "forward" if kind.startswith("forward") else "backward"
    with pytest.warns(UserWarning, match=rf"the {what} hooks of 'encoder\.blocks\.0' are not"):
        ticket = blockprune.remove_blocks(model, "encoder.blocks.1", x)
    assert not calls
    ticket(x.requires_grad_()).sum().backward()
    assert sorted(calls) == ["encoder.blocks.0.f", "fc", "root"]


# --- activation checkpoints -----------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, flag: bool = True, reads: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.gradient_checkpointing, self.reads = flag, reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads and x.isnan().any():
            return x
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoints.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Segmented(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoints.checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)


def cut(model: nn.Module, **settings: Any) -> nn.Module:
    return blockprune.remove_blocks(model, "blocks.1", torch.rand(2, 4), **settings)


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize(
    "kind", [Checkpointed, Segmented, functools.partial(Checkpointed, reads=True)]
)
def test_checkpoints_are_made_in_the_ticket_too(
    kind: Callable[[], nn.Module], preserve_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = kind(), torch.rand(2, 4)
    ticket = cut(model, preserve_root=preserve_root)
    same(ticket, without(model, "blocks.1.f"), x)
    made: list[Any] = []
    real = checkpoints.checkpoint

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(function)
        return real(function, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "checkpoint", noted)
    ticket.train()(x)
    assert made


# --- memory of what leaves ------------------------------------------------------------------------


class Outputs(nn.Module):
    """Returns what `what` names, of the input, a stem, and two blocks on it."""

    def __init__(self, what: str, reads: bool = False) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.what, self.reads = what, reads

    def forward(self, x: Tensor) -> Any:
        if self.reads and x.isnan().any():
            return x
        if self.what == "input":
            return x + self.a(x)
        stem = self.stem(x)
        first = stem + self.a(stem)
        second = first + self.b(first)
        return {
            "stem and merge": lambda: (stem, first),
            "two merges": lambda: [first, second],
            "views": lambda: {"a": stem[:1], "b": first.view(-1)},
            "merge and reader": lambda: (second, self.head(stem)),
            "merge": lambda: second,
        }[self.what]()


@pytest.mark.parametrize("wrapped", [False, True], ids=["root", "region"])
@pytest.mark.parametrize(
    "what",
    ["input", "stem and merge", "two merges", "views", "merge and reader", "merge"],
)
def test_what_leaves_a_ticket_has_memory_of_its_own(what: str, wrapped: bool) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Outputs(what)

        def forward(self, x: Tensor) -> Any:
            assert not x.isnan().any()
            return self.inner(x)

    torch.manual_seed(0)
    model = Around() if wrapped else Outputs(what)
    x, prefix = torch.rand(2, 4), "inner." if wrapped else ""
    names = blockprune.find_blocks(model, x).names
    assert names
    ticket = blockprune.remove_blocks(model, names, x, preserve_root=wrapped)
    reference = without(model, *(f"{prefix}{name}" for name in "ab"))
    results = []
    for one in (ticket, reference):
        given = x.clone()
        found = one(given)
        leaves = list(found.values()) if isinstance(found, dict) else found
        for place, leaf in enumerate([leaves] if isinstance(leaves, Tensor) else leaves):
            leaf.data.mul_(2 + place)
        results.append((found, given, one(x)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    # Nothing else is cloned.
    inner = ticket.inner if wrapped else ticket
    if what == "merge" and not wrapped:
        assert "clone" not in inner.code


class SharedNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.norm(x))
        return x + self.b(self.norm(x))


def test_statistics_that_a_removed_branch_fed_too_are_told() -> None:
    model, x = SharedNorm(nn.BatchNorm1d(4)), torch.rand(3, 4)
    with pytest.warns(UserWarning, match="'norm': called by a removed branch and by what stays"):
        ticket = blockprune.remove_blocks(model, "a", x)
    reference = without(model, "a")
    for train in (True, False):
        ticket.train(train), reference.train(train)
        if train:
            same(ticket, reference, x)


def test_a_shared_norm_without_statistics_is_no_loss() -> None:
    model, x = SharedNorm(nn.LayerNorm(4)), torch.rand(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ticket = blockprune.remove_blocks(model, "a", x)
    same(ticket, without(model, "a"), x)
