"""Whole tickets in pickles: what is read again is what was written, in both modes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import blockprune
from blockprune.models import resnet20
from blockprune.surgery import record_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.f(x), 0.5, self.training)


class Net(nn.Module):
    """Has a child by a name that is a keyword, operations in place and of several libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.Sequential(Block(), Block(), Block()), Block()
        self.add_module("class", nn.Linear(8, 8))
        self.note = {"any": "thing"}
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = getattr(self, "class")(self.last(self.blocks(x))) * self.scale
        x.add_(1.0)
        x = F.max_pool1d(x[None], 2, stride=1)[0].to(memory_format=torch.contiguous_format)
        return {"out": x.relu_(), "sum": torch.ops.aten.sum.default(x)}


class Reading(nn.Module):
    """Stays as it is; its child becomes a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            return x
        return self.inner(x)["out"]


def through_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda value: pickle.loads(pickle.dumps(value, protocol))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle 2": through_pickle(2),
    "pickle 5": through_pickle(5),
    "torch.save": through_torch,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def cut(model: nn.Module, name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return blockprune.remove_blocks(model, [name], torch.rand(4, 8), **settings)


def outcome(model: nn.Module, train: bool) -> Any:
    torch.manual_seed(1)
    return model.train(train)(torch.linspace(-1, 1, 32).view(4, 8))


def graphs_of(model: nn.Module) -> list[str]:
    return [
        " ".join(
            f"{n.name}:{n.op}:{n.target}:{n.args}:{n.kwargs}:{n.meta}" for n in part.graph.nodes
        )
        for part in model.modules()
        if isinstance(part, fx.GraphModule)
    ]


@ways
@pytest.mark.parametrize("written_in_train", [True, False])
@pytest.mark.parametrize("kind", [Net, Reading])
def test_what_is_read_is_what_was_written(
    kind: type[nn.Module], written_in_train: bool, way: Callable[[Any], Any]
) -> None:
    name = "blocks.2" if kind is Net else "inner.last"
    ticket = cut(kind(), name).train(written_in_train)
    again = way(ticket)
    assert again.training is written_in_train
    assert graphs_of(again) == graphs_of(ticket) != []
    assert record_of(again) == record_of(ticket) is not None
    assert list(again.state_dict()) == list(ticket.state_dict())
    assert list(dict(again.named_buffers())) == list(dict(ticket.named_buffers()))
    assert isinstance(again, kind)
    assert getattr(again, "inner", again).note == {"any": "thing"}
    for train in (True, False):
        torch.testing.assert_close(outcome(again, train), outcome(ticket, train), rtol=0, atol=0)
    drawn = {str(again.train()(torch.ones(4, 8))) for _ in range(8)}
    assert len(drawn) > 1


@ways
def test_weights_are_apart_but_for_a_shallow_copy(way: Callable[[Any], Any]) -> None:
    ticket = cut(Net(), "blocks.2")
    again, before = way(ticket), outcome(ticket, False)["out"]
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(outcome(ticket, False)["out"], before) is (way is not copy.copy)


@ways
def test_a_ticket_that_was_read_is_cut_and_kept_again(
    way: Callable[[Any], Any], tmp_path: Path
) -> None:
    again = cut(way(cut(Net(), "blocks.2")), "blocks.0")
    assert blockprune.plan_of(again).remove == ("blocks.2", "blocks.0")
    blockprune.save_ticket(again, tmp_path / "ticket.safetensors")
    loaded = blockprune.load_ticket(Net(), tmp_path / "ticket.safetensors")
    torch.testing.assert_close(outcome(loaded, True), outcome(again, True), rtol=0, atol=0)


def test_a_convolutional_ticket() -> None:
    ticket = blockprune.remove_blocks(resnet20(), ["layer1.1"], torch.rand(2, 3, 8, 8))
    again, images = through_torch(ticket), torch.rand(2, 3, 8, 8)
    for train in (True, False):
        assert torch.equal(again.train(train)(images), ticket.train(train)(images))
    assert again.code == ticket.code


@pytest.mark.parametrize("local", ["class", "function"])
def test_what_no_pickle_can_hold_is_refused(local: str) -> None:
    class Local(Net):
        pass

    ticket = cut(Local() if local == "class" else Net(), "blocks.2")
    if local == "function":
        node = next(node for node in ticket.graph.nodes if node.op == "call_function")
        target = node.target
        node.target = lambda *args, **kwargs: target(*args, **kwargs)
        ticket.recompile()
    for way in (pickle.dumps, through_torch):
        with pytest.raises(blockprune.TicketError, match="save_ticket"):
            way(ticket)
    torch.testing.assert_close(
        outcome(copy.deepcopy(ticket), True), outcome(ticket, True), rtol=0, atol=0
    )


class Featured(Dataset[Tensor]):
    """Samples that a ticket computes, in the worker."""

    def __init__(self, ticket: nn.Module) -> None:
        self.ticket = ticket.eval()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.ticket(torch.full((2, 8), float(index)))["out"]
        return out


def test_a_ticket_in_a_spawned_worker() -> None:
    data = Featured(cut(Net(), "blocks.2"))
    context = multiprocessing.get_context("spawn")
    loaded = torch.cat(list(DataLoader(data, 2, num_workers=1, multiprocessing_context=context)))
    assert torch.allclose(loaded, torch.stack([data[index] for index in range(4)]))
