"""``blockprune bench``: a dense model and its tickets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer

from blockprune.cli.models import ModelSource
from blockprune.cli.output import count, print_json, print_line, print_table, shape_text, working
from blockprune.cli.tickets import Recipe, Workbench
from blockprune.costs import Costs, model_costs
from blockprune.plan import Budget
from blockprune.profiling import Latency, compare_latency
from blockprune.tracing import tensors_in

__all__ = ["check_device", "run"]


@dataclass(frozen=True)
class Row:
    """One network of the comparison."""

    label: str
    removed: tuple[str, ...]
    costs: Costs
    latencies: tuple[Latency, ...]


def check_device(name: str) -> torch.device:
    """Return the device of a name, or refuse it before any work.

    Raises:
        typer.BadParameter: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # A build without the device raises AssertionError, an unknown name or index RuntimeError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise typer.BadParameter(f"--device {name!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise typer.BadParameter("--device 'meta' computes nothing, so there is nothing to time.")
    return device


def run(
    source: ModelSource,
    recipe: Recipe,
    budgets: Sequence[int | float | Budget],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    *,
    as_json: bool = False,
) -> None:
    """Measure a dense model and one ticket a budget, and print them side by side.

    Args:
        source: the model and its inputs.
        recipe: how blocks are chosen.
        budgets: one ticket each: a count or a share of the removable blocks, or what may be left.
        batches: batch sizes to time.
        repeats: timed rounds; in each, every network runs once.
        device: where networks run.
        as_json: print JSON in place of the table.
    """
    with working(f"Measuring {source.spec} ..."):
        model, inputs = source.load(device)
        bench = Workbench(model.eval(), inputs, recipe, budgets)
        plans = {_label(b): plan for b, plan in zip(budgets, bench.plans, strict=True)}
        networks = {"dense": model, **{label: bench.cut(plan) for label, plan in plans.items()}}
        latencies = compare_latency(networks, inputs, batch_sizes=batches, repeats=repeats)
    rows = [
        Row(
            label,
            plans[label].remove if label in plans else (),
            model_costs(network, inputs),
            latencies[label],
        )
        for label, network in networks.items()
    ]
    shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
    if as_json:
        criterion = bench.plans[0].criterion
        print_json(_as_json(source.spec, shapes, recipe, criterion, device, repeats, rows))
        return
    inputs_text = ", ".join(shape_text(shape) for shape in shapes)
    print_line(f"{source.spec} on {device}, inputs {inputs_text}, {repeats} rounds")
    _print_rows(rows)


def _label(budget: int | float | Budget) -> str:
    return str(budget) if isinstance(budget, Budget) else f"p={budget}"


def _saved(dense: int, ticket: int) -> float:
    """Return the share of ``dense`` that ``ticket`` does without, in percent."""
    return 100 * (dense - ticket) / dense if dense else 0.0


def _as_json(
    spec: str,
    shapes: list[list[int]],
    recipe: Recipe,
    criterion: str | None,
    device: torch.device,
    repeats: int,
    rows: Sequence[Row],
) -> dict[str, Any]:
    dense = rows[0].costs
    return {
        "model": spec,
        "inputs": shapes,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "criterion": criterion,
        "granularity": recipe.granularity,
        "networks": [
            {
                "name": row.label,
                "removed": list(row.removed),
                "params": row.costs.params,
                "params_saved_percent": _saved(dense.params, row.costs.params),
                "macs": row.costs.macs,
                "macs_saved_percent": _saved(dense.macs, row.costs.macs),
                "latency": [
                    {
                        "batch": latency.batch_size,
                        "median_ms": latency.median_ms,
                        "iqr_ms": latency.iqr_ms,
                    }
                    for latency in row.latencies
                ],
            }
            for row in rows
        ],
    }


def _print_rows(rows: Sequence[Row]) -> None:
    dense = rows[0].costs
    costs = [
        (
            row.label,
            str(len(row.removed)),
            count(row.costs.params),
            f"{_saved(dense.params, row.costs.params):.3f} %",
            count(row.costs.macs),
            f"{_saved(dense.macs, row.costs.macs):.3f} %",
        )
        for row in rows
    ]
    headers = ("network", "removed", "parameters", "saved", "MACs", "MACs saved")
    print_line("")
    print_table(headers, costs, numeric=headers[1:])
    times = [
        (
            row.label,
            str(latency.batch_size),
            f"{latency.median_ms:.3f}",
            f"{latency.iqr_ms:.3f}",
            f"{reference.median_ms / latency.median_ms:.3f}",
        )
        for row in rows
        for latency, reference in zip(row.latencies, rows[0].latencies, strict=True)
    ]
    headers_ms = ("network", "batch", "latency ms", "IQR ms", "speed-up")
    print_line("")
    print_table(headers_ms, times, numeric=headers_ms[1:])
