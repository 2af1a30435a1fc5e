"""What scoring costs, in units of the passes that the theory says it needs.

Each criterion is timed as a user calls it, `score_blocks` with an analysis at hand, in pairs with
the passes it is made of, written out with torch alone; the order of a pair alternates. Figures
are medians of the ratios of processor time within a pair, on one thread.

    python benchmarks/scoring.py [--pairs 5] [--net resnet56 vit_small]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer

from blockprune import find_blocks, score_blocks
from blockprune.models import resnet56
from blockprune.scoring import score_criteria

FIRST_ORDER = ("snip", "taylor", "grad_norm")
LEAVE_ONE_OUT = ("kl", "cka", "loss_increase")
ACTIVATIONS = ("hrank", "expectabs", "block_influence", "angular_distance", "pls")
TEMPERATURE = 200.0
TARGETS = {
    "gradient": 1.15,
    "grasp": 1.15,
    "leave_one_out": 0.55,
    "activations_together": 1.3,
    "memory": 1.1,
}
Batch = tuple[Tensor, Tensor]


def vit_small() -> nn.Module:
    """ViT-S/16."""
    model = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536,
        num_classes=10,
    )  # fmt: skip
    # A head of zeros would stop every gradient.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet56": (resnet56, (128, 3, 32, 32)),
    "vit_small": (vit_small, (8, 3, 224, 224)),
}


def make(net: str) -> tuple[nn.Module, Batch]:
    """Return a net and a batch."""
    build, shape = NETS[net]
    torch.manual_seed(0)
    return build().train(), (torch.randn(shape), torch.arange(shape[0]) % 10)


# --- the passes, written out ----------------------------------------------------------------------


def forward(model: nn.Module, batch: Batch) -> None:
    """One evaluation forward."""
    model.eval()
    with torch.no_grad():
        model(batch[0])


def forward_backward(model: nn.Module, batch: Batch) -> None:
    """One training forward and backward."""
    model.train()
    model.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()


def training_step(model: nn.Module, batch: Batch) -> None:
    """One step of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    forward_backward(model, batch)
    optimizer.step()


