"""Table 4 of "When Layers Play the Lottery", measured, beside what was published.

Tickets of ResNet32 and ResNet56, chosen at initialisation by GraSP among the authors' candidates:
the first block of the first stage stays, and so do two blocks of each stage. Images are random, of
CIFAR's size, since no figure here is an accuracy. FLOPs, memory (the paper's formula) and filters
are counted; training steps and forward passes of all networks are timed in turns.

CO2 is the ML CO2 Impact formula, watts x hours x grid: with the same machine and grid its
reduction is 1 - time of a training step over dense.

    python benchmarks/table4.py [--rounds 20] [--networks resnet32 resnet56]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from _pairs import again, alternate, median_ms, ratio
from _results import Results, check_positive, device_of, parser_of
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from blockprune.costs import model_costs, paper_memory_bytes
from blockprune.models import resnet32, resnet56
from blockprune.profiling import compare_latency

PROTECT = ("layer1.0",)
MIN_BLOCKS_PER_STAGE = 2
SAMPLES_PER_CLASS = 10
TARGET = ("resnet56", 12, 0.55)
STAGES = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Published:
    """One row of the paper's Table 4: reductions in percent, and the training speed-up.

    Attributes:
        memory_fits: blocks off each stage with which the memory cell can be explained.
        note: what is wrong with the row.
    """

    flops_percent: float
    memory_percent: float
    co2_percent: float
    training_speed_up: float
    memory_fits: tuple[int, int, int]
    note: str = ""


TRUNCATED = "FLOPs truncated, not rounded, to two decimals"
PUBLISHED: Mapping[str, Mapping[int, Published | None]] = {
    "resnet32": {
        1: Published(6.82, 10.13, 11.11, 1.10, (1, 0, 0), TRUNCATED),
        3: Published(20.47, 25.29, 25.92, 1.35, (3, 0, 0), TRUNCATED),
        4: Published(
            34.13,
            30.11,
            33.33,
            1.57,
            (3, 1, 0),
            "FLOPs are those of 5 blocks, memory that of 4: an error of the paper",
        ),
        5: None,
    },
    "resnet56": {
        3: Published(11.25, 15.15, 13.33, 1.16, (3, 0, 0), TRUNCATED),
        4: Published(15.00, 19.42, 20.00, 1.24, (4, 0, 0), TRUNCATED),
        5: Published(18.76, 23.69, 24.44, 1.34, (5, 0, 0), TRUNCATED),
        12: Published(45.00, 45.82, 51.11, 2.03, (7, 5, 0), "FLOPs rounded further, from 45.03"),
    },
}
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"resnet32": resnet32, "resnet56": resnet56}
Batch = tuple[Tensor, Tensor]


def random_batch(size: int, device: torch.device) -> Batch:
    """Return random images with labels 0 to 9 in turn."""
    images = torch.randn(size, 3, 32, 32, device=device)
    return images, torch.arange(size, device=device) % 10


def cut_tickets(
    dense: nn.Module, counts: Sequence[int], device: torch.device
) -> dict[int, nn.Module]:
    """Return the GraSP ticket for each number of blocks."""
    data = random_batch(10 * SAMPLES_PER_CLASS, device)
    example = data[0][:1]
    analysis = blockprune.find_blocks(dense, example)
    scores = blockprune.score_blocks(dense, "grasp", data, analysis=analysis)
    tickets = {}
    for p in counts:
        plan = blockprune.make_plan(
            analysis, scores, p=p, protect=PROTECT, min_blocks_per_stage=MIN_BLOCKS_PER_STAGE
        )
        tickets[p] = blockprune.remove_blocks(dense, plan, example)
    return tickets


def counted(model: nn.Module, dense: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return what does not depend on the machine, and its reductions in percent."""
    image = torch.zeros(1, 3, 32, 32, device=device)
    costs, whole = model_costs(model, image), model_costs(dense, image)
    memory, all_memory = paper_memory_bytes(model, image), paper_memory_bytes(dense, image)
    return {
        "params": costs.params,
        "macs": costs.macs,
        "filters": sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)),
        "memory_bytes": memory,
        "flops_percent": round(100 * (1 - costs.macs / whole.macs), 3),
        "memory_percent": round(100 * (1 - memory / all_memory), 3),
    }


