"""Stages that compare networks of weights with one another: overlap, steadiness, stability."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from blockprune.data import EpochSampler, SeededItems, make_loader, size_of
from blockprune.lottery.training import evaluate
from blockprune.lottery.work.bench import Bench, Made, device
from blockprune.lottery.work.cuts import cut_network, mask_in
from blockprune.sparsity import (
    Mask,
    angle_degrees,
    common,
    connectivity,
    distance,
    flipped,
    overlap,
    recalibrate_norms,
    spread,
)

__all__ = ["connections", "line", "overlaps", "stability", "survival"]

STATISTICS_IMAGES = 2048
STATISTICS_BATCH = 128
"""Of the training set, in its order: what BatchNorm's statistics are taken from on a line."""


def overlaps(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Count what masks have in common: every two of them, and all."""
    del folder
    masks = [mask_in(bench, name) for name in inputs["masks"]]
    groups: list[tuple[int, ...]] = [*combinations(range(len(masks)), 2)]
    if len(masks) > 2:
        groups.append(tuple(range(len(masks))))
    found = []
    for group in groups:
        one = overlap(*(masks[place] for place in group))
        found.append(
            {
                "masks": list(group),
                "of_all": one.of_all,
                "of_surviving": one.of_surviving,
                "expected": one.expected_of_surviving,
            }
        )
    return {"overlaps": found}, {}


def connections(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Say how steady a ticket's connections were from round to round, the shared and the others."""
    del folder
    own, shared = mask_in(bench, inputs["mask"]), _shared(bench, inputs)
    others = Mask({name: keep & ~shared.keep[name] for name, keep in own.keep.items()})
    rounds = [bench.final(name).weights for name in inputs["rounds"]]
    varied = [_mean(spread(rounds, mask).overlapping) for mask in (shared, others)]
    flips = [_mean(flipped(rounds, mask).double()) for mask in (shared, others)]
    return {
        "overlapping": shared.kept,
        "others": others.kept,
        "spread": varied,
        "sign_flips": flips,
    }, {}


def survival(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Count which shared connections a ticket has again, found from partly new weights."""
    del folder
    shared, again = _shared(bench, inputs), mask_in(bench, inputs["mask"])
    both = common(shared, again)
    # What a layer would keep of the shared ones, did it keep as many as it does at random.
    return {
        "layers": {
            name: [
                layer.kept,
                both.layers[name].kept,
                layer.kept * again.layers[name].kept / layer.total,
            ]
            for name, layer in shared.layers.items()
        }
    }, {}


def stability(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Measure how far a masked network is from the dense one, and from its twin."""
    del folder
    mask = mask_in(bench, inputs["mask"])
    own = bench.final(inputs["network"]).weights
    return {
        "to_pruning": _apart(own, bench.final(inputs["dense"]).weights, mask),
        "to_order": _apart(own, bench.final(inputs["twin"]).weights, mask),
    }, {}


def line(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Test a network everywhere between two trainings of it."""
    del folder
    network = cut_network(bench, inputs["seed"], inputs["cut"])
    images = bench.setting.images
    first = range(min(size_of(images.train), STATISTICS_IMAGES))
    # What augmentation draws hangs on the seed, and on nothing that ran before.
    order = EpochSampler(len(first), inputs["seed"])
    seen = SeededItems(Subset(images.train, first), order)
    here = device()

    def error(model: nn.Module) -> float:
        return 1 - evaluate(model, images.test).accuracy

    found = connectivity(
        network.model.to(here),
        bench.final(inputs["network"]).weights,
        bench.final(inputs["twin"]).weights,
        error,
        alphas=inputs["alphas"],
        recalibrate=lambda model: recalibrate_norms(model, make_loader(seen, STATISTICS_BATCH)),
    )
    return {
        "alphas": list(found.alphas),
        "errors": list(found.errors),
        "instability": found.instability,
    }, {}


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], mask: Mask) -> dict[str, float]:
    return {"l2": distance(one, other, mask), "degrees": angle_degrees(one, other, mask)}


def _shared(bench: Bench, inputs: Mapping[str, Any]) -> Mask:
    """Return the connections that all masks of the inputs keep."""
    return common(*(mask_in(bench, name) for name in inputs["masks"]))


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
