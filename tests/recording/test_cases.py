"""Small models that were seen to fail, in words of their own, with the right values asserted."""

from __future__ import annotations

import copy
import io
import pickle
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
    same,
)
from tests.recording.nets import WIDTH, Block, Net, features, ones, padded

# --------------------------------------------------------- a branch that is zero at the start


class Gated(nn.Module):
    """A residual block that starts with a gate of zero."""

    def __init__(self, inside: str) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.inside = inside
        self.gate = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.inside == "type" and isinstance(x, Tensor):
            y = y * 100
        if self.inside == "mode":
            y = y * 5 if self.training else y
        if self.inside == "autocast" and not torch.is_autocast_enabled("cpu"):
            y = y * 5
        if self.inside == "island":
            with torch.no_grad():
                y = y + self.f(x)
        if self.inside == "scale":
            return x + functional.gelu(y) * self.scale
        return x + self.gate * y


@pytest.mark.parametrize("inside", ["type", "mode", "autocast", "island", "scale"])
def test_a_gate_of_zero_hides_nothing(inside: str) -> None:
    """The gradient of the gate shows what is behind it, and so does the gate once it opens."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Gated(inside), Gated(inside))
    nn.init.ones_(model[2].gate)
    nn.init.ones_(model[2].scale)

    def opened(module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in ("1.gate", "1.scale"):
                nn.init.constant_(parameter, 0.7)

    # What goes ends in its gate; in the example the other gate is closed.
    zero = "2.scale" if inside == "scale" else "2.gate"
    right_or_refused(
        model,
        features(),
        [Trial(features(), prepare=opened), Trial(features(3), True, prepare=opened)],
        cut="2",
        zero=zero,
    )


def test_norms_that_start_with_zero_hide_nothing() -> None:
    """The last norm of a branch starts with a weight of zero, as in many ResNets."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            y = y if isinstance(x, list) else y * 3
            return x + self.norm(y.tanh())

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Residual(), Residual())
    nn.init.ones_(model[2].norm.weight)
    right_or_refused(
        model, torch.randn(6, WIDTH), [Trial(torch.randn(4, WIDTH), True)], cut="2", zero="2.norm"
    )


# ------------------------------------------------------------------ generators of a module


class Skips(nn.Module):
    """Leaves its branch out at random, in training, by a generator of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.f, self.kind = nn.Linear(WIDTH, WIDTH), kind
        if kind == "numpy":
            self.rng: Any = np.random.default_rng(7)
        elif kind == "torch":
            self.rng = torch.Generator().manual_seed(7)

    def draw(self) -> float:
        if self.kind == "numpy":
            return float(self.rng.random())
        if self.kind == "torch":
            return float(torch.rand((), generator=self.rng))
        return float(torch.empty(1).uniform_())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.draw() < 0.5:
            return x
        return x + self.f(x)


@pytest.mark.parametrize("kind", ["numpy", "torch", "global"])
def test_blocks_that_are_skipped_at_random_go_on_being_skipped(kind: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Skips(kind), Plain(), nn.Linear(WIDTH, 2))
    ticket = right(model, features(), cut="2", zero="2.f")
    ticket.train()
    with torch.no_grad():
        outputs = {round(float(ticket(features()).sum()), 4) for _ in range(40)}
        assert len(outputs) == 2
        ticket.eval()
        assert len({float(ticket(features()).sum()) for _ in range(10)}) == 1


class Plain(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(x)


# ----------------------------------------------------------------------- pickled tickets


class Drops(nn.Module):
    """Dropout as a function of the block's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.dropout(self.f(x), 0.5, self.training)


class DropsByModule(Drops):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.f(self.norm(x)))


class DropsInTraining(Drops):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = functional.dropout(y, 0.5)
        return x + y


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [saved, pickled, copy.deepcopy, lambda m: saved(saved(m))])
@pytest.mark.parametrize("kind", [Drops, DropsByModule, DropsInTraining])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_ticket_that_was_stored_follows_its_mode(
    copied: Any, kind: type[nn.Module], train: bool, preserve_root: bool
) -> None:
    model = nn.Sequential(*[kind() for _ in range(3)])
    if kind is DropsInTraining:
        model[1] = Plain()
    try:
        ticket = blockprune.remove_blocks(model, "1", features(), preserve_root=preserve_root)
        again = copied(ticket.train(train))
    except blockprune.BlockpruneError as error:
        assert_that_it_says_why(error)
        return
    expected = reference(model, "1.f")
    for mode in (True, False, True):
        assert_alike(again, expected, Trial(features(3), mode))


# ------------------------------------------------------------------- properties of a child


