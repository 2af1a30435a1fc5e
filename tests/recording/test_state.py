"""State: what a forward reads beside its arguments, and what it changes.

A module that changes Python state is called and not looked into, so that it counts, draws and
remembers in the ticket as it does in the dense model, starting from where the dense model stands.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from tests.recording.law import (
    Trial,
    assert_alike,
    assert_that_it_says_why,
    reference,
    right,
    right_or_refused,
    right_where,
    same,
    untouched,
)
from tests.recording.nets import (
    WIDTH,
    Act,
    Block,
    Host,
    Net,
    features,
    hold,
    on_hosts,
    ones,
    padded,
)

# ---------------------------------------------------------- what a module remembers


class Stateful(Block):
    """A block that scales its branch by what `factor` makes of its state."""

    def factor(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(x) * self.factor(x)


class Counter(Stateful):
    calls = 0

    def factor(self, x: Tensor) -> Any:
        self.calls += 1
        return self.calls


class CounterOfParity(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def factor(self, x: Tensor) -> Any:
        self.step += 1
        return 1.0 if self.step % 2 else 3.0


class CounterInTraining(Stateful):
    """Warms up, as schedules of drop rates do."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def factor(self, x: Tensor) -> Any:
        if self.training:
            self.step += 1
        return 1.0 + self.step


