"""What a ticket costs over the same network written by hand.

A ResNet56 ticket is a rewritten graph; a person who wanted that network would have written a
ResNet with fewer blocks. Both get the same weights, must give the same outputs, and run in
pairs, the order of a pair alternating, so that whatever else the machine does hits both. The
figure is the median over pairs of ticket over hand-written: 1 is free, the target 0.97 to 1.03.

    python benchmarks/ticket_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from blockprune.models import BasicBlock, resnet56
from blockprune.profiling import compare_latency

REMOVED = ("layer1.2", "layer1.5", "layer2.3", "layer3.6")
TARGET = (0.97, 1.03)


class HandWritten(nn.Module):
    """A CIFAR ResNet whose stages list the blocks they have, named as in the dense net."""

    def __init__(self, removed: tuple[str, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = nn.Sequential()
            for index in range(9):
                if f"layer{stage}.{index}" in removed:
                    continue
                stride = 2 if index == 0 and stage > 1 else 1
                blocks.add_module(str(index), BasicBlock(width, channels, stride))
                width = channels
            self.add_module(f"layer{stage}", blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def measure(pairs: int, batch: int) -> dict[str, Any]:
    """Time both networks in alternating pairs."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, 3, 32, 32)
    ticket = blockprune.remove_blocks(resnet56(), REMOVED, inputs).eval()
    written = HandWritten(REMOVED).eval()
    written.load_state_dict(ticket.state_dict())
    with torch.inference_mode():
        if not torch.equal(ticket(inputs), written(inputs)):
            raise SystemExit("the ticket and the hand-written network disagree")
    timed = compare_latency(
        {"ticket": ticket, "written": written}, inputs, batch_sizes=(batch,), repeats=pairs
    )
    [own], [reference] = timed["ticket"], timed["written"]
    ratios = [t / w for t, w in zip(own.samples_ms, reference.samples_ms, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "removed": list(REMOVED),
        "batch": batch,
        "pairs": pairs,
        "ticket_median_ms": round(own.median_ms, 4),
        "written_median_ms": round(reference.median_ms, 4),
        "ratio_median": round(own.ratio_to(reference), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "target": list(TARGET),
    }


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=400, help="paired runs (default 400)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file (default in results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.pairs, options.batch)
    low, high = result["ratio_quartiles"]
    print(f"ticket       {result['ticket_median_ms']:8.3f} ms")
    print(f"hand-written {result['written_median_ms']:8.3f} ms")
    print(
        f"ratio {result['ratio_median']:.3f}, quartiles {low:.3f} to {high:.3f} "
        f"(target {TARGET[0]} to {TARGET[1]})"
    )
    print(f"written to {write_result('ticket_overhead', result, options.out)}")


if __name__ == "__main__":
    main()