def gradient_and_hessian(model: nn.Module, batch: Batch) -> None:
    """GraSP's passes over the two halves of a batch: the gradient, and the Hessian times it."""
    model.train()
    weights = [p for p in model.parameters() if p.dim() > 1]
    halves = list(zip(*(part.chunk(2) for part in batch), strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        total: list[Tensor] = []
        for images, labels in halves:
            loss = functional.cross_entropy(model(images) / TEMPERATURE, labels)
            found = torch.autograd.grad(loss, weights)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        for images, labels in halves:
            loss = functional.cross_entropy(model(images) / TEMPERATURE, labels)
            found = torch.autograd.grad(loss, weights, create_graph=True)
            z = torch.stack([(a * b).sum() for a, b in zip(total, found, strict=True)]).sum()
            torch.autograd.grad(z, weights, allow_unused=True)


# --- timing ---------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any]) -> float:
    """Return the processor time of one call: on one thread, what else runs does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(own: Callable[[], Any], reference: Callable[[], Any], pairs: int) -> list[float]:
    """Return own over reference, in alternating order, after one run of each to warm up."""
    own()
    reference()
    found = []
    for pair in range(pairs):
        if pair % 2:
            mine, theirs = seconds(own), seconds(reference)
        else:
            theirs, mine = seconds(reference), seconds(own)
        found.append(mine / theirs)
    return found


def row(found: list[float], target: float, divisor: float = 1.0) -> dict[str, Any]:
    """Return median and range of ratios, in units of `divisor`."""
    found = [value / divisor for value in found]
    return {
        "ratio": round(statistics.median(found), 3),
        "range": [round(min(found), 3), round(max(found), 3)],
        "target": target,
    }


def measure(net: str, pairs: int) -> dict[str, Any]:
    """Return the figures of one net."""
    model, batch = make(net)
    analysis = find_blocks(model, batch[0])
    blocks = len(analysis.blocks)

    def score(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: score_blocks(model, name, batch, analysis=analysis, **options)

    def paired(
        own: Callable[[], Any], reference: Callable[..., None], *, times: int
    ) -> list[float]:
        return ratios(own, lambda: reference(model, batch), times)

    figures: dict[str, Any] = {"batch": list(batch[0].shape), "blocks": blocks}
    for name in FIRST_ORDER:
        found = paired(score(name), forward_backward, times=pairs)
        figures[name] = row(found, TARGETS["gradient"])
        show(net, name, "of a forward and backward", figures[name])
    found = paired(score("grasp"), gradient_and_hessian, times=pairs)
    figures["grasp"] = row(found, TARGETS["grasp"])
    show(net, "grasp", "of gradient and Hessian product", figures["grasp"])
    for name in LEAVE_ONE_OUT:
        found = paired(score(name), forward, times=pairs)
        figures[name] = row(found, TARGETS["leave_one_out"], blocks)
        show(net, name, f"of {blocks} forward passes", figures[name])
    found = paired(score("kl", max_cache_bytes=0), forward, times=pairs)
    figures["kl_without_cache"] = row(found, TARGETS["leave_one_out"], blocks)
    show(net, "kl, no cache", f"of {blocks} forward passes", figures["kl_without_cache"])
    alone = {
        name: statistics.median([seconds(score(name)) for _ in range(2)]) for name in ACTIVATIONS
    }
    dearest = max(alone, key=alone.__getitem__)
    together = ratios(
        lambda: score_criteria(model, ACTIVATIONS, batch, analysis=analysis), score(dearest), pairs
    )
    figures["activations_together"] = {
        **row(together, TARGETS["activations_together"]),
        "dearest": dearest,
    }
    show(net, "activations", f"of {dearest} alone", figures["activations_together"])
    return figures


def show(net: str, name: str, unit: str, figure: dict[str, Any]) -> None:
    """Print one line."""
    low, high = figure["range"]
    print(
        f"{net:10} {name:14} {figure['ratio']:6.3f} ({low:.3f} to {high:.3f}) {unit}, "
        f"target {figure['target']}",
        flush=True,
    )


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(net: str, what: str) -> int:
    """Return what one run adds to the resident memory at its peak, in a process of its own."""
    command = [sys.executable, __file__, "--net", net, "--peak-of", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def peak_here(net: str, what: str) -> int:
    """Run once and return the peak above where it started; of this process, on Linux."""
    model, batch = make(net)
    analysis = find_blocks(model, batch[0][:1])
    status = Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return int(status.read_text().partition(f"{field}:")[2].split()[0])

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if what == "training step":
        training_step(model, batch)
    else:
        score_blocks(model, what, batch, analysis=analysis)
    return 1024 * (kilobytes("VmHWM") - before)


def memory(net: str) -> dict[str, Any]:
    """Return the peaks of scoring over that of a training step."""
    step = peak_bytes(net, "training step")
    figures: dict[str, Any] = {"training_step_bytes": step}
    for name in (*FIRST_ORDER, "grasp", *LEAVE_ONE_OUT, *ACTIVATIONS):
        ratio = round(peak_bytes(net, name) / step, 3)
        figures[name] = {"ratio": ratio, "range": [ratio, ratio], "target": TARGETS["memory"]}
        show(net, name, "of a training step's peak memory", figures[name])
    return figures


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="paired runs (default 5)")
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS), help="default: both")
    parser.add_argument("--out", type=Path, help="JSON file (default in results/)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(peak_here(options.net[0], options.peak_of))
        return
    result = {
        net: {"time": measure(net, options.pairs), "memory": memory(net)} for net in options.net
    }
    result = {"pairs": options.pairs, "nets": result}
    print(f"written to {write_result('scoring', result, options.out)}")


if __name__ == "__main__":
    main()
