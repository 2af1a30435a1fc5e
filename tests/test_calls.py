"""Layers as code around them calls them: with caches, flags, None, and more than one output.

None of these models traces as a whole: their root decides something from its input, as the
models of a library do that builds masks. Their layers are looked into one by one.
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import blockprune
from tests import oracle
from tests.test_hostile_files import header_of, with_header

D = 8


class Memory:
    """A cache: an object that each layer reads, and writes into."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, value: Tensor, slot: int) -> Tensor:
        while len(self.seen) <= slot:
            self.seen.append(value[:, :0])
        self.seen[slot] = torch.cat([self.seen[slot], value], dim=1)
        return self.seen[slot]


class Attention(nn.Module):
    """Attention whose forward no symbolic trace can follow, with a side output or two."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.slot = slot
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        bias: Tensor | None = None,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        if memory is not None:
            key = memory.update(key, 2 * self.slot)
            value = memory.update(value, 2 * self.slot + 1)
        weights = query @ key.transpose(1, 2)
        if float(x.shape[1]) > 100:
            raise ValueError("too long")
        if bias is not None:
            weights = weights + bias
        if mask is not None:
            weights = weights + mask
        weights = F.dropout(weights.softmax(-1), 0.2, self.training)
        return self.out(weights @ value), bias, weights if with_weights else None


class Layer(nn.Module):
    """A pre-norm layer that hands its arguments on."""

    def __init__(self, slot: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(D), Attention(slot)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        bias: Tensor | None = None,
        use_memory: bool = False,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mixed, bias, weights = self.attention(
            self.norm1(x), mask, memory=memory, bias=bias, with_weights=with_weights
        )
        x = x + mixed
        if x.dtype == torch.float16:
            x = x.clamp(-60000, 60000)
        return x + self.mlp(self.norm2(x)), bias, weights


class Model(nn.Module):
    """A stack of layers in a root that builds a mask and a cache."""

    def __init__(self, *, weights: bool = False, remembers: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(slot) for slot in range(3))
        self.bias = nn.Parameter(torch.zeros(1))
        self.weights, self.remembers = weights, remembers

    def forward(self, x: Tensor, masked: bool = False, use_memory: bool = True) -> Tensor:
        if float(x.abs().max()) == 0:
            raise ValueError("no data")
        mask = torch.zeros(x.shape[1], x.shape[1]) if masked else None
        memory = Memory() if self.remembers else None
        total = x.new_zeros(())
        for layer in self.layers:
            x, _, weights = layer(
                x,
                mask,
                memory=memory,
                bias=self.bias,
                use_memory=use_memory,
                with_weights=self.weights,
            )
            if weights is not None:
                total = total + weights.sum()
        return x + total


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, D, generator=torch.Generator().manual_seed(batch))


def without(model: Model, *names: str) -> Model:
    """Return the model with the named modules' first output zeroed by a hook."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(zero)
    return model


def agree(ticket: nn.Module, reference: nn.Module, *inputs: Any) -> None:
    """Compare outputs and gradients in both modes; draws are fixed by operation and shape."""
    for train in (False, True):
        found = oracle.outcome(ticket, inputs, train=train)
        wanted = oracle.outcome(reference, inputs, train=train)
        assert not oracle.disagreements(found, wanted)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_branches_of_layers_that_share_a_cache_are_found_and_cut(model: Model) -> None:
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names == tuple(
        f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")
    )
    ticket = blockprune.remove_blocks(model, ["layers.1.attention", "layers.2.mlp"], tokens())
    for batch in (1, 2, 3):
        agree(ticket, without(model, "layers.1.attention", "layers.2.mlp"), tokens(batch))


def test_a_cache_given_as_an_argument_is_not_written_into(model: Model) -> None:
    memory = Memory()
    x = tokens()
    blockprune.remove_blocks(model.layers[0], "attention", (x, None, memory))
    assert memory.seen == []


def test_arguments_that_are_handed_on_stay_arguments(model: Model) -> None:
    # Cut with no mask and the flag on; called with a mask and the flag off.
    ticket = blockprune.remove_blocks(model, "layers.1.mlp", tokens())
    agree(ticket, without(model, "layers.1.mlp"), tokens(), True, False)


