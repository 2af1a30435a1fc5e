"""``blockprune analyze``: the blocks of a model, and the merges that are none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from blockprune.blocks import BlockAnalysis, ResidualBlock, find_blocks
from blockprune.cli.models import ModelSource
from blockprune.cli.output import (
    count,
    plural,
    print_detail,
    print_json,
    print_line,
    print_table,
    shape_text,
    working,
)
from blockprune.costs import Costs, block_costs, model_costs

__all__ = ["run"]


def run(
    source: ModelSource, granularity: str, *, with_rejections: bool = False, as_json: bool = False
) -> None:
    """Analyse a model and print what was found.

    Args:
        source: the model and its inputs.
        granularity: ``branch`` or ``layer``.
        with_rejections: also print the merges refused (JSON always has them).
        as_json: print JSON in place of tables.
    """
    with working(f"Analysing {source.spec} ..."):
        model = source.build()
        inputs = source.inputs(model)
        analysis = find_blocks(model, inputs, granularity=granularity)
        total = model_costs(model, inputs)
        costs = block_costs(analysis)
    shapes = [list(tensor.shape) for tensor in inputs]
    if as_json:
        print_json(_as_json(source.spec, shapes, analysis, total, costs))
        return
    _print_summary(source.spec, shapes, analysis, total)
    if analysis.blocks:
        _print_blocks(analysis, costs)
    if with_rejections:
        _print_rejections(analysis)
    elif analysis.rejections:
        refused = plural(len(analysis.rejections), "merge")
        print_line(f"\n{refused} refused; --rejections says why.")


def _as_json(
    spec: str,
    shapes: list[list[int]],
    analysis: BlockAnalysis,
    total: Costs,
    costs: dict[str, Costs],
) -> dict[str, Any]:
    return {
        "model": spec,
        "inputs": shapes,
        "granularity": analysis.granularity,
        "fingerprint": analysis.fingerprint,
        "params": total.params,
        "macs": total.macs,
        "blocks": [
            {
                "name": block.name,
                "owner": block.owner,
                "params": block.params,
                "macs": costs[block.name].macs,
                "shape": list(block.shape),
                "stage": block.stage,
                "branches": list(block.branches),
                "contains": list(block.contains),
            }
            for block in analysis.blocks
        ],
        "rejections": [asdict(rejection) for rejection in analysis.rejections],
    }


def _print_summary(
    spec: str, shapes: list[list[int]], analysis: BlockAnalysis, total: Costs
) -> None:
    found = len(analysis.blocks)
    owners = len({block.owner for block in analysis.blocks})
    where = f" in {plural(owners, 'module')}" if owners not in (0, found) else ""
    unit = "branches" if analysis.granularity == "branch" else "layers"
    print_line(f"{spec}: {plural(found, 'removable block')} ({unit}){where}")
    print_line(
        f"{count(total.params)} parameters, {count(total.macs)} MACs "
        f"for inputs {', '.join(shape_text(shape) for shape in shapes)}"
    )


def _print_blocks(analysis: BlockAnalysis, costs: dict[str, Costs]) -> None:
    rows = [
        (
            block.name,
            _relative_owner(block),
            count(block.params),
            count(costs[block.name].macs),
            shape_text(block.shape),
        )
        for block in analysis.blocks
    ]
    print_line("")
    print_table(
        ("block", "owner", "params", "MACs", "shape"), rows, numeric=("params", "MACs", "shape")
    )


def _relative_owner(block: ResidualBlock) -> str:
    """Write an owner without the part of its path that the block's name shows already."""
    if block.owner == block.name:
        return "itself"
    if block.name.startswith(f"{block.owner}."):
        return block.owner.rpartition(".")[2]
    return block.owner or "the root"


def _print_rejections(analysis: BlockAnalysis) -> None:
    print_line(f"\n{plural(len(analysis.rejections), 'merge')} refused")
    for rejection in analysis.rejections:
        print_line(f"{rejection.name}  {rejection.reason}  {shape_text(rejection.shape)}")
        print_detail(rejection.detail)
