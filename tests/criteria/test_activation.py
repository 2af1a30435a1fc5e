from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blockprune.blocks import find_blocks
from blockprune.criteria import (
    CRITERIA,
    AngularDistance,
    Batch,
    BlockInfluence,
    ExpectAbs,
    HRank,
    Pls,
    ScoringContext,
)
from blockprune.criteria.meters import feature_axis
from blockprune.errors import CriterionError
from blockprune.tracing import as_call, copy_model
from tests.criteria.nets import Net, pair

NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def trained() -> Net:
    """`Net` with running statistics that are not those of initialisation."""
    torch.manual_seed(4)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.1, 0.5)
    return model.eval()


def flows(model: nn.Module, images: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What the modules of the blocks are given and return, by hooks on the eager model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.update({name: (args[0].clone(), out.clone())})

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in NAMES]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def of_batches(model: nn.Module, *batches: tuple[Any, Any], **options: Any) -> ScoringContext:
    call = as_call(model, batches[0][0])
    analysis = find_blocks(model, call, **options)
    given = [Batch(as_call(model, inputs), targets) for inputs, targets in batches]
    return ScoringContext(copy_model(model).eval(), analysis.blocks, given, call, analysis=analysis)


def unlabelled(model: nn.Module, inputs: Any) -> ScoringContext:
    return of_batches(model, (inputs, None))


def split(batch: tuple[Tensor, Tensor], at: int) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0][:at], batch[1][:at]), (batch[0][at:], batch[1][at:])]


def direct_hrank(x: Tensor, y: Tensor) -> float:
    ranks = [np.linalg.matrix_rank(m.numpy()) / max(m.shape) for sample in y for m in sample]
    return float(np.mean(ranks))


def direct_expectabs(x: Tensor, y: Tensor) -> float:
    return float(np.abs(y.numpy()).mean())


def cosines(x: Tensor, y: Tensor) -> list[float]:
    found = []
    for sample in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                a, b = x[sample, :, i, j].tolist(), y[sample, :, i, j].tolist()
                dot = sum(p * q for p, q in zip(a, b, strict=True))
                size = math.hypot(*a) * math.hypot(*b)
                found.append(dot / size if size else float(not any(a) and not any(b)))
    return found


def direct_block_influence(x: Tensor, y: Tensor) -> float:
    return 1 - float(np.mean(cosines(x, y)))


def direct_angular_distance(x: Tensor, y: Tensor) -> float:
    return float(np.mean([math.acos(min(1, c)) / math.pi for c in cosines(x, y)]))


DIRECT = {
    "hrank": direct_hrank,
    "expectabs": direct_expectabs,
    "block_influence": direct_block_influence,
    "angular_distance": direct_angular_distance,
}


@pytest.mark.parametrize("name", DIRECT)
def test_against_a_direct_computation_over_any_split_of_the_data(name: str) -> None:
    model, batch = trained(), pair(5)
    flow = flows(model, batch[0])
    expected = {block: DIRECT[name](*flow[block]) for block in NAMES}
    assert len(set(expected.values())) > 1
    criterion = CRITERIA[name]
    assert criterion(of_batches(model, batch)) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    apart = criterion(of_batches(model, *split(batch, 2)))
    assert apart == pytest.approx(expected, rel=1e-7, abs=1e-7)