class Encoder(nn.Module):
    """Blocks, and what the code around reads of them."""

    factor = 2
    "An attribute of the class."

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(3))
        self._stride = 2
        self.channels = [3, WIDTH]

    @property
    def stride(self) -> int:
        return self._stride

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    def prepared(self, x: Tensor) -> Tensor:
        return x / self._stride

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class AroundEncoder(nn.Module):
    """A root that is not followed, and reads its child."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.encoder, self.o, self.what = Encoder(), nn.Linear(WIDTH, 2), what

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            raise RuntimeError("too large")
        encoder = self.encoder
        x = {
            "property": lambda: x / encoder.stride,
            "property_in_a_test": lambda: x if x.shape[0] % encoder.stride else x * 2,
            "attribute": lambda: x * encoder._stride + encoder.channels[-1],
            "class_attribute": lambda: x * encoder.factor,
            "method": lambda: encoder.prepared(x),
            "static_method": lambda: encoder.doubled(x),
            "class_method": lambda: x * len(encoder.name()),
            "class_itself": lambda: x * 2 if isinstance(encoder, Encoder) else x,
            "type_name": lambda: x * len(type(encoder).__name__),
            "length": lambda: x * len(encoder),
            "device": lambda: x.to(encoder.device),
            "children": lambda: x * len(encoder.blocks),
            "weight": lambda: x * encoder.blocks[0].f.weight.mean(),
            "has_attribute": lambda: x * 3 if hasattr(encoder, "stride") else x,
            "training": lambda: x * 3 if encoder.training else x,
            "parameters": lambda: x + sum(p.sum() for p in encoder.blocks[0].parameters()),
        }[self.what]()
        return self.o(encoder(x))


READ = [
    *("property", "property_in_a_test", "attribute", "class_attribute", "method"),
    *("static_method", "class_method", "class_itself", "type_name", "length", "device"),
    *("children", "weight", "has_attribute", "training", "parameters"),
]


@pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")
@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("preserve_root", [False, True])
def test_what_the_code_around_a_child_reads(what: str, preserve_root: bool) -> None:
    right(
        AroundEncoder(what),
        features(),
        [Trial(features(3))],
        cut="encoder.blocks.1",
        zero="encoder.blocks.1.f",
        preserve_root=preserve_root,
    )


def test_pruning_a_model_that_reads_a_property() -> None:
    model = AroundEncoder("property")
    ticket = blockprune.prune(model, "l1", 1, example_inputs=features())
    [gone] = blockprune.plan_of(ticket).remove
    same(ticket(features()), reference(model, f"{gone}.f")(features()))


# ------------------------------------------------------------- masks, sizes, sets, batches


class Attends(nn.Module):
    """Attention that takes its mask for one by its type."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.f = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        scores = q @ k.transpose(-1, -2)
        if isinstance(mask, Tensor):
            scores = scores.masked_fill(mask[:, None, :] == 0, -1e9)
        return x + self.f(scores.softmax(-1) @ v)


@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_mask_of_ones_and_a_padded_one(preserve_root: bool) -> None:
    model = Net(Attends(), Block(), Attends())
    ticket = right(
        model,
        (features(), ones()),
        [Trial((features(), padded()))],
        cut="blocks.1",
        zero="blocks.1.f",
        preserve_root=preserve_root,
    )
    # What is padded decides nothing about the rest.
    x, other = features(), features()
    other[:, 4] += 5
    mask = ones()
    mask[:, 4] = 0
    same(ticket(x, mask)[:, :4], ticket(other, mask)[:, :4])


@pytest.mark.parametrize("example", [1, 2, 5])
@pytest.mark.parametrize("later", [1, 2, 5])
def test_a_batch_in_a_set(example: int, later: int) -> None:
    class Small(Block):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            y = self.f(x)
            if x.shape[0] in {1, 2}:
                y = y * 10
            return x + y

    right_or_refused(
        Net(Small(), Small()),
        (features(example),),
        [Trial((features(later),))],
        cut="blocks.1",
        zero="blocks.1.f",
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_one_query_for_all_samples(batch: int) -> None:
    """A learned query of batch one: the first merge is the one that makes a row for each sample."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 3, WIDTH))
            self.norm, self.f, self.o = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.query)
            z = z + self.f((z @ x.transpose(1, 2)).softmax(-1) @ x)
            return self.o(z)

    model, trials = Query(), [Trial(features(4)), Trial(features(1))]
    right_or_refused(model, features(batch), trials, cut="f", zero="f")
    ticket = None
    try:
        ticket = blockprune.remove_blocks(model, "f", features(batch))
    except blockprune.BlockpruneError as error:
        assert_that_it_says_why(error)
    if ticket is not None:
        assert ticket(features(4)).shape == (4, 3, 2)


# -------------------------------------------------------------------------- the dense model


@pytest.mark.parametrize("what", ["find", "remove", "score", "prune"])
def test_weights_that_a_forward_writes(what: str) -> None:
    class Clips(Plain):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            self.f.weight.data.clamp_(-0.01, 0.01)
            return super().forward(x)

    model = nn.Sequential(nn.Embedding(10, WIDTH, max_norm=0.5), Clips(), Plain())
    tokens = torch.arange(10)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if what == "find":
        assert "2" in blockprune.find_blocks(model, tokens).names
    elif what == "remove":
        blockprune.remove_blocks(model, "2", tokens)
    elif what == "score":
        data = (tokens, torch.zeros(1, 10, dtype=torch.long))
        blockprune.score_blocks(model, "block_influence", data)
    else:
        blockprune.prune(model, "l1", 1, example_inputs=tokens)
    assert before["1.f.weight"].abs().max() > 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
