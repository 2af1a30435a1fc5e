"""A ticket beside what else would have made a network of its cost, timed in turns in one run.

For each network, a ticket is cut to a share of the dense MACs and timed with
- width: the dense model with fewer channels, of the same MACs, by Torch-Pruning (extra `filters`);
- by_hand: the network of that depth that a person would have written, with the same weights;
- identity: the dense model with `nn.Identity` put by hand in the place of the blocks;
- sibling: timm's smaller model of the family with the nearest MACs (extra `zoo`).
Pruning both ways is timed too, and its peak memory taken, and `prune` is held against the passes
that it needs. Weights and images are random: no figure here is an accuracy.

    python benchmarks/against_peers.py [--networks resnet50] [--rounds 30]
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torchvision
from _memory import can_measure, in_own_process, peak_bytes
from _pairs import Run, again, alternate, median_ms, ratio
from _peers import (
    SUBJECTS,
    Batch,
    Subject,
    check_same,
    first_order,
    nearest_sibling,
    ratio_for,
    width_pruning,
    with_identities,
    written_by_hand,
)
from _results import Results, check_positive, device_of, parser_of
from torch import Tensor, nn

import blockprune
from blockprune.costs import model_costs
from blockprune.profiling import compare_latency

BY_HAND = (0.97, 1.03)
OVER_WIDTH = {"cpu": 0.90, "cuda": 0.80}
PRUNE_OVER_PASSES = 1.6
ANALYSIS_FORWARDS = 10
SATURATED = {"cpu": 4, "cuda": 256}
PRUNING_BATCH = 8


class Absent(Exception):
    """A package that a comparison needs is not installed; says which, and how to get it."""


def optional(package: str, extra: str) -> ModuleType:
    """Import a package of an extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Absent(f"{error}; pip install '.[{extra}]'") from error


def random_batch(subject: Subject, size: int, device: torch.device) -> Batch:
    """Return random images with labels 0 to 9 in turn."""
    images = torch.randn(size, 3, subject.image, subject.image, device=device)
    return images, torch.arange(size, device=device) % 10


def dense_of(name: str, device: torch.device) -> nn.Module:
    """Return a network of SUBJECTS, the same each time."""
    torch.manual_seed(0)
    return SUBJECTS[name].dense().to(device).eval()


def cutting(
    subject: Subject, dense: nn.Module, batch: Batch, *, verify: bool = True
) -> Callable[[], nn.Module]:
    """Return what cuts a ticket of the subject, by first-order scores."""
    return lambda: blockprune.prune(
        dense,
        "snip",
        keep_macs=subject.keep_macs,
        granularity="layer",
        data=batch,
        example_inputs=batch[0][:1],
        verify=verify,
    )


# --- the networks, timed --------------------------------------------------------------------------


def compare(name: str, results: Results, options: Any, device: torch.device) -> None:
    """Measure one network against its peers, a part at a time."""
    subject, dense = SUBJECTS[name], dense_of(name, device)
    batch = random_batch(subject, PRUNING_BATCH, device)
    image = batch[0][:1]
    ticket = cutting(subject, dense, batch)().eval()
    removed = blockprune.plan_of(ticket).remove
    macs = model_costs(ticket, image).macs
    models = {
        "dense": dense,
        "ticket": ticket,
        "by_hand": written_by_hand(subject, dense, ticket, removed),
        "identity": with_identities(dense, removed),
    }
    differences = {
        what: check_same(ticket, models[what], image, what) for what in ("by_hand", "identity")
    }
    results.add("networks", name, removed=list(removed), largest_difference=differences)
    share = add_width(subject, models, macs, batch, name, results)
    add_sibling(subject, models, macs, image, name, results)
    counts = {what: model_costs(model, image).macs for what, model in models.items()}
    results.add("networks", name, macs=counts)
    latency(name, models, image, results, options, device)
    del models, ticket
    if share is not None:
        time_to_prune(name, dense, share, batch, results, options, device)
        memory_to_prune(name, share, results, options, device)