class Mixing(nn.Module):
    """Tokens; the second layer adds nothing."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        for layer in self.layers[1:3]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


def test_blocks_that_add_nothing_score_zero() -> None:
    torch.manual_seed(0)
    model, tokens = Mixing(), torch.randn(3, 5, 6)
    for criterion in (BlockInfluence(), AngularDistance()):
        scores = criterion(unlabelled(model, tokens))
        assert scores["layers.1"] == pytest.approx(0, abs=1e-6)
        assert scores["layers.2"] == pytest.approx(0, abs=1e-6)
        assert min(scores["layers.0"], scores["layers.3"]) > 1e-3


def test_a_run_scores_by_its_ends() -> None:
    torch.manual_seed(0)
    model, tokens = Mixing(), torch.randn(3, 5, 6)
    states = [tokens]
    with torch.no_grad():
        for layer in model.layers:
            states.append(states[-1] + layer(states[-1]))

    def distance(start: int, end: int) -> float:
        a, b = states[start].flatten(0, 1).double(), states[end].flatten(0, 1).double()
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        return float(cosine.clamp(max=1).arccos().mean() / math.pi)

    runs = [distance(i, i + 2) for i in range(3)]
    expected = [runs[0], min(runs[:2]), min(runs[1:]), runs[2]]
    scores = AngularDistance(2)(unlabelled(model, tokens))
    assert list(scores.values()) == pytest.approx(expected, abs=1e-6)
    # The two lowest are one run: the layers that add nothing.
    assert sorted(scores, key=scores.__getitem__)[:2] == ["layers.1", "layers.2"]


def test_blocks_of_too_short_a_stage_are_in_no_run() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.down = nn.Linear(4, 3)
            self.b = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.a:
                x = x + layer(x)
            x = self.down(x)
            for layer in self.b:
                x = x + layer(x)
            return x

    scores = AngularDistance(3)(unlabelled(Stages(), torch.randn(4, 4)))
    assert scores["a.0"] == scores["a.1"] == 1
    assert scores["b.0"] == scores["b.1"] == scores["b.2"] < 1


@pytest.mark.parametrize("n", [0, -1, True, 1.5])
def test_runs_of_no_blocks(n: Any) -> None:
    with pytest.raises(CriterionError, match="number of blocks in a run"):
        AngularDistance(n)


def test_ranks_of_known_maps() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(1, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + x * self.gain

    ranks = torch.zeros(2, 2, 3, 4)
    ranks[0, 0, :, :3] = torch.eye(3)
    ranks[0, 1, 0, 0] = 1
    ranks[1, 0, :2, :2] = torch.eye(2)
    # Ranks 3, 1, 2 and 0 of maps of 3 x 4.
    (score,) = HRank()(unlabelled(Maps(), ranks)).values()
    assert score == pytest.approx((3 + 1 + 2 + 0) / 4 / 4)


def test_ranks_need_maps() -> None:
    class Flat(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.unsqueeze(1)).flatten(1)

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.layer(x)
            return out

    assert HRank()(unlabelled(Flat(), torch.randn(3, 6)))
    with pytest.raises(CriterionError, match=r"feature maps.*\(3, 6\)"):
        HRank()(unlabelled(Vectors(), torch.randn(3, 6)))


def nipals(x: np.ndarray, y: np.ndarray, components: int) -> np.ndarray:
    """VIP of each column of x: PLS2 by power iteration, written out."""
    x = (x - x.mean(0)) / np.where(x.std(0, ddof=1) > 0, x.std(0, ddof=1), 1)
    y = (y - y.mean(0)) / y.std(0, ddof=1)
    size, weights, explained = x.shape[1], [], []
    for _ in range(components):
        u = y[:, :1]
        for _ in range(5000):
            w = x.T @ u / (u.T @ u)
            w /= np.linalg.norm(w)
            t = x @ w
            q = y.T @ t / (t.T @ t)
            u = y @ q / (q.T @ q)
        p = x.T @ t / (t.T @ t)
        weights.append(w[:, 0] ** 2)
        explained.append(float((t**2).sum() * (q**2).sum()))
        x, y = x - t @ p.T, y - t @ q.T
    shares = np.stack(weights, 1) @ np.array(explained)
    return np.sqrt(size * shares / sum(explained))


def test_pls_is_one_model_of_the_pooled_features_of_all_blocks() -> None:
    model, batch = trained(), pair(30)
    flow = flows(model, batch[0])
    pooled = np.concatenate([flow[name][1].mean((2, 3)).numpy() for name in NAMES], 1)
    one_hot = np.eye(3)[batch[1].numpy()]
    vip = nipals(pooled, one_hot, 2)
    assert (vip**2).sum() == pytest.approx(pooled.shape[1])
    expected = dict(zip(NAMES, vip.reshape(3, 4).mean(1).tolist(), strict=True))
    assert Pls()(of_batches(model, batch)) == pytest.approx(expected, rel=1e-5)
    assert Pls()(of_batches(model, *split(batch, 11))) == pytest.approx(expected, rel=1e-5)


class Tokens(nn.Module):
    """Blocks of tokens, in one layout or the other between the same ends."""

    def __init__(self, *, positions_first: bool) -> None:
        super().__init__()
        self.positions_first = positions_first
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.positions_first else x
        for layer in self.layers:
            x = x + layer(x).relu()
        out: Tensor = self.head(x.mean(0 if self.positions_first else 1))
        return out


@pytest.mark.parametrize("positions", [12, 5])
def test_pls_pairs_samples_with_labels_in_any_layout(positions: int) -> None:
    """Twelve samples: as many positions would be taken for them."""
    plain, turned = (Tokens(positions_first=first).double() for first in (False, True))
    turned.load_state_dict(plain.state_dict())
    batch = torch.randn(12, positions, 6).double(), torch.arange(12) % 2
    assert Pls()(of_batches(turned, batch)) == pytest.approx(Pls()(of_batches(plain, batch)))


def test_pls_prefers_the_block_that_tells_the_classes_apart() -> None:
    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            # Noise covers the label until the second block takes it away.
            x = x + self.a(x)
            return x + self.b(x)

    model = Telling().double()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = 20 * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    signal = torch.stack([labels, 1 - labels], 1).double()
    inputs = torch.cat([noise, signal + noise], 1)
    with torch.no_grad():
        nn.init.zeros_(model.a.weight)
        nn.init.zeros_(model.a.bias)
        nn.init.zeros_(model.b.bias)
        weight = torch.zeros(4, 4, dtype=torch.float64)
        weight[2:, :2] = -torch.eye(2)
        model.b.weight.copy_(weight)
    scores = Pls()(of_batches(model, (inputs, labels)))
    assert scores["b"] > scores["a"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "found none"),
        (torch.zeros(12), r"shape \(12,\) and type torch.float32"),
        (torch.zeros(12, 2, dtype=torch.int64), r"shape \(12, 2\)"),
        (torch.zeros(12, dtype=torch.int64), "at least two classes"),
        (torch.arange(7) % 2, "12 samples left block 'blocks.0', for 7 labels"),
    ],
)
def test_pls_needs_class_labels(targets: Any, message: str) -> None:
    images = pair()[0]
    with pytest.raises(CriterionError, match=message):
        Pls()(of_batches(trained(), (images, targets)))


class Layout(nn.Module):
    """One block on maps with the channels second or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.branch: nn.Module = nn.Linear(5, 5) if last else nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