class CounterInABuffer(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def factor(self, x: Tensor) -> Any:
        self.steps += 1
        return self.steps.float().sqrt()


class BufferAssigned(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def factor(self, x: Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().flatten(0, -2).mean(0)
        return 1 + self.mean


class CounterInADict(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, int] = {"calls": 0}

    def factor(self, x: Tensor) -> Any:
        self.state["calls"] += 1
        return 2.0 ** self.state["calls"]


class CounterInACounter(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def factor(self, x: Tensor) -> Any:
        self.seen["all"] += 1
        return self.seen["all"]


class Iterated(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.cycle([1.0, 2.0, 3.0])

    def factor(self, x: Tensor) -> Any:
        return next(self.numbers)


class History(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def factor(self, x: Tensor) -> Any:
        self.history.append(1.0)
        return len(self.history)


class LastInput(Stateful):
    """Remembers what it was given, as networks with a memory do."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def factor(self, x: Tensor) -> Any:
        last, self.last = self.last, x.detach()
        return 1.0 if last is None else 1.0 + last.mean()


class InitialisedOnce(Stateful):
    """Takes its scale from the first batch that it sees, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def factor(self, x: Tensor) -> Any:
        if not self.ready:
            self.scale.data = 1 / x.detach().flatten(0, -2).std(0)
            self.ready = True
        return self.scale


class InitialisedOnceByABuffer(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def factor(self, x: Tensor) -> Any:
        if not self.ready:
            with torch.no_grad():
                self.scale.copy_(1 / x.flatten(0, -2).std(0))
                self.ready.fill_(True)
        return self.scale


class MadeOnce(Stateful):
    """Makes a table at the first call and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def factor(self, x: Tensor) -> Any:
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.linspace(0.5, 2, x.shape[1])[:, None]
        return self.table[: x.shape[1]]


class CachedByShape(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def factor(self, x: Tensor) -> Any:
        key = (x.shape[1], x.dtype)
        if key not in self.cache:
            self.cache[key] = torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)[:, None]
        return self.cache[key]


class NumpyGenerator(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def factor(self, x: Tensor) -> Any:
        return float(self.rng.random()) if self.training else 1.0


class NumpyNoise(NumpyGenerator):
    def factor(self, x: Tensor) -> Any:
        noise = self.rng.normal(size=tuple(x.shape)).astype("float32")
        return 1 + torch.from_numpy(noise)


class LegacyNumpyGenerator(NumpyGenerator):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.RandomState(3)

    def factor(self, x: Tensor) -> Any:
        return 1.0 + self.rng.randint(5)


class PythonGenerator(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(3)

    def factor(self, x: Tensor) -> Any:
        return self.rng.choice([0.0, 1.0, 2.0, 3.0]) if self.training else 1.0


class TorchGenerator(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(3)

    def factor(self, x: Tensor) -> Any:
        return torch.rand(x.shape[0], 1, 1, generator=self.rng) if self.training else 1.0


class TorchGeneratorRead(TorchGenerator):
    def factor(self, x: Tensor) -> Any:
        return 5.0 if torch.rand((), generator=self.rng).item() < 0.5 else 1.0


STATEFUL: list[type[Stateful]] = [
    Counter,
    CounterOfParity,
    CounterInTraining,
    CounterInABuffer,
    BufferAssigned,
    CounterInADict,
    CounterInACounter,
    Iterated,
    History,
    LastInput,
    InitialisedOnce,
    InitialisedOnceByABuffer,
    MadeOnce,
    CachedByShape,
    NumpyGenerator,
    NumpyNoise,
    LegacyNumpyGenerator,
    PythonGenerator,
    TorchGenerator,
    TorchGeneratorRead,
]


@pytest.mark.parametrize("kind", STATEFUL, ids=lambda kind: kind.__name__)
def test_a_block_with_state(kind: type[Stateful]) -> None:
    right(
        Net(kind(), Block()),
        (features(), ones()),
        [Trial((features(3, 6), ones(3, 6)), train=train, calls=4) for train in (True, False)],
        cut="blocks.1",
        zero="blocks.1.f",
    )


class Store:
    """What a root hands to its layers, which write into it."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> Tensor:
        self.kept.append(x.mean(1, keepdim=True))
        return torch.cat(self.kept, 1)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, store: Store) -> Tensor:
        seen = store.add(x)
        return self.f((x @ seen.transpose(1, 2)).softmax(-1) @ seen)


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attending(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, store: Store) -> Tensor:
        x = x + self.attention(x, store)
        return x + self.mlp(x)


class HasStore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Storing(), Storing()])

    def forward(self, x: Tensor, store: Any = None) -> Any:
        store = Store() if store is None else store
        for layer in self.layers:
            x = layer(x, store)
        return x, len(store.kept)


@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("cut", ["layers.0.mlp", "layers.1.mlp"])
def test_an_object_is_written_into_by_a_part(cut: str, preserve_root: bool) -> None:
    """A graph of the layer would read the tensors of the object that it was recorded with."""
    model = HasStore()
    ticket = blockprune.remove_blocks(model, cut, features(), preserve_root=preserve_root)
    expected = reference(model, cut)
    for net in (ticket, expected):
        net.store = Store()
    for _ in range(3):
        (found, count), (wanted, number) = ticket(features(3)), expected(features(3))
        same(found, wanted)
        assert count == number
        if not preserve_root:
            # The root is a graph of its own store, and says that it knows no other.
            with pytest.raises(blockprune.TraceError, match="cut with store=None"):
                ticket(features(3), ticket.store)
            continue
        found, wanted = ticket(features(3), ticket.store), expected(features(3), expected.store)
        same(found[0], wanted[0])
        assert found[1] == wanted[1]


@pytest.mark.parametrize("kind", STATEFUL, ids=lambda kind: kind.__name__)
def test_one_of_two_goes(kind: type[Stateful]) -> None:
    """The block that goes is of the same class as one that stays."""
    right_or_refused(
        Net(kind(), kind()),
        (features(), ones()),
        [Trial((features(), ones()), train=True, calls=4)],
        cut="blocks.1",
        zero="blocks.1.f",
    )


@pytest.mark.parametrize("kind", STATEFUL[::3], ids=lambda kind: kind.__name__)
def test_a_model_that_has_run_before(kind: type[Stateful]) -> None:
    net = Net(kind(), Block()).train()
    for _ in range(3):
        net(features(seed=4), ones())
    right(
        net.eval(),
        (features(), ones()),
        [Trial((features(), ones()), train=True, calls=3)],
        cut="blocks.1",
        zero="blocks.1.f",
    )


class WithState(nn.Module):
    """State at the root, whose children are blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.rng = kind, 0, random.Random(5)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.calls += 1
        for n, block in enumerate(self.blocks):
            if self.kind == "drops_layers" and self.training and self.rng.random() < 0.4:
                continue
            if self.kind == "counts" and self.calls % 3 == n:
                x = -x
            x = block(x)
        return x / self.calls


@pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")
@pytest.mark.parametrize("preserve_root", [False, True])
@pytest.mark.parametrize("kind", ["counts", "drops_layers"])
def test_a_root_with_state(kind: str, preserve_root: bool) -> None:
    right_where(
        kind != "drops_layers",
        WithState(kind).eval(),
        features(),
        [Trial(features(), train=True, calls=6), Trial(features(), calls=4)],
        cut="blocks.1",
        zero="blocks.1.f",
        preserve_root=preserve_root,
    )


class SharedState:
    """What several modules hand on to one another beside the stream."""

    def __init__(self) -> None:
        self.value: Any = 1.0


class Writes(Block):
    def __init__(self, shared: SharedState) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        self.shared.value = 1 + x.detach().mean()
        return x + self.f(x)


class ReadsShared(Writes):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(x) * self.shared.value


@pytest.mark.parametrize("cut", ["blocks.0", "blocks.1", "blocks.2"])
def test_a_value_handed_on_beside_the_stream(cut: str) -> None:
    shared = SharedState()
    net = Net(Writes(shared), Block(), ReadsShared(shared))
    right_or_refused(
        net,
        (features(), ones()),
        [Trial((features(seed=7), ones()), calls=2)],
        cut=cut,
        zero=f"{cut}.f",
    )


# ------------------------------------------------------------------- what is global

GENERATOR = np.random.default_rng(1)
PYTHON_GENERATOR = random.Random(1)
TORCH_GENERATOR = torch.Generator().manual_seed(1)
COUNTS = {"calls": 0}


def global_numpy_generator(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(GENERATOR.random())


def global_python_generator(x: Tensor, mask: Tensor) -> Tensor:
    return x * (5 if PYTHON_GENERATOR.random() < 0.5 else 1)


def global_torch_generator(x: Tensor, mask: Tensor) -> Tensor:
    return x * torch.rand((), generator=TORCH_GENERATOR)


def numpy_default(x: Tensor, mask: Tensor) -> Tensor:
    return x * float(np.random.rand())


def python_default(x: Tensor, mask: Tensor) -> Tensor:
    return x * random.choice([1.0, 2.0, 3.0, 4.0])


def torch_default_read(x: Tensor, mask: Tensor) -> Tensor:
    return x * torch.empty(1).uniform_().item()


def torch_legacy(x: Tensor, mask: Tensor) -> Tensor:
    return x * torch.Tensor(1).uniform_().item()


def torch_randint_in_a_test(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if torch.randint(0, 2, (1,)) else x


def torch_permutation(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1])]


def global_counter(x: Tensor, mask: Tensor) -> Tensor:
    COUNTS["calls"] += 1
    return x * (1 + COUNTS["calls"] % 4)


GLOBAL: list[Act] = [
    global_numpy_generator,
    global_python_generator,
    global_torch_generator,
    numpy_default,
    python_default,
    torch_default_read,
    torch_legacy,
    torch_randint_in_a_test,
    torch_permutation,
    global_counter,
]


def everything_global() -> tuple[Any, ...]:
    return (
        str(GENERATOR.bit_generator.state),
        PYTHON_GENERATOR.getstate(),
        TORCH_GENERATOR.get_state().numpy().tobytes(),
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
    )


@pytest.mark.parametrize("where", ["block", "root"])
@pytest.mark.parametrize("act", GLOBAL, ids=lambda act: act.__name__)
def test_global_state_stays_and_goes_on_counting(act: Act, where: str) -> None:
    """Each call of the ticket draws or counts, as each call of the dense model does."""
    net = Net(Block(act), Block()) if where == "block" else Net(Block(), Block(), act=act)
    example = (features(), ones())
    before = everything_global()
    with untouched(net):
        ticket = blockprune.remove_blocks(net, "blocks.1", example).eval()
    assert everything_global() == before
    # The same state before each sequence of calls, so that both draw the same numbers.
    expected = reference(net, "blocks.1.f").eval()
    wanted, found = sequence(expected, example), sequence(ticket, example)
    assert not all(torch.equal(wanted[0], other) for other in wanted)
    assert all(map(torch.equal, found, wanted)), "silent difference: other draws"


def sequence(module: nn.Module, inputs: Any, calls: int = 5) -> list[Tensor]:
    """Return the outputs of some calls that start from one global state."""
    states = GENERATOR.bit_generator.state, PYTHON_GENERATOR.getstate(), TORCH_GENERATOR.get_state()
    counts, around = dict(COUNTS), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    outputs = [module(*inputs).detach() for _ in range(calls)]
    GENERATOR.bit_generator.state = states[0]
    PYTHON_GENERATOR.setstate(states[1])
    TORCH_GENERATOR.set_state(states[2])
    COUNTS.update(counts)
    torch.set_rng_state(around[0])
    np.random.set_state(around[1])
    random.setstate(around[2])
    return outputs


@functools.lru_cache
def cached_table(length: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.5, 2, length, dtype=dtype)[:, None]


@functools.cache
def cached_factor(batch: int) -> float:
    return 1.0 + batch


TABLES: dict[int, Tensor] = {}


def from_a_cached_table(x: Tensor, mask: Tensor) -> Tensor:
    return x * cached_table(x.shape[1], x.dtype)


def from_a_cached_number(x: Tensor, mask: Tensor) -> Tensor:
    return x * cached_factor(x.shape[0])


def from_a_global_dict(x: Tensor, mask: Tensor) -> Tensor:
    n = int(x.shape[1])
    if n not in TABLES:
        TABLES[n] = torch.linspace(0.5, 2, n)[:, None]
    return x * TABLES[n]


CACHED = [from_a_cached_table, from_a_cached_number, from_a_global_dict]


@pytest.fixture
def _empty_caches() -> None:
    cached_table.cache_clear()
    cached_factor.cache_clear()
    TABLES.clear()
    COUNTS.clear()
    COUNTS["calls"] = 0


@pytest.mark.usefixtures("_empty_caches")
@on_hosts(CACHED, "block", "child", "root")
def test_functions_with_a_cache(act: Act, host: Host) -> None:
    trials = [Trial((features(3, 7), ones(3, 7)), calls=2)]
    hold(act, host, trials, demand="right_or_refused")


@pytest.mark.usefixtures("_empty_caches")
@pytest.mark.parametrize("act", CACHED, ids=lambda act: act.__name__)
def test_no_stand_in_stays_in_a_cache(act: Act) -> None:
    """What an analysis puts there must serve the dense model, in every way, afterwards."""
    net, example = Net(Block(act), Block()), (features(2, 6), ones(2, 6))
    blockprune.find_blocks(net, example)
    for table in (cached_table(6, torch.float32), *TABLES.values()):
        assert type(table) is Tensor
        assert not table.is_meta
        assert not table.is_inference()
        assert torch.equal(table, torch.linspace(0.5, 2, 6)[:, None])
    assert type(cached_factor(2)) is float
    net(*example).sum().backward()


@pytest.mark.usefixtures("_empty_caches")
@pytest.mark.parametrize("act", [*CACHED, global_counter], ids=lambda act: act.__name__)
def test_caches_are_as_they_were(act: Act) -> None:
    net, example = Net(Block(act), Block()), (features(), ones())
    blockprune.find_blocks(net, example)
    assert cached_table.cache_info().currsize == 0
    assert cached_factor.cache_info().currsize == 0
    assert TABLES == {}
    assert COUNTS == {"calls": 0}


class ClassState(Block):
    """Counts on its class, which all its instances share."""

    calls = 0

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        ClassState.calls += 1
        return x + self.f(x)


def test_a_counter_on_a_class_stays() -> None:
    ClassState.calls = 7
    net = Net(ClassState(), Block())
    blockprune.find_blocks(net, (features(), ones()))
    blockprune.remove_blocks(net, "blocks.1", (features(), ones()))
    assert ClassState.calls == 7


# ---------------------------------------------------------- modes of torch and islands of them


def asks_for_autocast(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if torch.is_autocast_enabled("cpu") else x


def asks_for_the_dtype_of_autocast(x: Tensor, mask: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu")) * 5
    return x


def asks_for_any_autocast(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if torch._C._is_any_autocast_enabled() else x


def asks_for_gradients(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if torch.is_grad_enabled() else x


def asks_for_no_gradients(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if not torch.is_grad_enabled() else x


def asks_for_inference(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if torch.is_inference_mode_enabled() else x


def asks_whether_it_needs_gradients(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if x.requires_grad else x


def asks_for_its_history(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if x.grad_fn is not None else x


def asks_whether_it_is_a_leaf(x: Tensor, mask: Tensor) -> Tensor:
    return x * 5 if x.is_leaf else x


def asks_for_the_default_dtype(x: Tensor, mask: Tensor) -> Tensor:
    return x * torch.tensor(2.0).element_size() + torch.linspace(0, 1, WIDTH).to(x.dtype)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# A gradient is summed in an order that a removed branch can change, and here in bfloat16.
LOW = 2 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps

INPUTS = (features(3, 4), padded(3, 4))
MODES = [
    Trial(INPUTS, within=autocast, ulps=1, gradient_ulps=LOW),
    Trial(INPUTS, within=torch.no_grad),
    Trial(INPUTS, within=torch.inference_mode),
]


@on_hosts(
    [
        asks_for_autocast,
        asks_for_the_dtype_of_autocast,
        asks_for_any_autocast,
        asks_for_gradients,
        asks_for_no_gradients,
        asks_for_inference,
        asks_whether_it_needs_gradients,
        asks_for_its_history,
        asks_whether_it_is_a_leaf,
    ],
    *("block", "child"),
)
def test_a_mode_that_is_asked_for(act: Act, host: Host) -> None:
    # A flag is followed or guarded, wherever it is asked for.
    loose = Host(host.build, host.cut, host.preserve_root)
    hold(act, loose, MODES, demand="right_or_refused")


@on_hosts([asks_for_autocast, asks_for_gradients, asks_whether_it_needs_gradients], "kept_root")
def test_a_mode_that_a_kept_root_asks_for(act: Act, host: Host) -> None:
    hold(act, host, MODES, demand="right")


@pytest.mark.parametrize("act", [asks_for_gradients, asks_for_autocast], ids=lambda a: a.__name__)
@pytest.mark.parametrize("within", [torch.no_grad, autocast], ids=["no_grad", "autocast"])
def test_a_cut_made_inside_a_mode(act: Act, within: Callable[[], Any]) -> None:
    net = Net(Block(act), Block())
    with within():
        try:
            ticket = blockprune.remove_blocks(net, "blocks.1", (features(), ones()))
        except blockprune.BlockpruneError:
            return
    for trial in (
        Trial((features(), padded()), within=within, ulps=1, gradient_ulps=LOW),
        Trial(INPUTS),
    ):
        try:
            assert_alike(copy.deepcopy(ticket), reference(net, "blocks.1.f"), trial)
        except blockprune.BlockpruneError as error:
            assert_that_it_says_why(error)


def island_of_no_grad(x: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean()
    return x * scale


def island_of_gradients(x: Tensor, mask: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x * x.mean()
    return y * 2


def island_by_a_flag(x: Tensor, mask: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = x.abs().amax(-1, keepdim=True)
    return x / scale


def set_and_set_back(x: Tensor, mask: Tensor) -> Tensor:
    was = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    scale = x.abs().mean()
    torch.set_grad_enabled(was)
    return x * scale


@torch.no_grad()
def scale_without_gradients(x: Tensor) -> Tensor:
    return x.abs().mean(-1, keepdim=True)


def decorated(x: Tensor, mask: Tensor) -> Tensor:
    return x * scale_without_gradients(x)


def detached(x: Tensor, mask: Tensor) -> Tensor:
    return x * x.detach().abs().mean() + x.data.mean()


def straight_through(x: Tensor, mask: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


class Reversed(torch.autograd.Function):
    """Turns gradients around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


def own_function(x: Tensor, mask: Tensor) -> Tensor:
    return Reversed.apply(x)  # type: ignore[no-any-return]


def hook_on_a_gradient(x: Tensor, mask: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.5)
    return y


def gradient_inside(x: Tensor, mask: Tensor) -> Tensor:
    """Descend along an energy, as models of energies do."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        [gradient] = torch.autograd.grad((y**3).sum(), y)
    return x - 0.1 * gradient


def island_of_no_autocast(x: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x.float()
        return (y @ y.transpose(1, 2)).softmax(-1) @ y


def island_of_autocast(x: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = x @ x.transpose(1, 2)
    return scores.float().softmax(-1) @ x.float()


@torch.autocast("cpu", enabled=False)
def product(x: Tensor) -> Tensor:
    return x.float() @ x.float().transpose(1, 2)


def decorated_without_autocast(x: Tensor, mask: Tensor) -> Tensor:
    return product(x).softmax(-1) @ x.float()


def inference_island(x: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = float(x.abs().mean())
    return x * scale


ISLANDS: list[Act] = [
    island_of_no_grad,
    island_of_gradients,
    island_by_a_flag,
    set_and_set_back,
    decorated,
    detached,
    straight_through,
    own_function,
    hook_on_a_gradient,
    gradient_inside,
    island_of_no_autocast,
    island_of_autocast,
    decorated_without_autocast,
    inference_island,
]


@on_hosts(ISLANDS, "block")
def test_an_island_stays_an_island(act: Act, host: Host) -> None:
    """The gradients of the example show a lost island; the mode around it must act too."""
    hold(act, host, [*MODES[:2], Trial(INPUTS, train=True)], demand="right_or_refused")


@on_hosts([island_of_no_grad, island_of_no_autocast, decorated, detached], "root", "kept_root")
def test_an_island_elsewhere(act: Act, host: Host) -> None:
    hold(act, host, MODES[:2], demand="right_or_refused")


@pytest.mark.parametrize("act", [island_of_no_grad, decorated], ids=lambda act: act.__name__)
def test_an_everyday_island_hides_no_block(act: Act) -> None:
    net = Net(Block(act), Block())
    assert blockprune.find_blocks(net, (features(), ones())).names == ("blocks.0", "blocks.1")


class FrozenPart(nn.Module):
    """A frozen stem that runs without gradients, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.training):
            x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("cut", ["stem", "blocks.0"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_blocks_inside_an_island(cut: str, preserve_root: bool) -> None:
    right_or_refused(
        FrozenPart(),
        features(),
        [Trial(features(seed=2), train=True), Trial(features(), within=torch.no_grad)],
        cut=cut,
        zero=f"{cut}.f",
        preserve_root=preserve_root,
    )


class PostNorm(nn.Module):
    """Under autocast a norm returns float32: the merge is float32, and its shortcut is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.f = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(functional.gelu(self.linear(x)))


def test_a_branch_that_autocast_makes_wider() -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), PostNorm(), PostNorm())
    right_or_refused(
        net,
        features(),
        [Trial(features(3), within=autocast, gradient_ulps=LOW)],
        cut="2",
        zero="2.f",
    )
    right_or_refused(
        net,
        features(),
        [Trial(features(3), within=autocast, gradient_ulps=LOW)],
        cut="1",
        zero="1.f",
    )
