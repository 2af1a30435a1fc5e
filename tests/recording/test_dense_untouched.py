"""The dense model is never changed, neither by the package nor by its own forward.

Each forward here writes: into its weights, its buffers, its attributes. After an analysis, a score,
a cut and a pruning, the model and all that is global are bit for bit what they were.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from tests.recording.law import (
    Trial,
    assert_that_it_says_why,
    reference,
    right_or_refused,
    same,
    untouched,
)
from tests.recording.nets import WIDTH, Block, features


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.f.weight.data.clamp_(-0.01, 0.01)
        return x + self.f(x)


class ClampedWithoutGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.f.weight.clamp_(-0.01, 0.01)
            self.f.bias.mul_(0.5)
        return x + self.f(x)


class ReplacedData(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.f.weight.data = functional.normalize(self.f.weight.data, dim=1)
        return x + self.f(x)


class SlicedData(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.f.weight.data[0] = 0.25
        self.f.bias.data.copy_(self.f.bias.data.abs())
        return x + self.f(x)


class FilledByInit(Block):
    def forward(self, x: Tensor) -> Tensor:
        nn.init.constant_(self.f.bias, 0.5)
        return x + self.f(x)


class Renormalised(Block):
    """Limits the norms of its rows, as maximum norm regularisation by hand does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.f.weight.renorm_(2, 0, 0.1)
        return x + self.f(x)


class ActNorm(Block):
    """Sets its scale by the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("ready", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.ready.item() == 0:
            self.scale.data.copy_(1 / (x.detach().flatten(0, -2).std(0) + 1e-3))
            self.ready.fill_(1)
        return x + self.f(x) * self.scale


class ActNormByFlag(ActNorm):
    """The same by a Python attribute, on the first batch of training."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.is_ready:
            self.scale.data = 1 / (x.detach().flatten(0, -2).std(0) + 1e-3)
            self.is_ready = True
        return x + self.f(x) * self.scale


class Momentum(Block):
    """A moving average in a buffer, written in place in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().flatten(0, -2).mean(0), 0.1)
        return x + self.f(x) - self.mean * 0


class BufferReplaced(Momentum):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean + 1
        return x + self.f(x) + self.mean * 0.01


class Attributes(Block):
    """Leaves things on itself."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.shape = x.shape
        self.count = getattr(self, "count", 0) + 1
        return x + self.f(x)