def test_channels_are_found_in_any_layout() -> None:
    torch.manual_seed(1)
    first, last = Layout(False), Layout(True)
    last.branch.weight = nn.Parameter(first.branch.weight.detach().flatten(1))
    last.branch.bias = first.branch.bias
    images = torch.randn(4, 5, 3, 3)
    contexts = unlabelled(first, images), unlabelled(last, images.movedim(1, -1))
    assert [feature_axis(c, c.blocks[0]) for c in contexts] == [1, 3]
    for criterion in (BlockInfluence(), AngularDistance(), ExpectAbs(), HRank()):
        (a,), (b,) = (criterion(c).values() for c in contexts)
        assert a == pytest.approx(b, rel=1e-5)
    sequence = unlabelled(Mixing(), torch.randn(2, 3, 6))
    assert feature_axis(sequence, sequence.blocks[0]) == 2


def test_half_precision() -> None:
    torch.manual_seed(0)
    model, tokens = Mixing(), torch.randn(3, 5, 6)
    for name in ("hrank", "expectabs", "block_influence", "angular_distance"):
        wide = CRITERIA[name](unlabelled(model, tokens))
        narrow = CRITERIA[name](unlabelled(copy_model(model).bfloat16(), tokens.bfloat16()))
        assert narrow == pytest.approx(wide, rel=0.05, abs=0.02)


def test_labels_are_not_needed() -> None:
    images = pair()[0]
    for name in DIRECT:
        assert CRITERIA[name](of_batches(trained(), (images, None)))


def test_pls_takes_one_component_or_more() -> None:
    with pytest.raises(CriterionError, match="1 or more, not 0"):
        Pls(components=0)


def test_pls_of_features_that_do_not_vary_with_the_labels() -> None:
    images, labels = pair()
    alike = images[:1].repeat(len(labels), 1, 1, 1)
    balanced = torch.cat([images, images]), torch.arange(2 * len(labels)) // len(labels)
    for batch in ((alike, labels), balanced):
        with pytest.raises(CriterionError, match="does not vary with the labels"):
            Pls()(of_batches(trained(), batch))


def test_hrank_of_maps_that_are_not_finite() -> None:
    images = pair()[0].clone()
    images[0, 0, 0, 0] = math.inf
    with pytest.raises(CriterionError, match=r"'blocks\.0' is not finite: it has no rank"):
        HRank()(unlabelled(trained(), images))


def test_a_block_that_no_batch_runs_has_no_score() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.bright, self.fc = Layout(False), Layout(False), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            dark = float(x.mean()) < 0
            x = self.always(x)
            return self.fc((x if dark else self.bright(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Sometimes(), torch.rand(4, 5, 3, 3)
    context = of_batches(model, (images, None))
    assert [block.name for block in context.blocks] == ["always", "bright"]
    assert ExpectAbs()(context).keys() == {"always", "bright"}
    dark = ScoringContext(
        copy_model(model).eval(),
        context.blocks,
        [Batch(as_call(model, -images), None)],
        as_call(model, images),
        analysis=find_blocks(model, images),
    )
    for name in DIRECT:
        with pytest.raises(CriterionError, match="'bright' was not run by any batch"):
            CRITERIA[name](dark)
