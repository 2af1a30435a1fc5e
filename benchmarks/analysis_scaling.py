"""How the time of ``find_blocks`` grows with the number of residual blocks.

Nets of 100, 300 and 1000 blocks are analysed in turn, several rounds of it, and the medians
compared: an analysis linear in nodes takes 10 times as long for 10 times the blocks, and the
target is at most 12. Compared is the CPU time of the process, on one thread, which other programs
disturb less than the time on the wall; both are written.

    python benchmarks/analysis_scaling.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor, nn

import blockprune

SIZES = (100, 300, 1000)
WIDTH = 4
TARGET = 12.0


class Block(nn.Module):
    """``relu(x + conv2(relu(conv1(x))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


def measure(rounds: int) -> dict[str, Any]:
    """Time the analysis of each net, the nets taking turns."""
    nets = {size: nn.Sequential(*(Block() for _ in range(size))) for size in SIZES}
    inputs = torch.randn(1, WIDTH, 8, 8)
    blockprune.find_blocks(nets[SIZES[0]], inputs)  # first use imports and caches
    wall: dict[int, list[float]] = {size: [] for size in SIZES}
    cpu: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size, net in nets.items():
            gc.collect()
            started, started_cpu = time.perf_counter(), time.process_time()
            analysis = blockprune.find_blocks(net, inputs)
            cpu[size].append(round(time.process_time() - started_cpu, 4))
            wall[size].append(round(time.perf_counter() - started, 4))
            if len(analysis.blocks) != size:
                raise SystemExit(f"found {len(analysis.blocks)} blocks in a net of {size}")
    ratio = statistics.median(cpu[SIZES[-1]]) / statistics.median(cpu[SIZES[0]])
    return {
        "rounds": rounds,
        "cpu_seconds": {str(size): times for size, times in cpu.items()},
        "wall_seconds": {str(size): times for size, times in wall.items()},
        "median_cpu_seconds": {str(size): statistics.median(cpu[size]) for size in SIZES},
        "median_wall_seconds": {str(size): statistics.median(wall[size]) for size in SIZES},
        "ratio_1000_to_100": round(ratio, 3),
        "target_at_most": TARGET,
    }


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each net (default 5)")
    parser.add_argument("--out", type=Path, help="JSON file (default in results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.rounds)
    for size, seconds in result["median_cpu_seconds"].items():
        on_the_wall = result["median_wall_seconds"][size]
        print(f"{size:>5} blocks: {seconds:7.3f} s of CPU, {on_the_wall:7.3f} s on the wall")
    print(f"ratio 1000 to 100: {result['ratio_1000_to_100']:.2f} (target at most {TARGET:.0f})")
    print(f"written to {write_result('analysis_scaling', result, options.out)}")


if __name__ == "__main__":
    main()
