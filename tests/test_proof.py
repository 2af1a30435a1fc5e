"""The proof sees what initial weights, the example inputs and eager mode would hide.

Most models here do something else while they are analysed than later on, so that what was recorded
of them is wrong in one way each, whatever records them. The oracle is that the same model without
the difference passes.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import (
    TraceError,
    VerificationError,
    raise_if_out_of_memory,
)
from blockprune.filters import (
    filter_layers,
    filter_scores,
    make_filter_plan,
    removal,
    remove_filters,
)
from blockprune.randomness import AlikeDraws
from blockprune.surgery import cut_blocks, record_of
from blockprune.surgery.hiding import changed_weights, changes_of, other_calls
from blockprune.tracing import Call

D = 8
HALF = {torch.float16, torch.bfloat16}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A residual block that may do something that was not recorded."""

    differs: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.twist(self.f(x)) if Block.differs else x + self.f(x)

    def twist(self, y: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _as_recorded() -> Iterator[None]:
    yield
    Block.differs = False


def cut(
    model: nn.Module,
    inputs: Any,
    differs: bool,
    name: str = "2",
    *,
    verify: bool = True,
    **how: Any,
) -> nn.Module:
    """Return the ticket of a model that does, or does not, what was recorded of it."""
    torch.manual_seed(0)
    analysis = blockprune.find_blocks(model, inputs, **how)
    plan = blockprune.make_plan(
        analysis, {block: float(block != name) for block in analysis.names}, p=1
    )
    Block.differs = differs
    return cut_blocks(model, analysis, plan, verify=verify)


def in_a_row(kind: type[Block]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), kind(), kind())


class BehindZero(Block):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + self.alpha * (y * 100 if Block.differs else y)


class BehindZeroNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + self.norm(y.flip(-1) if Block.differs else y)


