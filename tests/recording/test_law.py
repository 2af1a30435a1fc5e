"""The law itself: what it must find out, it finds out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import TraceError
from tests.recording.law import Trial, reference, right, right_or_refused, untouched
from tests.recording.nets import Block, Net, features, ones

EXAMPLE = (features(), ones())
ZERO = "blocks.1.f"


def cut_by_hand(model: nn.Module) -> nn.Module:
    """Return a ticket that nothing of blockprune made."""
    ticket = copy.deepcopy(model)
    assert isinstance(ticket, Net)
    ticket.blocks[1] = PassThrough()
    return ticket


class PassThrough(nn.Module):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x


@pytest.fixture
def cutting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[nn.Module], Any]], None]:
    """Let `remove_blocks` do something else to the ticket that is cut by hand."""

    def replace(damage: Callable[[nn.Module], Any]) -> None:
        def remove_blocks(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
            ticket = cut_by_hand(model)
            damaged = damage(ticket)
            return damaged if isinstance(damaged, nn.Module) else ticket

        monkeypatch.setattr(blockprune, "remove_blocks", remove_blocks)

    return replace


Cutting = Callable[[Callable[[nn.Module], Any]], None]


def test_a_right_ticket_passes(cutting: Cutting) -> None:
    cutting(lambda ticket: None)
    trials = [Trial((features(3), ones(3)), train=True, prepare=nn.Module.double)]
    trials = [Trial((features(3).double(), ones(3)), train=True, prepare=nn.Module.double)]
    right(Net(Block(), Block()), EXAMPLE, trials, cut="blocks.1", zero=ZERO)
    assert right_or_refused(Net(Block(), Block()), EXAMPLE, trials, cut="b", zero=ZERO) == []


class Wrong(nn.Module):
    """A ticket that is wrong in some conditions."""

    def __init__(self, ticket: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__["ticket"], self.change = ticket, change
        for name, child in ticket.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.change(self, self.ticket.forward(x, mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda self, y: y * 1.0001,
        lambda self, y: y * 1.0001 if y.shape[0] == 3 else y,
        lambda self, y: y * 1.0001 if self.training else y,
        lambda self, y: y.double(),
        lambda self, y: y.detach(),
        lambda self, y: y + (y.detach() - y),
        lambda self, y: (y, y),
        lambda self, y: y[:1],
        lambda self, y: y * 1.0001 if not torch.is_grad_enabled() else y,
    ],
    ids=[
        *("value", "batch", "mode", "dtype", "detached", "gradient", "structure", "shape", "grad"),
    ],
)
@pytest.mark.parametrize("law", [right, right_or_refused])
def test_a_wrong_ticket_does_not(
    law: Callable[..., Any], change: Callable[..., Tensor], cutting: Cutting
) -> None:
    cutting(lambda ticket: Wrong(ticket, change))
    trials = [Trial((features(3), ones(3))), Trial(EXAMPLE, within=torch.no_grad)]
    with pytest.raises(AssertionError, match="silent difference"):
        law(Net(Block(), Block()), EXAMPLE, trials, cut="blocks.1", zero=ZERO)


def refuses(batch: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def change(self: nn.Module, y: Tensor) -> Tensor:
        if y.shape[0] == batch:
            raise TraceError(f"cut on other inputs than a batch of {batch}")
        return y

    return change


def test_a_refusal_is_returned(cutting: Cutting) -> None:
    cutting(lambda ticket: Wrong(ticket, refuses(3)))
    net, trials = Net(Block(), Block()), [Trial((features(3), ones(3)))]
    [refusal] = right_or_refused(net, EXAMPLE, trials, cut="blocks.1", zero=ZERO)
    assert isinstance(refusal, TraceError)
    with pytest.raises(TraceError):
        right(net, EXAMPLE, trials, cut="blocks.1", zero=ZERO)


def test_the_example_may_not_be_refused(cutting: Cutting) -> None:
    cutting(lambda ticket: Wrong(ticket, refuses(2)))
    with pytest.raises(TraceError):
        right_or_refused(Net(Block(), Block()), EXAMPLE, cut="blocks.1", zero=ZERO)


def test_another_error_is_no_refusal(cutting: Cutting) -> None:
    def change(self: nn.Module, y: Tensor) -> Tensor:
        raise AttributeError("stride")

    cutting(lambda ticket: Wrong(ticket, change))
    with pytest.raises(AttributeError):
        right_or_refused(Net(Block(), Block()), EXAMPLE, cut="blocks.1", zero=ZERO)


def test_a_branch_that_makes_no_difference_tests_nothing() -> None:
    net = Net(Block(), Block())
    nn.init.zeros_(net.blocks[1].f.weight)
    nn.init.zeros_(net.blocks[1].f.bias)
    with pytest.raises(AssertionError, match="the test is empty"):
        right(net, EXAMPLE, cut="blocks.1", zero=ZERO)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.stem.weight.data.add_(1e-7 + net.stem.weight.data.abs() * 1e-6),
        lambda net: net.stem.bias.requires_grad_(False),
        lambda net: setattr(net, "calls", 1),
        lambda net: net.eval(),
        lambda net: net.head.register_forward_hook(lambda *_: None),
        lambda net: setattr(net.stem, "bias", nn.Parameter(net.stem.bias.detach().clone())),
        lambda net: net.seen.append(1),
        lambda net: setattr(net.stem.weight, "grad", torch.zeros_like(net.stem.weight)),
        lambda net: torch.rand(1),
        lambda net: net.generator.seed(),
    ],
    ids=[
        *("weight", "requires_grad", "attribute", "mode", "hook", "replaced", "list", "grad"),
        *("draw", "own_draw"),
    ],
)
def test_a_change_of_the_dense_model_is_found(change: Callable[[Any], Any]) -> None:
    net = Net(Block(), Block())
    net.seen, net.generator = [], torch.Generator().manual_seed(0)
    with untouched(net):
        net(*EXAMPLE)
    with pytest.raises(AssertionError, match="changed"), untouched(net):
        change(net)


def test_the_reference_is_another_model() -> None:
    net = Net(Block(), Block())
    expected = reference(net, ["blocks.0.f.weight", "blocks.1.f"])
    assert not expected.blocks[0].f.weight.any()
    assert expected.blocks[0].f.bias.any()
    assert net.blocks[1].f.weight.any()
