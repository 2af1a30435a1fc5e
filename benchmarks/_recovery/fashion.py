"""ResNet32 on Fashion-MNIST, trained here and cut."""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import blockprune
from _recovery.methods import batches, recovered
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet32

FITTED_TO = 512


def read(folder: Path, part: str, size: int) -> TensorDataset:
    """Read one part of the published files, shrunk and normalised."""

    def numbers(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = torch.from_numpy(numbers("images-idx3", 16).copy()).view(-1, 1, 28, 28)
    labels = torch.from_numpy(numbers("labels-idx1", 8).copy()).long()
    small = F.interpolate(images.float() / 255, size=(size, size), mode="area")
    return TensorDataset((small - 0.286) / 0.353, labels)


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Return the share of the test images that are recognised, in percent."""
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(*(t.split(500) for t in test.tensors), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(test)


def fashion(args: argparse.Namespace) -> dict[str, Any]:
    """Run all seeds, and return their accuracies and the means."""
    data, test = (read(args.data, part, args.size) for part in ("train", "t10k"))
    data = TensorDataset(*(t[: args.images] for t in data.tensors))
    runs = [_fashion_seed(seed, data, test, args) for seed in range(args.seeds)]
    means: dict[str, dict[str, float]] = {}
    for key in runs[0]["tickets"]:
        rows = [run["tickets"][key] for run in runs]
        means[key] = {name: statistics.mean(row[name]["value"] for row in rows) for name in rows[0]}
    return {
        "size": args.size,
        "images": len(data),
        "epochs": args.epochs,
        "fitted_to": FITTED_TO,
        "dense": statistics.mean(run["dense"] for run in runs),
        "dense_one_epoch_more": statistics.mean(run["dense_one_epoch_more"] for run in runs),
        "means": means,
        "runs": runs,
    }


def _fashion_seed(
    seed: int, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(seed)
    dense = resnet32(in_channels=1)
    schedule = {
        "schedule": "one_cycle",
        "warmup_epochs": 0.5,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "seed": seed,
    }
    train(dense, data, Recipe(epochs=args.epochs, lr=0.1, **schedule))
    more = Recipe(epochs=1, lr=0.01, **schedule)

    def tuned(model: nn.Module) -> float:
        model = copy.deepcopy(model)
        train(model, data, more)
        return accuracy(model, test)

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    images, labels = (t[order[:FITTED_TO]] for t in data.tensors)
    found: dict[str, Any] = {"seed": seed, "dense": accuracy(dense.eval(), test)}
    found["dense_one_epoch_more"] = tuned(dense)
    found["tickets"] = {}
    for count in args.blocks:
        for schedule_of_cuts in ("one-shot", "iterative"):
            ticket = blockprune.prune(
                dense, "block_influence", count, data=(images, labels), schedule=schedule_of_cuts
            )
            row = recovered(ticket, dense, batches(images), lambda model: accuracy(model, test))
            row["fine-tuned"] = {"value": tuned(ticket)}
            working = blockprune.recover(ticket, dense, batches(images))
            row["refit, fine-tuned"] = {"value": tuned(working)}
            found["tickets"][f"{count} {schedule_of_cuts}"] = row
            shown = {name: round(one["value"], 1) for name, one in row.items()}
            print(f"seed {seed}, dense {found['dense']:.1f}, {count} {schedule_of_cuts}: {shown}")
    return found
