"""Every model of torchvision through ``find_blocks``: blocks, layers, seconds, memory.

Each model runs in a process of its own, so that a peak belongs to one model and a failure
ends nothing else. Weights are random; the example inputs are those that
``infer_example_inputs`` proposes.

    python benchmarks/torchvision_sweep.py                  # all of them
    python benchmarks/torchvision_sweep.py 'resnet*' vit_b_16
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from _machine import write_result

import blockprune
from blockprune.inputs import infer_example_inputs

# Models whose constructor draws truncated normals through SciPy for a minute.
SLOW_INITIALISERS = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")
TIME_LIMIT_S = 900


def build(name: str) -> torch.nn.Module:
    """Build a model of torchvision with random weights and without any download."""
    options: dict[str, Any] = {"weights": None}
    if name in SLOW_INITIALISERS:
        options["init_weights"] = False
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        options["weights_backbone"] = None
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    return torchvision.models.get_model(name, **options)


def analyse(name: str) -> dict[str, Any]:
    """Analyse one model in this process."""
    torch.manual_seed(0)
    model = build(name)
    inputs = infer_example_inputs(model)
    start = time.perf_counter()
    branches = blockprune.find_blocks(model, inputs)
    seconds = time.perf_counter() - start
    layers = blockprune.find_blocks(model, inputs, granularity="layer")
    return {
        "name": name,
        "branches": len(branches.blocks),
        "layers": len(layers.blocks),
        "rejections": len(branches.rejections),
        "seconds": round(seconds, 2),
        # Kilobytes on Linux.
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def in_own_process(name: str) -> dict[str, Any]:
    """Analyse one model in a process of its own; a failure is a row with an ``error``."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"longer than {TIME_LIMIT_S} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"name": name, "error": lines[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in row:
        return f"{row['name']:<36} {row['error']}"
    return (
        f"{row['name']:<36} {row['branches']:>8} {row['layers']:>6} {row['rejections']:>9}"
        f" {row['seconds']:>8.2f} {row['peak_mb']:>8}"
    )


def main() -> None:
    """Print the table, write it, and fail where a model failed."""
    parser = argparse.ArgumentParser(description="find_blocks on every model of torchvision")
    parser.add_argument("patterns", nargs="*", default=["*"], help="names; * and ? work")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="result file (default: results/)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(analyse(arguments.one)))
        return
    names = [
        name
        for name in torchvision.models.list_models()
        if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.patterns)
    ]
    if not names:
        raise SystemExit(f"no model of torchvision is called {' or '.join(arguments.patterns)}")
    print(
        f"{'model':<36} {'branches':>8} {'layers':>6} {'refused':>9} {'seconds':>8} {'peak MB':>8}"
    )
    rows = []
    for name in names:
        rows.append(in_own_process(name))
        print(line(rows[-1]), flush=True)
    path = write_result("torchvision_sweep", {"models": rows}, arguments.out)
    failed = [row["name"] for row in rows if "error" in row]
    print(f"{len(rows)} models, {len(failed)} failed; {path}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
