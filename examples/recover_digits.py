"""Train a network on digits, cut it, and make it work again without training, then with a little.

python examples/recover_digits.py
"""

from __future__ import annotations

import torch
from torch import nn

import blockprune
from blockprune.data import load_digits, make_loader
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import evaluate, train
from blockprune.models import resnet20
from blockprune.profiling import compare_latency
from blockprune.recovery import Distillation


def main() -> None:
    """Show the accuracy of each step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    dense = resnet20(in_channels=1)
    recipe = Recipe(epochs=6, lr=0.1, schedule="one_cycle", warmup_epochs=2, batch_size=64)
    train(dense, data.train, recipe)
    dense.eval()

    loader = make_loader(data.train, 64, seed=0)
    ticket = blockprune.prune(dense, "block_influence", p=4, data=loader)
    refitted = blockprune.recover(ticket, dense, loader)
    distilled = blockprune.recover(
        refitted, dense, loader, "distill", recipe=Distillation(epochs=2)
    )

    def show(name: str, network: nn.Module) -> None:
        print(f"{name:<10} {100 * evaluate(network, data.test).accuracy:5.1f} %")

    print(f"removed: {', '.join(blockprune.plan_of(ticket).remove)}")
    show("dense", dense)
    show("cut", ticket)
    show("refitted", refitted)
    show("distilled", distilled)
    images = next(iter(loader))[0]
    times = compare_latency({"dense": dense, "ticket": distilled}, images, batch_sizes=(64,))
    for name, [latency] in times.items():
        print(f"{name:<10} {latency.median_ms:.2f} ms for 64 images")


if __name__ == "__main__":
    main()
