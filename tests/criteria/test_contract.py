"""What every criterion promises, on every kind of net; a new criterion is a new row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.criteria import CRITERIA
from blockprune.errors import CriterionError
from blockprune.scoring import score_blocks, score_criteria
from tests.criteria.nets import Net, pair

Batch = tuple[Any, Any]
# Which of them look at every sample by itself, so that the batches do not matter.
BY_SAMPLE = {
    "random", "l1", "l2", "synflow", "fisher", "taylor", "hrank", "expectabs", "block_influence",
    "angular_distance", "pls", "kl", "cka", "loss_increase",
}  # fmt: skip
every_criterion = pytest.mark.parametrize("name", CRITERIA)


class Case:
    """A net, a batch that it is scored on, and its analysis."""

    def __init__(self, model: nn.Module, batch: Batch, **options: Any) -> None:
        self.model = model
        self.batch = batch
        self.analysis = find_blocks(model, batch[0], **options)


def residual(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(3)
    images, labels = pair(8)
    return Case(Net().to(dtype), (images.to(dtype), labels))


def attention() -> Case:
    torch.manual_seed(3)
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12,
        num_classes=3,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.class_token)
    return Case(model, (torch.randn(8, 3, 8, 8), torch.arange(8) % 3))


class Classifier(nn.Module):
    """Layers in a loop that no trace of the root can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            if float(x.detach().abs().sum()) >= 0:
                x = layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


def regions() -> Case:
    torch.manual_seed(3)
    case = Case(Classifier(), (torch.randn(8, 5, 3), torch.arange(8) % 3))
    assert all(region.path for region in case.analysis.traced.regions)
    return case


def layers() -> Case:
    torch.manual_seed(3)
    batch = (torch.randn(8, 5, 3), torch.arange(8) % 3)
    return Case(Classifier(), batch, granularity="layer")


def language() -> Case:
    config = transformers.GPT2Config(
        n_embd=8,
        n_layer=2,
        n_head=2,
        vocab_size=11,
        n_positions=8,
        use_cache=False,
        activation_function="gelu",
    )
    torch.manual_seed(3)
    ids = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    return Case(transformers.GPT2LMHeadModel(config).eval(), ({"input_ids": ids}, ids))


CASES: dict[str, Callable[[], Case]] = {
    "residual": residual,
    "float32": lambda: residual(torch.float32),
    "attention": attention,
    "regions": regions,
    "layers": layers,
    "language": language,
}
# What a criterion cannot do with a net, and says so.
IMPOSSIBLE = {("pls", "language"): "one integer class label a sample"}


@pytest.mark.parametrize("kind", CASES)
@every_criterion
def test_one_finite_number_a_block_whatever_the_order_and_the_company(name: str, kind: str) -> None:
    case = CASES[kind]()

    def score(analysis: BlockAnalysis) -> dict[str, float]:
        return score_blocks(case.model, name, case.batch, analysis=analysis, seed=5).scores

    if (name, kind) in IMPOSSIBLE:
        with pytest.raises(CriterionError, match=IMPOSSIBLE[name, kind]):
            score(case.analysis)
        return
    scores = score(case.analysis)
    assert tuple(scores) == case.analysis.names
    assert len(scores) >= 2
    assert all(math.isfinite(value) for value in scores.values())
    assert score(case.analysis) == scores
    backwards = dataclasses.replace(case.analysis, blocks=case.analysis.blocks[::-1])
    assert score(backwards) == pytest.approx(scores, rel=1e-9)
    other = "expectabs" if name != "expectabs" else "snip"
    tables = score_criteria(case.model, [other, name], case.batch, analysis=case.analysis, seed=5)
    assert tables[name].scores == scores


@pytest.mark.parametrize("name", sorted(BY_SAMPLE))
def test_how_the_samples_are_batched_does_not_matter(name: str) -> None:
    case = residual()
    images, labels = case.batch
    whole = score_blocks(case.model, name, case.batch, analysis=case.analysis)
    halves = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    split = score_blocks(case.model, name, halves, analysis=case.analysis)
    # Taylor adds the gradients of the batches' mean losses.
    factor = 2 if name == "taylor" else 1
    expected = {block: factor * value for block, value in whole.scores.items()}
    assert split.scores == pytest.approx(expected, rel=1e-6)


@every_criterion
def test_no_more_batches_are_read_than_asked_for(name: str) -> None:
    case = residual()
    read: list[int] = []

    def stream() -> Any:
        for position in range(4):
            read.append(position)
            yield case.batch

    first = score_blocks(case.model, name, stream(), analysis=case.analysis, max_batches=2)
    assert len(read) <= 2
    twice = [case.batch, case.batch]
    assert first == score_blocks(case.model, name, twice, analysis=case.analysis)


@every_criterion
def test_what_it_needs_is_all_it_reads(name: str) -> None:
    """Labels for those that say so, inputs for those, and a warning where there is no data."""
    case = residual()
    images, _ = case.batch
    needs = CRITERIA[name].needs  # type: ignore[attr-defined]
    assert needs in ("nothing", "inputs", "labels")
    if needs == "labels":
        with pytest.raises(CriterionError, match="label"):
            score_blocks(case.model, name, images, analysis=case.analysis)
    else:
        assert score_blocks(case.model, name, images, analysis=case.analysis).scores
    if needs == "nothing":
        # No warning of missing data, which would be an error here.
        assert score_blocks(case.model, name, analysis=case.analysis).scores


@pytest.mark.parametrize("name", ["snip", "grasp", "taylor", "fisher", "grad_norm", "synflow"])
def test_a_frozen_block_is_named(name: str) -> None:
    case = residual()
    for parameter in case.model.blocks[1].parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CriterionError, match=r"'blocks\.1'.*frozen"):
        score_blocks(case.model, name, case.batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batches": 0}, "max_batches is an int, 1 or more"),
        ({"max_batches": 1.5}, "max_batches"),
        ({"max_batches": True}, "max_batches"),
        ({"max_cache_bytes": -1}, "max_cache_bytes is an int, 0 or more"),
    ],
)
def test_limits_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        score_blocks(Net(), "kl", pair(), **options)


def test_two_criteria_of_one_name() -> None:
    with pytest.raises(CriterionError, match="Two criteria are called 'snip'"):
        score_criteria(Net(), ["snip", "snip"], pair())


def test_weights_that_are_not_finite_are_reported_with_a_block() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[1].conv1.weight[0, 0, 0, 0] = float("nan")
    for name in ("l1", "l2", "expectabs", "kl", "block_influence"):
        with pytest.raises(CriterionError, match=r"blocks\.\d|not finite|nan"):
            score_blocks(model, name, pair())
