"""How far is what a search finds from the best set of all, on small networks trained here."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import blockprune
from _recovery.fashion import accuracy, read
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet20
from blockprune.recovery.data import Batches as RecoveryData
from blockprune.recovery.refits import Refits
from blockprune.tracing import as_call

SCORED_ON = 256
BATCH = 64
TESTED_ON = 1000
CRITERIA = ("recovered_loss", "kl", "block_influence")
SCHEDULES: dict[str, dict[str, Any]] = {
    "one-shot": {"schedule": "one-shot"},
    "greedy": {"schedule": "iterative"},
    "beam of 3": {"schedule": "beam", "beam_width": 3},
}

Batches = list[tuple[Tensor, Tensor]]


class MlpBlock(nn.Module):
    """A residual block of two layers behind a normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.relu(self.up(self.norm(x))))
        return out


def mlp(size: int, width: int = 64, depth: int = 8) -> nn.Module:
    """Return a residual perceptron for pictures of a size."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size * size, width),
        *[MlpBlock(width) for _ in range(depth)],
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )


# A network for pictures of a size, and its learning rate.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "resnet20": (lambda size: resnet20(in_channels=1), 0.1),
    "mlp": (mlp, 0.02),
}


def search(args: argparse.Namespace) -> dict[str, Any]:
    """Compare searches with every set there is, for each seed, and return the means."""
    data, test = (read(args.data, part, args.size) for part in ("train", "t10k"))
    data = TensorDataset(*(t[: args.images] for t in data.tensors))
    test = TensorDataset(*(t[:TESTED_ON] for t in test.tensors))
    runs = [_seed(seed, data, test, args) for seed in range(args.seeds)]
    return {
        "network": args.network,
        "size": args.size,
        "images": len(data),
        "epochs": args.epochs,
        "scored_on": SCORED_ON,
        "tested_on": len(test),
        "dense_loss": statistics.mean(run["dense_loss"] for run in runs),
        "dense_accuracy": statistics.mean(run["dense_accuracy"] for run in runs),
        "means": {
            count: _means([run["counts"][count] for run in runs]) for count in runs[0]["counts"]
        },
        "runs": runs,
    }


def _means(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds of what was measured for one number of blocks."""
    plain = ("sets", "best", "median", "best_by_scoring_data")
    searches = found[0]["searches"]
    return {
        **{key: statistics.mean(one[key] for one in found) for key in plain},
        "searches": {
            name: {
                key: statistics.mean(one["searches"][name][key] for one in found)
                for key in ("loss", "rank", "seconds")
            }
            for name in searches
        },
    }


def _seed(
    seed: int, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(seed)
    make, rate = NETWORKS[args.network]
    dense = make(args.size)
    recipe = Recipe(
        epochs=args.epochs,
        lr=rate,
        schedule="one_cycle",
        warmup_epochs=0.5,
        batch_size=128,
        weight_decay=5e-4,
        seed=seed,
    )
    train(dense, data, recipe)
    dense.eval()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    images, labels = (t[order[:SCORED_ON]] for t in data.tensors)
    batches: Batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    held_out: Batches = [test.tensors]
    found: dict[str, Any] = {
        "seed": seed,
        "dense_loss": _loss(dense, held_out),
        "dense_accuracy": accuracy(dense, test),
        "counts": {},
    }
    print(f"seed {seed}: dense {found['dense_accuracy']:.1f} %, loss {found['dense_loss']:.4f}")
    for count in args.blocks:
        found["counts"][str(count)] = _count(dense, count, batches, held_out)
    return found


def _count(dense: nn.Module, count: int, batches: Batches, held_out: Batches) -> dict[str, Any]:
    """Recover every set of so many blocks, and place what each search finds among them."""
    example = batches[0][0][:2]
    analysis = blockprune.find_blocks(dense, example)
    # What `recover` makes of each ticket, without analysing the dense network each time.
    refits = Refits(dense, analysis, RecoveryData(dense, batches), as_call(dense, example), 2**30)
    sets = {" ".join(gone): gone for gone in itertools.combinations(analysis.names, count)}
    losses: dict[tuple[str, ...], float] = {}
    on_scoring_data: dict[tuple[str, ...], float] = {}
    for name, model in refits.of(sets):
        losses[sets[name]] = _loss(model, held_out)
        on_scoring_data[sets[name]] = _loss(model, batches)
    order = sorted(losses, key=losses.__getitem__)
    searches = {}
    for criterion, (schedule, options) in itertools.product(CRITERIA, SCHEDULES.items()):
        start = time.process_time()
        ticket = blockprune.prune(dense, criterion, count, data=batches, verify=False, **options)
        seconds = time.process_time() - start
        gone = blockprune.plan_of(ticket).remove
        searches[f"{criterion}, {schedule}"] = {
            "removed": list(gone),
            "loss": losses[gone],
            "rank": 1 + order.index(gone),
            "seconds": seconds,
        }
    best = min(on_scoring_data, key=on_scoring_data.__getitem__)
    result = {
        "sets": len(order),
        "best": losses[order[0]],
        "best_removed": list(order[0]),
        "median": statistics.median(losses.values()),
        "best_by_scoring_data": losses[best],
        "searches": searches,
    }
    print(f"{count} out, of {len(order)} sets: best {result['best']:.4f}", flush=True)
    for name, row in searches.items():
        print(f"  {name:28} {row['loss']:.4f}  rank {row['rank']:3}  {row['seconds']:5.1f} s")
    return result


def _loss(model: nn.Module, batches: Batches) -> float:
    """Return the mean cross entropy over some batches."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for images, labels in batches:
            total += float(F.cross_entropy(model(images), labels, reduction="sum"))
    return total / sum(len(labels) for _, labels in batches)
