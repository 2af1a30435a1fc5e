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
from _machine import write_result
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import blockprune
from _recovery.methods import batches, recovered
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet32
from blockprune.recovery import Distillation

FITTED_TO = 512
SCHEDULES = ("one-shot", "iterative")


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
    runs = [_Seed(seed, data, test, args.epochs) for seed in range(args.seeds)]
    means: dict[str, dict[str, float]] = {}
    # The largest number first, so that a run that is stopped has what matters most.
    for count in sorted(args.blocks, reverse=True):
        for run in runs:
            run.cut(count)
        for schedule in SCHEDULES:
            rows = [run.tickets[f"{count} {schedule}"] for run in runs]
            means[f"{count} {schedule}"] = {
                name: statistics.mean(row[name]["value"] for row in rows)
                for name in rows[0]
                if name != "removed"
            }
        result = _result(args, runs, means)
        # Should the run be ended, what was measured is kept.
        write_result("recovery_fashion", result, args.out)
        print(f"means: {means}", flush=True)
    return result


def _result(
    args: argparse.Namespace, runs: list[_Seed], means: dict[str, dict[str, float]]
) -> dict[str, Any]:
    return {
        "size": args.size,
        "images": args.images,
        "epochs": args.epochs,
        "fitted_to": FITTED_TO,
        "dense": statistics.mean(run.accuracy for run in runs),
        "dense_one_epoch_more": statistics.mean(run.one_epoch_more for run in runs),
        "means": means,
        "runs": [
            {
                "seed": run.seed,
                "dense": run.accuracy,
                "dense_one_epoch_more": run.one_epoch_more,
                "tickets": run.tickets,
            }
            for run in runs
        ],
    }


class _Seed:
    """The dense network of one seed, and what becomes of it."""

    def __init__(self, seed: int, data: TensorDataset, test: TensorDataset, epochs: int) -> None:
        self.seed, self.data, self.test = seed, data, test
        self.schedule = {
            "schedule": "one_cycle",
            "warmup_epochs": 0.5,
            "batch_size": 128,
            "weight_decay": 5e-4,
            "seed": seed,
        }
        torch.manual_seed(seed)
        self.dense = resnet32(in_channels=1)
        train(self.dense, data, Recipe(epochs=epochs, lr=0.1, **self.schedule))
        self.dense.eval()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.images, self.labels = (t[order[:FITTED_TO]] for t in data.tensors)
        self.accuracy = accuracy(self.dense, test)
        self.one_epoch_more = self.tuned(self.dense)
        self.tickets: dict[str, Any] = {}
        print(f"seed {seed}, dense {self.accuracy:.1f}", flush=True)

    def tuned(self, model: nn.Module) -> float:
        """Return the accuracy after one epoch of plain training with labels."""
        model = copy.deepcopy(model)
        train(model, self.data, Recipe(epochs=1, lr=0.01, **self.schedule))
        return accuracy(model, self.test)

    def distilled(self, ticket: nn.Module) -> float:
        """Return the accuracy after one epoch of distillation without labels."""
        loader = DataLoader(self.data, batch_size=128, shuffle=True)
        recipe = Distillation(epochs=1, seed=self.seed)
        found = blockprune.recover(ticket, self.dense, loader, "distill", recipe=recipe)
        return accuracy(found, self.test)

    def cut(self, count: int) -> None:
        """Fill the rows of that many blocks out."""
        for schedule in SCHEDULES:
            ticket = blockprune.prune(
                self.dense,
                "block_influence",
                count,
                data=(self.images, self.labels),
                schedule=schedule,
            )
            removed = list(blockprune.plan_of(ticket).remove)
            for other in SCHEDULES:
                known = self.tickets.get(f"{count} {other}")
                if known is not None and known["removed"] == removed:
                    self.tickets[f"{count} {schedule}"] = known
                    break
            else:
                self.tickets[f"{count} {schedule}"] = self._row(ticket, removed)

    def _row(self, ticket: nn.Module, removed: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = recovered(
            ticket, self.dense, batches(self.images), lambda model: accuracy(model, self.test)
        )
        refitted = blockprune.recover(ticket, self.dense, batches(self.images))
        for name, start in (("", ticket), ("refit, ", refitted)):
            row[f"{name}fine-tuned"] = {"value": self.tuned(start)}
            row[f"{name}distilled"] = {"value": self.distilled(start)}
        shown = {name: round(one["value"], 1) for name, one in row.items()}
        print(f"seed {self.seed}, {len(removed)} out: {shown}", flush=True)
        return {**row, "removed": removed}