class LooksAtItsMask(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None, **rest: Any) -> Any:
        if isinstance(mask, Tensor):
            x = x * 2
        return super().forward(x, mask, **rest)


class LooksAtItsRank(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None, **rest: Any) -> Any:
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(0) * 3
        return super().forward(x, mask, **rest)


class LooksAtItsFlag(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None, **rest: Any) -> Any:
        return super().forward(x * 2 if rest["use_memory"] is True else x, mask, **rest)


class ChoosesAnOperation(Layer):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, use_memory: bool = False, **rest: Any
    ) -> Any:
        return super().forward(x.tanh() if use_memory is True else x.sigmoid(), mask, **rest)


class ChoosesANumber(Layer):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, use_memory: bool = False, **rest: Any
    ) -> Any:
        return super().forward(x * (2 if use_memory is True else 3), mask, **rest)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LooksAtItsMask, (True,)),
        (LooksAtItsRank, (True,)),
        (LooksAtItsFlag, (False, False)),
        (ChoosesAnOperation, (False, False)),
        (ChoosesANumber, (False, False)),
    ],
)
def test_an_argument_that_the_forward_looks_at_is_bound(
    model: Model, kind: type[Layer], arguments: tuple[Any, ...]
) -> None:
    model.layers[1] = kind(1)
    ticket = blockprune.remove_blocks(model, "layers.1.mlp", tokens())
    agree(ticket, without(model, "layers.1.mlp"), tokens())
    with pytest.raises(blockprune.TraceError, match="only knows that case"):
        ticket(tokens(), *arguments)


def test_a_side_output_that_someone_reads_keeps_its_branch() -> None:
    torch.manual_seed(0)
    model = Model(weights=True)
    analysis = blockprune.find_blocks(model, tokens())
    # What is left of the layer is not called like the layer.
    assert analysis.names == tuple(f"layers.{i}.mlp" for i in range(3))
    assert all(".mlp." in name for name in analysis.blocks[0].parameters if "norm" not in name)
    escaped = [r for r in analysis.rejections if r.reason == "branch_escapes"]
    assert [r.name for r in escaped] == [f"layers.{i}" for i in range(3)]