class SmallBatches(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y * 10 if y.shape[0] in {1, 2} else y


class OneSample(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y.squeeze() * 2 if y.shape[0] == 1 else y


class ShortSequences(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y * 10 if y.shape[1] < 6 else y


class InHalf(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y.clamp(-0.01, 0.01) if y.dtype in HALF else y


class AutocastOff(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y * 2 if torch.is_autocast_enabled("cpu") else y


class MoreGradient(Block):
    def twist(self, y: Tensor) -> Tensor:
        return y + 2 * (y - y.detach())


class MoreGradientInTraining(MoreGradient):
    def twist(self, y: Tensor) -> Tensor:
        return super().twist(y) if self.training else y


class HookedGradient(Block):
    def twist(self, y: Tensor) -> Tensor:
        if self.training and y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3)
        return y


WRONG: dict[str, tuple[type[Block], tuple[int, ...], str]] = {
    "zero scale": (BehindZero, (5, D), "eval mode"),
    "zero norm": (BehindZeroNorm, (5, D), "eval mode"),
    "small batches": (SmallBatches, (5, D), r"eval mode \(2x8\)"),
    "one sample": (OneSample, (5, D), r"eval mode \(1x8\)"),
    "one sample of two": (OneSample, (2, D), r"eval mode \(1x8\)"),
    "two samples of one": (SmallBatches, (3, D), r"eval mode \(2x8\)"),
    "short sequences": (ShortSequences, (2, 11, D), r"eval mode \(1x5x8\)"),
    "half precision": (InHalf, (5, D), r"eval mode \(autocast\)"),
    "autocast": (AutocastOff, (5, D), r"eval mode \(autocast\)"),
    "gradient": (MoreGradient, (5, D), "eval mode: the gradient of"),
    "gradient in training": (MoreGradientInTraining, (5, D), "train mode: the gradient of"),
    "hook in training": (HookedGradient, (5, D), "train mode: the gradient of"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kept", [False, True], ids=["graph", "kept root"])
def test_a_wrong_recording_is_refused(case: str, kept: bool) -> None:
    kind, shape, where = WRONG[case]
    model, x = in_a_row(kind), numbers(*shape)
    # One of the blocks that stay is wrong: a root that is kept calls those, and they are right.
    how = {} if not kept else {"preserve_root": True}
    ticket = cut(model, x, differs=False, **how)
    assert record_of(ticket).verified == ("eval", "train")  # type: ignore[union-attr]
    if not kept:
        with pytest.raises(VerificationError, match=where):
            cut(model, x, differs=True)


class Attention(Block):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        a = q @ k.transpose(-1, -2)
        if Block.differs:
            a = a.masked_fill(mask[:, None, :] == 0, -1e9)
        return x + a.softmax(-1) @ v


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention(), Block()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x, mask), mask)
        return x + self.layers[2].f(x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_that_hides_nothing_in_the_example(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = (numbers(2, 5, D), torch.ones(2, 5, dtype=dtype))
    assert cut(Masked(), inputs, differs=False, name="layers.0") is not None
    with pytest.raises(VerificationError, match=r"eval mode \(1x3x8, 1x3\)"):
        cut(Masked(), inputs, differs=True, name="layers.0")


class Latents(nn.Module):
    """Latents of batch one, which take the batch size of what they look at."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(numbers(1, 3, D))
        self.norm = nn.LayerNorm(D)
        self.f = nn.Linear(D, D)
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.start)
        return self.head(z + self.f((z @ x.transpose(-1, -2)).softmax(-1) @ x))


def test_an_example_of_batch_one() -> None:
    model, x = Latents(), numbers(1, 5, D)
    analysis = blockprune.find_blocks(model, x)
    for name in analysis.names:
        with pytest.raises(VerificationError, match="eval mode"):
            blockprune.remove_blocks(model, name, x)


# --- shortened lists ----------------------------------------------------------------------------


class ByParity(nn.Module):
    """A list whose layers see their input turned round at every other place."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = layer(x.flip(-1)).flip(-1) if n % 2 else layer(x)
        return x


class Constant(Block):
    """A block that is symmetric at initialisation: it does not see which way its input goes."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.f.weight, 0.1)
        nn.init.zeros_(self.f.bias)


@pytest.mark.parametrize("make", [BehindZero, Constant], ids=["zero", "symmetric"])
def test_a_shorter_list_that_counts_its_layers_is_refused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = ByParity(make), numbers(3, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ticket = blockprune.remove_blocks(model, "layers.1", x, preserve_root=True)
    assert len(ticket.layers) == 4
    reference = copy.deepcopy(model)
    reference.layers[1] = nn.Identity()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(numbers(*parameter.shape, seed=len(name)))
            dict(ticket.named_parameters())[name].copy_(parameter)
    torch.testing.assert_close(ticket.eval()(x), reference.eval()(x))


def test_clones_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.surgery import settle

    layer = Block()
    model = ByParity(lambda: copy.deepcopy(layer))
    model.forward = lambda x: model.layers[3](model.layers[2](model.layers[1](model.layers[0](x))))  # type: ignore[method-assign]
    listed = nn.Sequential(*model.layers)

    def another(ticket: nn.Module, gone: Any) -> None:
        del ticket._modules["2"]

    monkeypatch.setattr(settle, "take_out", another)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ticket = blockprune.remove_blocks(listed, "1", numbers(3, D), preserve_root=True)
    # A layer of equal weights went instead; only what they become in training tells.
    assert not any(name.startswith("1.") for name in ticket.state_dict())
    assert any(name.startswith("2.") for name in ticket.state_dict())


# --- filters ------------------------------------------------------------------------------------


class Narrowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.conv2(self.conv1(x).relu())


def test_a_wrong_cut_of_filters_before_a_weight_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Narrowed(), numbers(3, 3, 8, 8)
    layers = filter_layers(model, x)
    scores = filter_scores(model, "l1", None, example_inputs=x)
    plan = make_filter_plan(layers, scores, count=2)
    remove_filters(model, plan, x)
    right = removal.fitted_filters

    def wrong(state: Any, plan: Any) -> dict[str, Tensor]:
        fitted = right(state, plan)
        return {n: t.flip(0) if n.startswith("conv1") else t for n, t in fitted.items()}

    monkeypatch.setattr(removal, "fitted_filters", wrong)
    with pytest.raises(VerificationError, match="read as zero, in eval mode"):
        remove_filters(model, plan, x)


# --- what is compared is written down -------------------------------------------------------------


def test_the_record_says_what_was_compared() -> None:
    record = record_of(cut(in_a_row(BehindZero), numbers(5, D), differs=False))
    assert record is not None
    assert record.verified == ("eval", "train")
    assert record.compared == (
        "eval: outputs, 5 gradients",
        "train: outputs, 5 gradients",
        "eval, 2x8: outputs",
        "eval, 1x8: outputs",
        "eval, autocast: outputs",
    )
    unproved = record_of(cut(in_a_row(BehindZero), numbers(5, D), False, verify=False))
    assert unproved is not None
    assert (unproved.verified, unproved.compared) == ((), ())


def test_the_model_and_the_ticket_keep_their_weights() -> None:
    model = in_a_row(BehindZero)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    ticket = cut(model, numbers(5, D), differs=False)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(p.equal(before[name]) for name, p in ticket.named_parameters())


def test_a_ticket_that_refuses_other_inputs_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def guard(x: Tensor) -> Tensor:
        if len(x) != 5:
            raise TraceError("this ticket was cut with 5 samples")
        return x

    from blockprune.surgery import remove

    right = remove.ticket_graph

    def guarded(*args: Any) -> Any:
        graph = right(*args)
        [output] = (n for n in graph.nodes if n.op == "output")
        with graph.inserting_before(output):
            output.args = (graph.call_function(guard, output.args),)
        return graph

    monkeypatch.setattr(remove, "ticket_graph", guarded)
    record = record_of(cut(in_a_row(BehindZero), numbers(5, D), differs=False))
    assert record is not None
    assert record.compared[:2] == ("eval: outputs, 5 gradients", "train: outputs, 5 gradients")
    assert not any("2x8" in text for text in record.compared)


# --- changed weights and inputs -------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.two.weight = self.one.weight
        self.lstm = nn.LSTM(D, D)
        nn.init.zeros_(self.one.weight)
        nn.init.zeros_(self.lstm.bias_hh_l0)


def test_tied_weights_are_changed_together_and_alike_by_name() -> None:
    model = Tied()
    changes = changes_of(model)
    assert {"one.weight", "two.weight", "lstm.bias_hh_l0"} <= set(changes)
    first, second = (changed_weights(copy.deepcopy(model), changes) for _ in range(2))
    assert first.one.weight is first.two.weight
    assert first.one.weight.count_nonzero() == D * D
    assert any(weight is first.lstm.bias_hh_l0 for weight in first.lstm._flat_weights)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_other_calls_turn_masks_and_keep_ids_in_their_range() -> None:
    ids = torch.tensor([[3, 9, 4, 4], [7, 3, 5, 5]])
    masks = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.long)
    call = Call((ids, *masks), {})
    ways, besides = other_calls(call)
    for each in [*ways, *besides]:
        found, flags, counts = each.args
        assert found.min() >= 3
        assert found.max() <= 9
        assert flags[:, 0].all()
        assert counts[:, 0].all()
        assert found.shape == flags.shape == counts.shape
    [values] = [way for way in ways if way.args[0].shape == (2, 4) and not way.args[0].equal(ids)]
    assert values.args[1].tolist() == [[True, True, False, False]] * 2
    assert values.args[2].tolist() == [[1, 1, 0, 0]] * 2
    assert [len(each.args[0]) for each in besides] == [3]


def test_draws_of_python_and_numpy_are_alike_by_module() -> None:
    import random

    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * random.random()

    model = Drawing()
    with AlikeDraws({model: "here"}):
        random.seed(1)
        first = model(torch.ones(1))
        random.seed(2)
        second = model(torch.ones(1))
    assert first.equal(second)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    assert float(model(torch.ones(1))) == pytest.approx(expected)


# --- memory ---------------------------------------------------------------------------------------

NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 16777216 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_MEMORY),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["cpu", "python", "cuda", "c++", "system"],
)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(error)
    outer = TraceError("does not run")
    outer.__cause__ = error
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(outer)
    raise_if_out_of_memory(ValueError("sizes differ"))


class Greedy(Block):
    """A block that runs out of memory at a certain call."""

    # An iterator cannot be wound back, as other state is before each run of a proof.
    calls: ClassVar[Iterator[int]] = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        if next(Greedy.calls, None) is None:
            raise RuntimeError(NO_MEMORY)
        return x + self.f(x)


def test_running_out_of_memory_is_never_a_weaker_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, refused = nn.Sequential(nn.Linear(D, D), BehindZero(), Greedy()), numbers(5, D), 0
    analysis = blockprune.find_blocks(model, x, leaf_modules=[Greedy])
    plan = blockprune.make_plan(analysis, dict.fromkeys(analysis.names, 0.0), p=1)
    whole = record_of(cut_blocks(model, analysis, plan))
    for calls in range(40):
        monkeypatch.setattr(Greedy, "calls", iter(range(calls)))
        try:
            found = record_of(cut_blocks(model, analysis, plan))
        except MemoryError:
            refused += 1
        else:
            assert found is not None
            assert whole is not None
            assert found.compared == whole.compared
    assert 5 < refused < 40


def test_a_backward_pass_without_memory_is_no_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def grad(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(MemoryError, match="can't allocate memory"):
        cut(in_a_row(BehindZero), numbers(5, D), differs=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_process_short_of_memory() -> None:
    script = """
    import resource, torch, blockprune
    from torch import nn
    from blockprune.surgery import cut_blocks, record_of

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(2048, 2048)
        def forward(self, x):
            return x + self.f(x)

    torch.set_num_threads(1)
    model = nn.Sequential(*[Block() for _ in range(8)])
    x = torch.randn(2, 2048)
    model(x).sum().backward()
    model.zero_grad()
    analysis = blockprune.find_blocks(model, x)
    plan = blockprune.make_plan(analysis, {name: 0.0 for name in analysis.names}, p=1)
    weights = sum(p.numel() * 4 for p in model.parameters())
    sizes = dict(line.split(":") for line in open("/proc/self/status"))
    now = int(sizes["VmSize"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + int(1.7 * weights),) * 2)
    try:
        print("verified", record_of(cut_blocks(model, analysis, plan)).compared)
    except MemoryError:
        print("MemoryError")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "MemoryError", done.stdout + done.stderr


class Catches(nn.Module):
    """Goes another way at another batch size, where what it tries raises."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = x.view(2, 5, 4) * 10
        except RuntimeError:
            y = x
        return x + self.f(y)


def test_the_reference_runs_as_the_model_does_at_other_batch_sizes() -> None:
    """It follows the graph once, to learn which additions to zero, and never again."""
    with pytest.raises(VerificationError, match=r"fails where .* runs, in eval mode"):
        blockprune.remove_blocks(nn.Sequential(Catches(), Catches()), "1", torch.randn(2, 5, 4))