def add_width(
    subject: Subject,
    models: dict[str, nn.Module],
    macs: int,
    batch: Batch,
    name: str,
    results: Results,
) -> float | None:
    """Add the model of fewer channels; return which share of them went."""
    if not subject.width_pruned:
        return None
    try:
        torch_pruning = optional("torch_pruning", "filters")
    except Absent as why:
        results.skip(f"{name}: width", str(why))
        return None
    share = ratio_for(torch_pruning, models["dense"], macs, batch[0][:1])
    models["width"] = copy.deepcopy(models["dense"])
    width_pruning(torch_pruning, models["width"], share, batch)()
    results.add("networks", name, share_of_channels=round(share, 4))
    return share


def add_sibling(
    subject: Subject,
    models: dict[str, nn.Module],
    macs: int,
    image: Tensor,
    name: str,
    results: Results,
) -> None:
    """Add timm's smaller model."""
    if not subject.siblings:
        return
    try:
        timm = optional("timm", "zoo")
    except Absent as why:
        results.skip(f"{name}: sibling", str(why))
        return
    sibling, models["sibling"] = nearest_sibling(timm, subject, macs, image)
    results.add("networks", name, sibling=sibling)


def latency(
    name: str,
    models: Mapping[str, nn.Module],
    image: Tensor,
    results: Results,
    options: Any,
    device: torch.device,
) -> None:
    """Time forward passes of all networks in turns, at batch 1 and saturated."""
    rounds = {1: options.rounds, options.saturated: max(1, options.rounds // 4)}
    for size, repeats in rounds.items():
        timed = compare_latency(
            models, image, batch_sizes=(size,), repeats=repeats, threads=options.threads
        )
        samples = {what: found.samples_ms for what, [found] in timed.items()}
        found = {
            "rounds": repeats,
            "median_ms": {what: round(one.median_ms, 4) for what, [one] in timed.items()},
            "ticket_over": {
                what: ratio(samples["ticket"], times)
                for what, times in samples.items()
                if what != "ticket"
            },
        }
        results.add("latency", name, **{str(size): found})
        show(name, size, found)
        hold(name, size, found["ticket_over"], results, device)


def hold(
    name: str, size: int, over: Mapping[str, Any], results: Results, device: torch.device
) -> None:
    """Hold the ratios against what is to be reached."""
    results.target(
        f"{name} ticket over by_hand, batch {size}",
        over["by_hand"]["ratio"],
        at_least=BY_HAND[0],
        at_most=BY_HAND[1],
    )
    if name == "resnet50" and size == 1 and "width" in over:
        results.target(
            f"{name} ticket over width, batch {size}",
            over["width"]["ratio"],
            at_most=OVER_WIDTH[device.type],
        )


def show(name: str, size: int, found: Mapping[str, Any]) -> None:
    """Print the ratios of one batch size."""
    print(f"{name}, batch {size}: ticket {found['median_ms']['ticket']:.2f} ms")
    for what, row in found["ticket_over"].items():
        low, high = row["quartiles"]
        print(f"  over {what:9} {row['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)


# --- pruning --------------------------------------------------------------------------------------


def time_to_prune(
    name: str,
    dense: nn.Module,
    share: float,
    batch: Batch,
    results: Results,
    options: Any,
    device: torch.device,
) -> None:
    """Time pruning in depth and in width, each with one forward and backward of the same batch.

    The search for the share of channels that meets the MACs is not counted; Torch-Pruning changes
    the model itself, and gets a copy that is not counted either.
    """
    torch_pruning = optional("torch_pruning", "filters")
    runs: dict[str, Callable[[], Run]] = {
        "ticket": again(cutting(SUBJECTS[name], dense, batch)),
        "ticket_unverified": again(cutting(SUBJECTS[name], dense, batch, verify=False)),
        "width": lambda: width_pruning(torch_pruning, copy.deepcopy(dense), share, batch),
    }
    samples = alternate(runs, options.pairs, device=device)
    over = {
        f"{what}_over_width": ratio(samples[what], samples["width"])
        for what in ("ticket", "ticket_unverified")
    }
    median = {what: median_ms(times) for what, times in samples.items()}
    results.add("time_to_prune", name, median_ms=median, **over)
    for what, found in over.items():
        print(f"{name}: time to prune, {what.replace('_', ' ')} {found['ratio']:.3f}", flush=True)


def memory_to_prune(
    name: str, share: float, results: Results, options: Any, device: torch.device
) -> None:
    """Take the peak of pruning in depth and in width, each in a process of its own."""
    if not can_measure(device):
        results.skip(f"{name}: memory to prune", "peaks are measured on Linux and on GPUs")
        return
    arguments = ["--networks", name, "--device", device.type, "--threads", str(options.threads)]
    peaks = {
        how: in_own_process(__file__, [*arguments, "--peak-of", how, str(share)])
        for how in ("ticket", "width")
    }
    over = round(peaks["ticket"] / peaks["width"], 4)
    results.add("memory_to_prune", name, peak_bytes=peaks, ticket_over_width=over)
    print(f"{name}: memory to prune, ticket over width {over:.3f}", flush=True)


def peak_here(name: str, how: str, share: float, device: torch.device) -> int:
    """Return the peak of pruning once, in this process."""
    subject, dense = SUBJECTS[name], dense_of(name, device)
    batch = random_batch(subject, PRUNING_BATCH, device)
    if how == "ticket":
        return peak_bytes(cutting(subject, dense, batch), device)
    torch_pruning = optional("torch_pruning", "filters")
    return peak_bytes(width_pruning(torch_pruning, dense, share, batch), device)


def pruning_in_passes(results: Results, options: Any, device: torch.device) -> None:
    """Hold `prune` and its analysis against the passes of a ResNet-50 that they need."""
    dense = torchvision.models.resnet50().to(device).eval()
    image = torch.randn(1, 3, 224, 224, device=device)
    forward_samples = alternate(
        {
            "analysis": again(lambda: blockprune.find_blocks(dense, image)),
            "forward": again(torch.no_grad()(lambda: dense(image))),
        },
        3 * options.pairs,
        device=device,
    )
    analysis = ratio(forward_samples["analysis"], forward_samples["forward"])
    results.add("prune", "analysis_over_forward", **analysis)
    results.target(
        "resnet50 analysis, in forwards at batch 1", analysis["ratio"], at_most=ANALYSIS_FORWARDS
    )
    side = options.image_size
    images = torch.randn(options.images, 3, side, side, device=device)
    data = (images, torch.arange(options.images, device=device) % 10)
    twin = copy.deepcopy(dense).train()

    def passes() -> None:
        twin.zero_grad()
        first_order(twin, data)
        blockprune.find_blocks(dense, images[:1])

    ways: dict[str, dict[str, Any]] = {
        "with_example": {"example_inputs": images[:1]},
        "as_is": {},
    }
    for way, more in ways.items():
        samples = alternate(
            {
                "prune": again(
                    lambda more=more: blockprune.prune(dense, "snip", p=3, data=data, **more)
                ),
                "passes": again(passes),
            },
            options.pairs,
            device=device,
        )
        found = ratio(samples["prune"], samples["passes"])
        results.add("prune", way, median_ms=median_ms(samples["prune"]), over_passes=found)
        results.target(
            f"resnet50 prune over its passes, {options.images} images of {side}, {way}",
            found["ratio"],
            at_most=PRUNE_OVER_PASSES,
        )


def arguments() -> argparse.Namespace:
    """Return the options, checked."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=30, help="at batch 1; a fourth saturated")
    parser.add_argument("--saturated", type=int, help="batch (default 4 on CPU, 256 on a GPU)")
    parser.add_argument("--pairs", type=int, default=3, help="of prunings (default 3)")
    parser.add_argument("--images", type=int, default=100, help="that prune scores (default 100)")
    parser.add_argument("--image-size", type=int, default=64, help="of those (default 64)")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = device_of(options)
    options.saturated = SATURATED[device.type] if options.saturated is None else options.saturated
    names = ("rounds", "saturated", "pairs", "images", "image_size")
    check_positive(**{name: getattr(options, name) for name in names})
    return options


def main() -> None:
    """Measure, print, write the JSON."""
    options = arguments()
    device = device_of(options)
    if options.peak_of:
        how, share = options.peak_of
        print(json.dumps(peak_here(options.networks[0], how, float(share), device)))
        return
    names = ("rounds", "saturated", "pairs", "images", "image_size")
    results = Results(
        "against_peers",
        options,
        device,
        **{name: getattr(options, name) for name in names},
        pruning_batch=PRUNING_BATCH,
        keep_macs={name: SUBJECTS[name].keep_macs for name in options.networks},
    )
    pruning_in_passes(results, options, device)
    for name in options.networks:
        compare(name, results, options, device)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