def test_a_condition_on_a_dtype_is_decided_and_guarded() -> None:
    torch.manual_seed(0)
    layer = Layer(0)
    inputs = {"x": tokens(), "mask": None}
    ticket = blockprune.remove_blocks(layer, "mlp", inputs)
    agree(ticket, without(layer, "mlp"), tokens())
    assert ticket.bfloat16()(tokens().bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(
        blockprune.TraceError,
        match=r"cut where a tensor is .*torch\.bfloat16.* only knows that case; got torch\.float16",
    ):
        ticket.half()(tokens().half())


class Marks(nn.Module):
    """Writes into an output object of a module it called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Layer(0), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        result = _Result(self.inner(x)[0])
        result.value = self.head(result.value)
        return result.value


class _Result:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_an_object_that_a_forward_makes_and_changes_is_followed() -> None:
    torch.manual_seed(0)
    model = Marks()
    ticket = blockprune.remove_blocks(model, "inner.mlp", tokens())
    agree(ticket, without(model, "inner.mlp"), tokens())


class Changes(nn.Module):
    """Sets an attribute of what an opaque module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layer, self.head = Boxes(), Layer(0), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        box = self.inner(x)
        box.value = self.head(box.value)
        return self.layer(box.value)[0] + self.inner.total(box)


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> _Result:
        return _Result(x * float(x.abs().max() > 0))

    def total(self, box: _Result) -> Tensor:
        return box.value.sum()


def test_an_attribute_set_on_an_output_stops_the_trace_and_is_not_lost() -> None:
    torch.manual_seed(0)
    model = Changes()
    analysis = blockprune.find_blocks(model, tokens())
    assert "neither an input, a parameter nor a buffer" in analysis.traced.opaque[""]
    ticket = blockprune.remove_blocks(model, "layer.mlp", tokens())
    agree(ticket, without(model, "layer.mlp"), tokens())


class Watched(nn.Module):
    """Collects what its layers return with hooks on their class, as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(Plain(), Plain(), Plain())

    def forward(self, x: Tensor) -> Any:
        seen: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
            for layer in self.stack.modules()
            if type(layer) is Plain
        ]
        try:
            x = self.stack(x)
        finally:
            for handle in handles:
                handle.remove()
        return self.told(x, seen)

    def told(self, x: Tensor, seen: list[Tensor]) -> Any:
        return x + 2 * seen[0]


class TellsAll(Watched):
    def told(self, x: Tensor, seen: list[Tensor]) -> Any:
        return (x, *seen)


class Stacks(Watched):
    def told(self, x: Tensor, seen: list[Tensor]) -> Any:
        return torch.stack([x, *seen])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x).relu()


@pytest.mark.parametrize("kind", [Watched, TellsAll, Stacks])
def test_a_region_that_the_code_around_it_watches_is_given_up(kind: type[Watched]) -> None:
    torch.manual_seed(0)
    model = kind()
    analysis = blockprune.find_blocks(model, tokens(), preserve_root=True)
    assert "changes the output of the model around it" in analysis.traced.opaque["stack"]
    assert [region.path for region in analysis.traced.regions] != ["stack"]


def test_named_modules_are_called_and_not_looked_into(model: Model) -> None:
    for asked in ("layers.1", Layer, "Layer", ["layers.[12]", "layers.0"]):
        analysis = blockprune.find_blocks(model, tokens(), leaf_modules=asked)
        assert not any(name.startswith("layers.1.") for name in analysis.names)
        assert "asked for by leaf_modules" in analysis.traced.opaque["layers.1"]
    with pytest.raises(blockprune.TraceError, match="Did you mean"):
        blockprune.find_blocks(model, tokens(), leaf_modules="layer.1")


def test_a_model_that_does_not_run_says_where(model: Model) -> None:
    with pytest.raises(
        blockprune.TraceError, match=r"in module 'layers\.0\.norm1' at test_calls\.py:\d+:"
    ):
        blockprune.find_blocks(model, torch.rand(2, 5, D + 1))


def test_prune_says_what_stopped_it_where_nothing_was_found(model: Model) -> None:
    with pytest.raises(blockprune.InfeasibleBudgetError, match="leaf_modules") as caught:
        blockprune.prune(model, "l1", 1, example_inputs=tokens(), leaf_modules=Layer)
    assert "layers.0" in str(caught.value)


class Unreached(Model):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        first = self.layers[0](x)[0]
        return first if float(first.abs().max()) >= 0 else self.layers[1](first)[0]


def test_what_the_example_does_not_reach_is_reported_and_not_guessed() -> None:
    torch.manual_seed(0)
    analysis = blockprune.find_blocks(Unreached(), tokens())
    assert analysis.names == ("layers.0.attention", "layers.0.mlp")
    unreached = [r.name for r in analysis.rejections if "not executed" in r.detail]
    assert unreached == ["layers.1", "layers.2"]


# --- forwards that a graph, or a region of its own, cannot stand for ----------------------------


class Undecided(nn.Module):
    """A root that decides by numbers, so that its children are looked into one by one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if float(x.detach().abs().max()) > 0 else -x


def given_two(forward: Any) -> Any:
    """A decorator behind which a forward has a signature that nobody calls it by."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x, 2.0)

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    @given_two
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.inner(x) * scale


class GoesByNumbers(nn.Module):
    """Reads a number from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if float(x.detach().max()) > 1 else 1)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Decorated, "missing a required argument: 'scale'"),
        (GoesByNumbers, "reads numbers from a tensor (float)"),
    ],
)
def test_a_child_that_is_no_region_is_reported_and_looked_into(
    kind: type[nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    model = Undecided(Plain(), kind())
    analysis = blockprune.find_blocks(model, 9 * tokens())
    assert analysis.names == ("layers.0", "layers.1.inner")
    assert why in analysis.traced.opaque["layers.1"]
    assert " in module" not in analysis.traced.opaque["layers.1"]
    ticket = blockprune.remove_blocks(model, "layers.1.inner", 9 * tokens())
    agree(ticket, without(model, "layers.1.inner.mix"), 9 * tokens(3))


class ReturnsADefaultDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return collections.defaultdict(list, out=self.inner(x))


class HasAKeyword(ReturnsADefaultDict):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> Any:
        return self.inner(x) * scale


@pytest.mark.parametrize(
    ("kind", "inputs", "why"),
    [
        (ReturnsADefaultDict, {"x": tokens()}, "builds a defaultdict"),
        (
            HasAKeyword,
            {"x": tokens(), "scale": torch.rand(1)},
            "required keyword-only argument 'scale'",
        ),
    ],
)
def test_a_root_that_no_graph_can_stand_for_keeps_its_class(
    kind: type[nn.Module], inputs: dict[str, Tensor], why: str
) -> None:
    torch.manual_seed(0)
    model = kind()
    analysis = blockprune.find_blocks(model, inputs)
    assert (analysis.names, why in analysis.traced.opaque[""]) == (("inner",), True)
    ticket = blockprune.remove_blocks(model, "inner", inputs)
    assert type(ticket) is kind
    reference = without(model, "inner.mix")
    found, wanted = ticket.eval()(**inputs), reference.eval()(**inputs)
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        found, wanted = found["out"], wanted["out"]
    assert torch.equal(found, wanted)


def test_a_model_that_refuses_to_be_watched_says_so_itself() -> None:
    class Alone(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if self._forward_pre_hooks:
                raise RuntimeError("hooks are not allowed")
            return super().forward(x)

    with pytest.raises(blockprune.TraceError, match=r"layers\.1.*hooks are not allowed"):
        blockprune.find_blocks(Undecided(Plain(), Alone()), tokens())


def test_a_lock_in_the_call_is_shared_and_not_copied() -> None:
    class Alone(nn.Module):
        def forward(self, x: Tensor, lock: Any) -> Tensor:
            with lock:
                return 2 * x

    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = Plain(), Plain(), Alone()

        def forward(self, x: Tensor, lock: Any) -> Tensor:
            return self.last(self.second(self.first(x)), lock)

    torch.manual_seed(0)
    model, lock = Guarded(), threading.Lock()
    ticket = blockprune.remove_blocks(model, "first", (tokens(), lock))
    x, reference = tokens(3), without(model, "first.mix")
    for train in (False, True):
        assert torch.equal(ticket.train(train)(x, lock), reference.train(train)(x, lock))

    class Free(Guarded):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * self.second(self.first(x))

    free = Free()
    free.load_state_dict(model.state_dict())
    for criterion in ("block_influence", "kl"):
        found = blockprune.score_blocks(
            model, criterion, [((x, lock), None)], example_inputs=(x, lock)
        )
        wanted = blockprune.score_blocks(free, criterion, [(x, None)], example_inputs=x)
        assert found.scores == wanted.scores


# --- state that a forward reads in some way of its own ------------------------------------------


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class OwnWeight(nn.Module):
    """A module of the user's own class with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(D, D)), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.weight)


def test_a_parametrized_module_of_the_users_own_is_looked_into() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OwnWeight(), Plain())
    parametrize.register_parametrization(model[0], "weight", Halved())
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names == ("0.inner", "1")
    ticket = blockprune.remove_blocks(model, "0.inner", tokens())
    agree(ticket, without(model, "0.inner.mix"), tokens(3))
    assert "0.parametrizations.weight.original" in dict(ticket.named_parameters())


class ReadsItsTable(nn.Module):
    """Reads parameters from the table they are kept in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.matmul(x, self._parameters["weight"])


def test_parameters_read_from_a_modules_own_table_stay_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ReadsItsTable(), ReadsItsTable())
    analysis = blockprune.find_blocks(model, tokens())
    assert [(block.name, block.params) for block in analysis.blocks] == [("0", 64), ("1", 64)]
    ticket = blockprune.remove_blocks(model, "0", tokens())
    assert sorted(dict(ticket.named_parameters())) == ["1.weight"]
    agree(ticket, nn.Sequential(OrderedDict({"1": copy.deepcopy(model[1])})), tokens(3))


class Sparse(nn.Module):
    """Mixes tokens by a sparse matrix, whose memory no view shares."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("near", (torch.rand(5, 5) > 0.5).float().to_sparse())
        self.mix = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sparse.mm(self.near, self.mix(x))


def test_a_branch_may_multiply_by_a_sparse_buffer() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Sparse(), Sparse()), tokens()[0]
    assert blockprune.find_blocks(model, x).names == ("0", "1")
    ticket, reference = blockprune.remove_blocks(model, "1", x), without(model, "1.mix")
    for net in (ticket, reference):
        net(x).sum().backward()
    assert torch.equal(ticket(x), reference(x))
    wanted = dict(reference.named_parameters())
    for name, parameter in ticket.named_parameters():
        assert torch.equal(parameter.grad, wanted[name].grad)


class Chooses(nn.Module):
    """A layer whose forward gives an operation something else in train mode."""

    def __init__(self, how: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.mix, self.how = nn.Linear(D, D), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.mix(x), self.training)


@pytest.mark.parametrize(
    "how",
    [
        lambda y, train: F.dropout(y, 0.5 if train else 0, True),
        lambda y, train: y.reshape((-1, D) if train else (1, -1, D)).view_as(y),
        lambda y, train: F.gelu(y, approximate="tanh") if train else F.gelu(y),
        lambda y, train: y.relu() * 2 if train else y.relu(),
    ],
    ids=["another type", "another length", "another keyword", "one step more"],
)
def test_arguments_that_follow_the_mode_still_do_in_the_ticket(
    how: Callable[[Tensor, bool], Tensor],
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Chooses(how)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    analysis = blockprune.find_blocks(model, tokens())
    assert analysis.names == ("0", "1")
    assert "in train mode" in analysis.traced.opaque["0.f"]
    agree(blockprune.remove_blocks(model, "0", tokens()), without(model, "0.f"), tokens(3))


def test_a_file_holds_plain_arguments_and_refuses_objects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = Layer(0)
    inputs = {"x": tokens(), "mask": None, "with_weights": True}
    ticket = blockprune.remove_blocks(layer, "mlp", inputs)
    blockprune.save_ticket(ticket, tmp_path / "ticket")
    again = blockprune.load_ticket(layer, tmp_path / "ticket")
    found, wanted = again.eval()(**inputs), ticket.eval()(**inputs)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    with_state = blockprune.remove_blocks(layer, "mlp", {"x": tokens(), "memory": Memory()})
    with pytest.raises(blockprune.TicketError, match="argument of type Memory"):
        blockprune.save_ticket(with_state, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "call",
    [
        {"args": {"list": []}, "kwargs": {"dict": {}}},
        {"args": {"tuple": []}, "kwargs": {"value": None}},
    ],
)
def test_a_file_whose_call_is_none_is_refused(call: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = nn.Sequential(Plain(), Plain()), tmp_path / "ticket"
    blockprune.save_ticket(blockprune.remove_blocks(model, "0", tokens()), path)
    with_header(path, json.dumps({**header_of(path), "call": call}))
    with pytest.raises(blockprune.TicketError, match="its call is malformed"):
        blockprune.load_ticket(model, path)


class TwoInputs(nn.Module):
    """A branch that alone reads the second argument of its model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor, condition: Tensor, scale: float = 2.0) -> Tensor:
        x = self.stem(x)
        return x + self.gate(x * condition * scale)


def test_an_argument_that_only_a_removed_branch_reads_stays_in_the_signature() -> None:
    model = TwoInputs().eval()
    ticket = blockprune.remove_blocks(model, "gate", (tokens(), tokens()))
    wanted = model.stem(tokens())
    assert torch.equal(ticket(tokens(), tokens()), wanted)
    assert torch.equal(ticket(x=tokens(), condition=torch.zeros(1)), wanted)
    with pytest.raises(TypeError, match="condition"):
        ticket(tokens())
