"""What a ticket is compared with: the same depth by hand, less width, a library's smaller model."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torchvision
from _pairs import Run
from ticket_overhead import HandWritten
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet

from blockprune.costs import model_costs
from blockprune.models import resnet56

# Multiples that fast kernels want; a width between them costs as much as the next one.
ROUND_TO = 8
SEARCH_STEPS = 8
SAME_OUTPUT = 1e-3
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Subject:
    """A network, and what it is compared with.

    Attributes:
        dense: makes the network.
        by_hand: makes the network that lacks the blocks of these names.
        image: side of its images.
        keep_macs: what its ticket and the pruned width keep, as a share of the dense MACs.
        siblings: names in timm, of the same family; the one of nearest MACs is taken.
        width_pruned: whether to compare with less width.
    """

    dense: Callable[[], nn.Module]
    by_hand: Callable[[Collection[str]], nn.Module]
    image: int
    keep_macs: float
    siblings: tuple[str, ...] = ()
    width_pruned: bool = True


def _resnet50_by_hand(removed: Collection[str]) -> nn.Module:
    gone = Counter(name.partition(".")[0] for name in removed)
    return ResNet(
        Bottleneck, [n - gone[f"layer{stage}"] for stage, n in enumerate((3, 4, 6, 3), start=1)]
    )


def _convnext_by_hand(removed: Collection[str]) -> nn.Module:
    gone = Counter(name.rpartition(".")[0] for name in removed)
    stages = ((96, 192, 3), (192, 384, 3), (384, 768, 9), (768, None, 3))
    return ConvNeXt(
        [
            CNBlockConfig(width, following, blocks - gone[f"features.{2 * stage + 1}"])
            for stage, (width, following, blocks) in enumerate(stages)
        ],
        stochastic_depth_prob=0.1,
    )


def _vit() -> nn.Module:
    model = torchvision.models.vit_b_16()
    # A head of zeros would stop every gradient, and all blocks would score alike.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def _vit_by_hand(removed: Collection[str]) -> nn.Module:
    return torchvision.models.VisionTransformer(224, 16, 12 - len(removed), 12, 768, 3072)


def _resnet56_by_hand(removed: Collection[str]) -> nn.Module:
    return HandWritten(tuple(removed))


SUBJECTS = {
    "resnet56": Subject(resnet56, _resnet56_by_hand, 32, 0.55, width_pruned=False),
    "resnet50": Subject(
        torchvision.models.resnet50,
        _resnet50_by_hand,
        224,
        0.6,
        ("resnet14t", "resnet18", "resnet26", "resnet34"),
    ),
    "convnext_tiny": Subject(
        torchvision.models.convnext_tiny,
        _convnext_by_hand,
        224,
        0.6,
        ("convnext_femto", "convnext_pico", "convnext_nano"),
    ),
    "vit_b_16": Subject(
        _vit,
        _vit_by_hand,
        224,
        0.6,
        (
            "vit_small_patch16_224",
            "vit_medium_patch16_reg4_gap_256",
            "vit_betwixt_patch16_reg4_gap_256",
        ),
    ),
}


def written_by_hand(
    subject: Subject, dense: nn.Module, ticket: nn.Module, removed: Collection[str]
) -> nn.Module:
    """Return the network that a person would have written, with the ticket's weights."""
    kept = ticket.state_dict()
    values = [kept[name] for name in dense.state_dict() if name in kept]
    written = subject.by_hand(removed)
    # Its blocks are numbered anew; their order is the same.
    written.load_state_dict(dict(zip(written.state_dict(), values, strict=True)))
    return written.to(values[0].device).eval()


def with_identities(dense: nn.Module, removed: Collection[str]) -> nn.Module:
    """Return the dense model with `nn.Identity` in the place of each block."""
    swapped = copy.deepcopy(dense)
    for name in removed:
        swapped.set_submodule(name, nn.Identity())
    return swapped.eval()


def check_same(ticket: nn.Module, other: nn.Module, images: Tensor, what: str) -> float:
    """Return the largest difference, as a share of the largest output; end if beyond rounding."""
    with torch.no_grad():
        expected = other(images)
        difference = float((ticket(images) - expected).abs().max() / expected.abs().max())
    if difference > SAME_OUTPUT:
        raise SystemExit(f"the ticket and {what} differ by {difference} of the largest output")
    return difference


# --- less width -----------------------------------------------------------------------------------


def first_order(model: nn.Module, batch: Batch) -> None:
    """Leave the gradients that a first-order criterion reads."""
    functional.cross_entropy(model(batch[0]), batch[1]).backward()


def prune_width(
    torch_pruning: ModuleType, model: nn.Module, image: Tensor, ratio: float, importance: Any
) -> None:
    """Take the same share of the channels off every layer of a model, in place."""
    *_, classifier = (m for m in model.modules() if isinstance(m, nn.Linear))
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    with warnings.catch_warnings():
        # It says which axis of lone parameters it takes: the right one for these networks.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        torch_pruning.pruner.BasePruner(
            model,
            image,
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=[classifier],
            round_to=ROUND_TO,
            num_heads={attention: attention.num_heads for attention in attentions},
        ).step()


def width_pruning(torch_pruning: ModuleType, model: nn.Module, ratio: float, batch: Batch) -> Run:
    """Return what prunes the width of a model, in place, by first-order Taylor scores."""

    def run() -> None:
        first_order(model, batch)
        importance = torch_pruning.importance.GroupTaylorImportance()
        prune_width(torch_pruning, model, batch[0][:1], ratio, importance)
        model.zero_grad()

    return run


def ratio_for(torch_pruning: ModuleType, dense: nn.Module, macs: int, image: Tensor) -> float:
    """Return the share of channels without which the MACs are nearest to these."""
    low, high, tried = 0.0, 0.9, {}
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        model = copy.deepcopy(dense)
        prune_width(torch_pruning, model, image, middle, importance)
        tried[middle] = model_costs(model, image).macs
        low, high = (middle, high) if tried[middle] > macs else (low, middle)
    return min(tried, key=lambda ratio: abs(tried[ratio] - macs))


# --- a smaller model of a library -----------------------------------------------------------------


def nearest_sibling(
    timm: ModuleType, subject: Subject, macs: int, image: Tensor
) -> tuple[str, nn.Module]:
    """Return the smaller model of the family whose MACs are nearest to these."""

    def make(name: str) -> nn.Module:
        size = {"img_size": subject.image} if name.startswith("vit") else {}
        return timm.create_model(name, **size).to(image.device).eval()

    def distance(name: str) -> int:
        return abs(model_costs(make(name), image).macs - macs)

    nearest = min(subject.siblings, key=distance)
    return nearest, make(nearest)
