"""Stages that judge a trained network: accuracy and costs, latency, similarity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from blockprune.costs import filter_count, macs_per_weight, model_costs
from blockprune.data import make_loader, size_of
from blockprune.lottery.alike import block_similarity
from blockprune.lottery.merges import residual_merges
from blockprune.lottery.training import evaluate
from blockprune.lottery.work.bench import Bench, Made, device
from blockprune.lottery.work.cuts import CutNetwork, cut_network
from blockprune.profiling import compare_latency
from blockprune.robustness import RobustnessChoice, measured

__all__ = ["evaluation", "latency", "robustness", "similarity"]

SIMILARITY_IMAGES = 512
SIMILARITY_BATCH = 128
"""Of the test set, in its order: enough for a CKA to two digits, and little to compute."""


def evaluation(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Test a trained network, and count what is left of it."""
    del folder
    network = cut_network(bench, inputs["seed"], inputs["cut"])
    bench.final(inputs["network"]).load_into(network.model)
    analysis = bench.setting.analyse(bench.setting.build(inputs["seed"]))
    merges = sum(len(stage.blocks) + stage.fixed for stage in analysis.stages)
    # Before the test, which moves the network to where it runs: the image is not there.
    costs = _costs(network, bench.setting.image)
    result = evaluate(network.model, bench.setting.images.test, workers=bench.job.workers)
    return {
        "accuracy": result.accuracy,
        "loss": result.loss,
        "blocks": merges - len(network.removed),
        "filters": filter_count(network.model),
        **costs,
    }, {}


def _costs(network: CutNetwork, image: Tensor) -> dict[str, Any]:
    """Return the parameters that are left, and the MACs that they need."""
    costs = model_costs(network.model, image)
    found: dict[str, Any] = {"params": costs.params, "macs": costs.macs}
    if network.plan is not None:
        found["narrowed"] = {name: len(cut.remove) for name, cut in network.plan.cuts.items()}
    mask = network.mask
    if mask is not None:
        uses = macs_per_weight(network.model, image)
        idle = sum((one.total - one.kept) * uses[name] for name, one in mask.layers.items())
        found["params"] -= mask.total - mask.kept
        found["macs"] -= idle
        found["weights_left"], found["weights_total"] = mask.kept, mask.total
    return found


def robustness(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Corrupt and attack the test images of a trained network."""
    del folder
    network = cut_network(bench, inputs["seed"], inputs["cut"]).model
    bench.final(inputs["network"]).load_into(network)
    dense = None
    if inputs["dense"] is not None:
        dense = bench.setting.build(inputs["seed"])
        bench.final(inputs["dense"]).load_into(dense)
        dense.to(device())
    found = measured(
        RobustnessChoice.model_validate(inputs["choice"]),
        network.to(device()),
        bench.setting.images,
        dense=dense,
        data_dir=bench.setting.data_dir,
        seed=inputs["seed"],
    )
    return found, {}


def latency(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Time the forward passes of all structures, in turns."""
    del folder
    here = device()
    networks = {
        json.dumps(cut): cut_network(bench, inputs["seed"], cut).model.to(here)
        for cut in inputs["cuts"]
    }
    measured = compare_latency(
        networks,
        bench.setting.image.to(here),
        batch_sizes=(inputs["batch"],),
        repeats=inputs["repeats"],
    )
    times = [
        {"cut": json.loads(name), "median_ms": one.median_ms, "iqr_ms": one.iqr_ms}
        for name, [one] in measured.items()
    ]
    return {}, {"latencies": times}


def similarity(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Compare every block of a trained network with every one of the trained dense network."""
    del folder
    dense = bench.setting.build(inputs["seed"])
    network = cut_network(bench, inputs["seed"], inputs["cut"])
    rows = [merge.name for merge in residual_merges(bench.setting.analyse(dense))]
    columns = [name for name in rows if name not in network.removed]
    for model, stage in ((dense, inputs["dense"]), (network.model, inputs["network"])):
        bench.final(stage).load_into(model)
        model.to(device())
    test = bench.setting.images.test
    images = Subset(test, range(min(size_of(test), SIMILARITY_IMAGES)))
    values = block_similarity(
        dense,
        network.model,
        make_loader(images, SIMILARITY_BATCH),
        rows,
        columns,
        granularity=bench.setting.granularity,
    )
    return {"rows": rows, "columns": columns, "values": values}, {}