def beside(published: Published, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a published row, and what its dense memory is, in units of ours, if it is right.

    The factor only says something where the ticket has the removals that the memory cell fits.
    """
    row = asdict(published)
    left = 1 - own["memory_percent"] / 100
    if list(published.memory_fits) == own["per_stage"]:
        row["memory_baseline_factor"] = round(left / (1 - published.memory_percent / 100), 4)
    return row


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return one forward, backward and step of SGD, as the lab's later code trains."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    images, labels = batch

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def time_training(
    models: Mapping[str, nn.Module], batch: Batch, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Return milliseconds a step, and the ratio to dense, for each network."""
    runs = {name: again(training_step(model.train(), batch)) for name, model in models.items()}
    samples = alternate(runs, rounds, warmup=2, device=device)
    return {
        name: {"step_ms": median_ms(times), **ratio(times, samples["dense"])}
        for name, times in samples.items()
    }


def time_inference(
    models: Mapping[str, nn.Module], images: Tensor, rounds: int, threads: int
) -> dict[str, Any]:
    """Return milliseconds a pass at batch 1 and at the training batch, and the ratios to dense."""
    sizes = sorted({1, len(images)})
    timed = compare_latency(models, images, batch_sizes=sizes, repeats=rounds, threads=threads)
    return {
        name: {
            str(size): {
                "median_ms": round(own.median_ms, 4),
                **ratio(own.samples_ms, dense.samples_ms),
            }
            for size, own, dense in zip(sizes, latencies, timed["dense"], strict=True)
        }
        for name, latencies in timed.items()
    }


def measure(network: str, results: Results, options: Any, device: torch.device) -> None:
    """Measure one network and its tickets, a part at a time."""
    torch.manual_seed(0)
    dense = NETWORKS[network]().to(device)
    rows = PUBLISHED[network]
    tickets = cut_tickets(dense, list(rows), device)
    models = {"dense": dense, **{f"p={p}": ticket for p, ticket in tickets.items()}}
    results.add(network, "dense", counted=counted(dense, dense, device))
    for p, published in rows.items():
        removed = blockprune.plan_of(tickets[p]).remove
        stages = Counter(name.partition(".")[0] for name in removed)
        own = {
            "removed": list(removed),
            "per_stage": [stages[stage] for stage in STAGES],
            **counted(tickets[p], dense, device),
        }
        published_row = None if published is None else beside(published, own)
        results.add(network, f"p={p}", counted=own, published=published_row)
    batch = random_batch(options.batch, device)
    for name, found in time_training(models, batch, options.rounds, device).items():
        found["speed_up"] = round(1 / found["ratio"], 3)
        found["co2_percent"] = round(100 * (1 - found["ratio"]), 2)
        results.add(network, name, training=found)
        print(line(network, name, found), flush=True)
        if (network, name) == (TARGET[0], f"p={TARGET[1]}"):
            results.target(f"training time of {network} {name} over dense", found["ratio"],
                           at_most=TARGET[2])  # fmt: skip
    latencies = time_inference(models, batch[0], options.latency_rounds, options.threads)
    for name, latency in latencies.items():
        results.add(network, name, latency=latency)


def line(network: str, name: str, found: Mapping[str, Any]) -> str:
    """Return one printed line."""
    low, high = found["quartiles"]
    return (
        f"{network} {name:6} step {found['step_ms']:9.2f} ms, {found['ratio']:.3f} of dense "
        f"({low:.3f} to {high:.3f}), speed-up {found['speed_up']:.2f}"
    )


def main() -> None:
    """Measure, print, write the JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20, help="training steps (default 20)")
    parser.add_argument("--latency-rounds", type=int, default=20, help="passes (default 20)")
    parser.add_argument("--batch", type=int, default=128, help="of training (default 128)")
    options = parser.parse_args()
    check_positive(
        rounds=options.rounds, latency_rounds=options.latency_rounds, batch=options.batch
    )
    device = device_of(options)
    results = Results(
        "table4", options, device, rounds=options.rounds, latency_rounds=options.latency_rounds,
        batch=options.batch, criterion="grasp", samples_per_class=SAMPLES_PER_CLASS,
        protect=list(PROTECT), min_blocks_per_stage=MIN_BLOCKS_PER_STAGE,
    )  # fmt: skip
    for network in options.networks:
        measure(network, results, options, device)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