class Collects(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.by_name: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        self.by_name["last"] = x.shape
        return x + self.f(x)


class AddsABuffer(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.linspace(0, 1, WIDTH))
        return x + self.f(x) * self.table


class AddsAModule(Block):
    """Makes a layer at the first call, as lazy modules do."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(x.shape[-1], WIDTH)
            nn.init.eye_(self.late.weight)
            nn.init.zeros_(self.late.bias)
        return x + self.f(self.late(x))


class Spectral(Block):
    """Power iteration, which writes into buffers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.f = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class RequiresGrad(Block):
    """Turns the gradients of a weight off and on."""

    def forward(self, x: Tensor) -> Tensor:
        self.f.bias.requires_grad_(False)
        return x + self.f(x)


class ChangesMode(Block):
    """Puts a child into evaluation whatever the mode, as frozen norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return x + self.f(self.norm(x.flatten(0, 1)).view_as(x))


class WritesItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.f(x)
        x.add_(y)
        return x


WRITERS: list[type[Block]] = [
    Clamped,
    ClampedWithoutGradients,
    ReplacedData,
    SlicedData,
    FilledByInit,
    Renormalised,
    ActNorm,
    ActNormByFlag,
    Momentum,
    BufferReplaced,
    Attributes,
    Collects,
    AddsABuffer,
    AddsAModule,
    Spectral,
    RequiresGrad,
    ChangesMode,
    WritesItsInput,
]


def find(model: nn.Module, x: Any) -> None:
    blockprune.find_blocks(model, x)


def find_layers(model: nn.Module, x: Any) -> None:
    blockprune.find_blocks(model, x, "layer", preserve_root=True)


def remove(model: nn.Module, x: Any) -> None:
    blockprune.remove_blocks(model, "2", x)


def score(model: nn.Module, x: Any) -> None:
    targets = torch.zeros(x.shape[0], 3)
    blockprune.score_blocks(
        model,
        "grad_norm",
        (x, targets),
        loss_fn=lambda y, t: (y.flatten(1).mean(1) - t[:, 0]).sum(),
    )


def score_by_outputs(model: nn.Module, x: Any) -> None:
    blockprune.score_blocks(model, "block_influence", (x, torch.zeros(x.shape[0], 3)))


def prune(model: nn.Module, x: Any) -> None:
    blockprune.prune(model, "l1", 1, example_inputs=x)


USES = [find, find_layers, remove, score, score_by_outputs, prune]
Use = Callable[[nn.Module, Any], None]


def carried_out(use: Use, model: nn.Module, x: Any) -> None:
    """Use the package; it may refuse the model, but not change it."""
    with untouched(model):
        try:
            use(model, x)
        except blockprune.BlockpruneError as error:
            assert_that_it_says_why(error)


@pytest.mark.parametrize("kind", WRITERS, ids=lambda kind: kind.__name__)
def test_nothing_is_written(kind: type[Block]) -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), Plain()), features(seed=3)
    for use in USES:
        carried_out(use, model, x)
    assert torch.equal(x, features(seed=3)), "the example was written into"


@pytest.mark.parametrize("kind", WRITERS, ids=lambda kind: kind.__name__)
def test_nor_in_evaluation_and_with_gradients_there(kind: type[Block]) -> None:
    model, x = nn.Sequential(kind(), Plain(), Plain()).eval(), features(seed=3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].f.weight.requires_grad_(False)
    carried_out(find, model, x)
    carried_out(remove, model, x)


@pytest.mark.parametrize("use", USES[:4], ids=lambda use: use.__name__)
@pytest.mark.parametrize(
    "embedding",
    [
        lambda: nn.Embedding(10, WIDTH, max_norm=0.5),
        lambda: nn.Embedding(10, WIDTH, max_norm=0.5, norm_type=1.0, padding_idx=0),
        lambda: nn.Embedding(10, WIDTH, max_norm=0.5, scale_grad_by_freq=True),
        lambda: FunctionalEmbedding(),
        lambda: nn.EmbeddingBag(10, WIDTH, max_norm=0.5),
    ],
    ids=["plain", "padding", "by_frequency", "functional", "bag"],
)
def test_embeddings_with_a_largest_norm(embedding: Callable[[], nn.Module], use: Use) -> None:
    model = nn.Sequential(embedding(), Plain(), Plain())
    tokens = torch.arange(10).reshape(2, 5)
    before = copy.deepcopy(model.state_dict())
    if use is score:
        carried_out(score_by_tokens, model, tokens)
    else:
        carried_out(use, model, tokens)
    same(dict(model.state_dict()), dict(before), ulps=0)


def score_by_tokens(model: nn.Module, x: Any) -> None:
    blockprune.score_blocks(model, "synflow", (x, torch.zeros(x.shape[0])))


class FunctionalEmbedding(nn.Module):
    """Looks rows up by the function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.table, max_norm=0.5)


@pytest.mark.parametrize("cut", ["1", "2"])
def test_the_ticket_of_an_embedding_with_a_largest_norm(cut: str) -> None:
    model = nn.Sequential(nn.Embedding(10, WIDTH, max_norm=0.5), Plain(), Plain())
    tokens = torch.arange(10).reshape(2, 5)
    trials = [Trial(torch.tensor([[3, 3, 1]])), Trial(tokens.flip(1), train=True, calls=2)]
    right_or_refused(model, tokens, trials, cut=cut, zero=f"{cut}.f")


@pytest.mark.parametrize(
    "kind",
    [Clamped, ClampedWithoutGradients, ReplacedData, SlicedData, Renormalised, Spectral, Collects],
    ids=lambda kind: kind.__name__,
)
def test_the_ticket_of_a_writer_writes_for_itself(kind: type[Block]) -> None:
    """The ticket's own weights are written by its forward, the dense model's never."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), Plain())
    with untouched(model):
        try:
            ticket = blockprune.remove_blocks(model, "2", features())
        except blockprune.BlockpruneError as error:
            assert_that_it_says_why(error)
            return
        x = features(3, 4, seed=5)
        expected = reference(model, "2.f")
        for _ in range(2):
            same(ticket(x), expected(x))
        state = expected.state_dict()
        for name, tensor in ticket.state_dict().items():
            same(tensor, state[name])


class Counting:
    """A hook that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.filterwarnings("ignore:the hooks of:UserWarning")
