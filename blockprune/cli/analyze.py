"""``blockprune analyze``: the blocks of a model, and the merges that are none."""

from __future__ import annotations

from collections.abc import Sequence
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
    print_wrapped,
    shape_text,
    working,
)
from blockprune.cli.why import has_more_to_say, leaves_as_json, print_why, traced_as_json
from blockprune.costs import Costs, block_costs, model_costs
from blockprune.tracing import tensors_in

__all__ = ["run"]


def run(
    source: ModelSource,
    granularity: str,
    *,
    preserve_root: bool = False,
    leaf_modules: Sequence[str] = (),
    with_rejections: bool = False,
    with_reasons: bool = False,
    as_json: bool = False,
) -> None:
    """Analyse a model and print what was found.

    Args:
        source: the model and its inputs.
        granularity: ``branch``, ``layer`` or ``layer_approx``.
        preserve_root: look into the children of the root, one by one.
        leaf_modules: classes or patterns of modules not to look into.
        with_rejections: also print the merges refused (JSON always has them).
        with_reasons: also print the modules not looked into, and why (JSON always has them).
        as_json: print JSON in place of tables.
    """
    with working(f"Analysing {source.spec} ..."):
        model, inputs = source.load()
        analysis = find_blocks(
            model, inputs, granularity, preserve_root=preserve_root, leaf_modules=leaf_modules
        )
        total = model_costs(model, inputs)
        costs = block_costs(analysis)
    shapes = [list(tensor.shape) for tensor in tensors_in(inputs)]
    if as_json:
        print_json(_as_json(source.spec, shapes, analysis, total, costs))
        return
    _print_summary(source.spec, shapes, analysis, total)
    if analysis.blocks:
        _print_blocks(analysis, costs)
    _print_approximations(analysis)
    if with_reasons:
        print_why(analysis)
    elif has_more_to_say(analysis):
        print_line("\nSome modules were not looked into; --why says which, and why.")
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
                "exact": block.is_exact,
            }
            for block in analysis.blocks
        ],
        "rejections": [asdict(rejection) for rejection in analysis.rejections],
        "traced": traced_as_json(analysis),
        "leaves": leaves_as_json(analysis),
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
    columns = {
        "block": [block.name for block in analysis.blocks],
        "owner": [_relative_owner(block) for block in analysis.blocks],
        "params": [count(block.params) for block in analysis.blocks],
        "MACs": [count(costs[block.name].macs) for block in analysis.blocks],
        "shape": [shape_text(block.shape) for block in analysis.blocks],
    }
    if not all(block.is_exact for block in analysis.blocks):
        columns["exact"] = ["yes" if block.is_exact else "no" for block in analysis.blocks]
    print_line("")
    print_table(
        tuple(columns),
        list(zip(*columns.values(), strict=True)),
        numeric=("params", "MACs", "shape", "exact"),
    )


def _print_approximations(analysis: BlockAnalysis) -> None:
    """Say which layers go as an approximation, or that they are to be had."""
    if not all(block.is_exact for block in analysis.blocks):
        print_line("")
        print_wrapped(
            "Where exact is no, the normalisations on the stream go with the layer: the ticket is "
            "then not the dense model with branches multiplied by zero, but close to it at best."
        )
    elif analysis.granularity == "layer" and analysis.cuts.bypasses:
        print_line("")
        print_wrapped(
            f"{plural(len(analysis.cuts.bypasses), 'layer')} can go whole as an approximation "
            "only, with the normalisations; --granularity layer_approx takes them in."
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