def test_hooks_neither_run_nor_vanish() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Plain(), Plain()), features()
    forward, before, backward = Counting(), Counting(), Counting()
    model[0].register_forward_hook(forward)
    model[0].register_forward_pre_hook(before)
    model[0].register_full_backward_hook(backward)
    model[0].weight.register_hook(backward)
    for use in USES:
        carried_out(use, model, x)
    assert (forward.calls, before.calls, backward.calls) == (0, 0, 0)
    model(x.requires_grad_()).sum().backward()
    assert (forward.calls, before.calls, backward.calls) == (1, 1, 2)


TABLE: dict[str, Any] = {"last": torch.zeros(1), "counts": {"calls": 0}}
MEAN = torch.zeros(())
NUMBERS = np.zeros(2)


class Record:
    calls = 0


RECORD = Record()


class OfTheWorld(Block):
    """Keeps what it saw where other code finds it."""

    kept: ClassVar[dict[str, Tensor]] = {"last": torch.zeros(1)}

    def forward(self, x: Tensor, mask: Any = None, seen: list[int] = []) -> Tensor:  # noqa: B006
        TABLE["last"] = self.kept["last"] = x.detach().mean()
        TABLE["counts"]["calls"] += 1
        MEAN.mul_(0.9).add_(x.detach().mean())
        NUMBERS[0] += 1
        RECORD.calls += 1
        seen.append(1)
        noted.calls = getattr(noted, "calls", 0) + 1  # type: ignore[attr-defined]
        noted()
        return x + self.f(x)


def noted() -> None:
    """Do nothing; it is what it carries that counts."""


def world() -> Any:
    """Return all that `OfTheWorld` writes into."""
    tensors = TABLE["last"], OfTheWorld.kept["last"], MEAN
    numbers = NUMBERS.tolist(), RECORD.calls, getattr(noted, "calls", 0)
    return (
        [float(t) for t in tensors],
        dict(TABLE["counts"]),
        numbers,
        OfTheWorld.forward.__defaults__,
    )


@pytest.mark.parametrize("use", [find, remove, score])
def test_what_is_outside_the_model_is_put_back(use: Use) -> None:
    model = nn.Sequential(OfTheWorld(), Block(), OfTheWorld())
    before = copy.deepcopy(world())
    carried_out(use, model, features())
    assert world() == before


class Closure(Block):
    """Calls its modules by a function that remembers the block it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.normed = lambda x: self.f(self.norm(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.normed(x)


@pytest.mark.parametrize("use", [find, remove, score])
def test_a_function_that_remembers_modules_runs_those_of_the_copy(use: Use) -> None:
    model = nn.Sequential(Closure(), Block(), Closure())
    with untouched(model):
        carried_out(use, model, features())


class Backward(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        with torch.enable_grad():
            self.f(x.detach()).sum().backward()
        return x + self.f(x)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_backward_pass_in_a_forward_leaves_no_gradients(has_gradients: bool) -> None:
    model = nn.Sequential(Backward(), Block(), Backward())
    if has_gradients:
        model(features())
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    carried_out(find, model, features())
    for weight, gradient in zip(model.parameters(), before, strict=True):
        assert (weight.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(weight.grad, gradient)


@functools.cache
def table(length: int) -> Tensor:
    return torch.rand(length, 1)


class Cached(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(x * table(x.shape[1]))


def test_a_cache_that_is_filled_keeps_what_it_holds() -> None:
    model = nn.Sequential(Cached(), Block())
    before = model(features()), model(features(2, 4))
    carried_out(find, model, features(3, 6))
    assert all(map(torch.equal, before, (model(features()), model(features(2, 4)))))


class Asks(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            x = x * 1
        return x + self.f(x.reshape(x.shape[0], -1, WIDTH))


def test_several_threads_leave_the_functions_of_torch_as_they_were() -> None:
    watched = "is_grad_enabled", "is_autocast_enabled", "autocast_increment_nesting"
    before = [getattr(torch, name) for name in watched]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        nets = [nn.Sequential(*[Asks() for _ in range(8)], nn.Dropout(0.5)) for _ in range(12)]
        found = list(pool.map(lambda net: blockprune.find_blocks(net, features()).names, nets))
        tickets = list(pool.map(lambda net: blockprune.remove_blocks(net, "1", features()), nets))
    assert found == [tuple(map(str, range(8)))] * 12
    assert all(blockprune.plan_of(ticket).remove == ("1",) for ticket in tickets)
    assert [getattr(torch, name) for name in watched] == before
