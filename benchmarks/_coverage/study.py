"""One model from its analysis to its checked tickets, as the fields of a row of the report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockprune import find_blocks, remove_blocks
from blockprune.blocks import BlockAnalysis, ResidualBlock
from blockprune.errors import BlockpruneError

from .counting import count_adds
from .misses import misses, normalised
from .oracle import Cut, Oracle, Verdict

__all__ = ["Row", "study", "verdict_of"]

Row = dict[str, Any]
MODES = ("eval", "train")
# Ten digits: what is wrong is off by more, and rounding by less.
DOUBLE_ULPS = 2**20


def study(model: nn.Module, inputs: Any, *, verify: bool, thorough: bool = False) -> Iterator[Row]:
    """Analyse a model and, if asked, check tickets of it; yield the row as it fills up.

    A thorough study has tickets without one, several and all branches, in place of one ticket
    without three of them, and says which residual adds no block was made of.
    """
    seconds: dict[str, float] = {}
    row: Row = {
        "input": _shapes(inputs),
        "parameters": _count(model),
        "seconds": seconds,
    }
    with _timed(seconds, "branches"):
        analysis = find_blocks(model, inputs)
    row |= _analysis_fields(analysis)
    yield row
    with _timed(seconds, "adds"):
        adds = count_adds(model, inputs)
    row |= {"activations": adds.activations, "residual": adds.residual}
    if thorough:
        row["missed"] = [dataclasses.asdict(miss) for miss in misses(analysis, adds.owners)]
    yield _with_peak(row)
    if not verify or not analysis.blocks:
        return
    with _timed(seconds, "layers"):
        layers = find_blocks(model, inputs, granularity="layer")
    row["tickets"] = tickets = []
    cuts = _thorough_cuts(analysis.blocks) if thorough else [_spread_cut(analysis.blocks)]
    if whole := _whole_layers(layers):
        cuts.append(Cut(layers=tuple(_spread(whole, 2))))
    made = []
    for cut in cuts:
        with _timed(seconds, "remove"):
            ticket, refusal = _remove(model, cut, inputs)
        made.append((cut, ticket))
        tickets.append(
            {
                "removed": [block.name for block in (*cut.branches, *cut.layers)],
                "as": "branches" if cut.branches else "layers",
                "parameters": _count(ticket),
                "refusal": refusal,
            }
        )
        yield _with_peak(row)
    sought = tuple(dict.fromkeys(block for cut in cuts for block in cut.branches))
    for mode in MODES:
        with _timed(seconds, mode):
            oracle = Oracle(model, inputs, analysis, sought, train=mode == "train")
            if oracle.refusal:
                row[f"{mode}_refusal"] = oracle.refusal
                continue
            for (cut, ticket), entry in zip(made, tickets, strict=True):
                verdict = oracle.verdict(ticket, cut)
                if verdict.problems:
                    verdict = _in_double_precision(oracle, analysis, ticket, cut, verdict)
                entry[mode] = dataclasses.asdict(verdict)
        yield _with_peak(row)
    yield _with_peak(row)


def verdict_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the verdict on a row, and in words what led to it."""
    if "error" in row:
        return "failed", str(row["error"])
    if not row["branches"]:
        return "no blocks", _why_none(row)
    if "tickets" not in row:
        return "analysed", ""
    refusals = [ticket["refusal"] for ticket in row["tickets"] if ticket["refusal"]]
    problems = [
        f"{ticket['as']} in {mode} mode: {problem}"
        for ticket in row["tickets"]
        for mode in MODES
        for problem in ticket.get(mode, {}).get("problems", ())
    ]
    if refusals:
        opinion = f"{len(problems)} problems: {problems[0]}" if problems else "no problem"
        return "failed", f"{refusals[0]}; the oracle finds {opinion}"
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return "failed", problems[0] + more
    if "eval_refusal" in row:
        return "failed", f"the oracle cannot run the dense model: {row['eval_refusal']}"
    limits = [
        f"{mode} mode: {limit}"
        for mode in MODES
        for limit in dict.fromkeys(
            limit for ticket in row["tickets"] for limit in ticket.get(mode, {}).get("limits", ())
        )
    ]
    if "train_refusal" in row:
        limits.append(f"the dense model does not train: {row['train_refusal']}")
        return "verified in eval", "; ".join(limits)
    return "verified", "; ".join(limits)


def _analysis_fields(analysis: BlockAnalysis) -> Row:
    traced = analysis.traced
    if all(region.path for region in traced.regions):
        extent = "regions"
    else:
        extent = "whole, with leaves" if traced.opaque or len(traced.regions) > 1 else "whole"
    return {
        "traced": extent,
        "regions": len(traced.regions),
        "leaves": len(traced.opaque),
        "leaf_reasons": dict(Counter(map(normalised, traced.opaque.values())).most_common()),
        "branches": len(analysis.blocks),
        "layers": len(analysis.cuts.layers),
        "refused": dict(Counter(str(r.reason) for r in analysis.rejections).most_common()),
    }


def _why_none(row: Mapping[str, Any]) -> str:
    if not row.get("activations", True):
        return "adds no two activations"
    refused = ", ".join(f"{count} {reason}" for reason, count in row["refused"].items())
    return f"refused: {refused or 'nothing'}"


def _spread_cut(blocks: Sequence[ResidualBlock]) -> Cut:
    return Cut(branches=tuple(_spread(blocks, 3)))


def _thorough_cuts(blocks: Sequence[ResidualBlock]) -> list[Cut]:
    """Return cuts of one branch, of several, of all, and of all that contain no other."""
    draws = random.Random(len(blocks))
    several = draws.sample(blocks, (len(blocks) + 1) // 2)
    innermost = [block for block in blocks if not block.contains]
    chosen = [[draws.choice(blocks)], _outermost(several), _outermost(blocks), innermost]
    return list(dict.fromkeys(Cut(branches=tuple(cut)) for cut in chosen))


def _outermost(blocks: Sequence[ResidualBlock]) -> list[ResidualBlock]:
    inner = {name for block in blocks for name in block.contains}
    return [block for block in blocks if block.name not in inner]


def _spread(blocks: Sequence[ResidualBlock], count: int) -> list[ResidualBlock]:
    """Return the first, the last and what lies between, none of them contained in another."""
    outer = _outermost(blocks)
    places = {round(i * (len(outer) - 1) / max(1, count - 1)) for i in range(count)}
    return [outer[place] for place in sorted(places)]


def _whole_layers(analysis: BlockAnalysis) -> list[ResidualBlock]:
    """Return the layers that can be passed through, those of several branches if there are any."""
    layers = [block for block in analysis.blocks if block.name in analysis.cuts.layers]
    return [block for block in layers if len(block.branches) > 1] or layers


def _remove(model: nn.Module, cut: Cut, inputs: Any) -> tuple[nn.Module, str | None]:
    """Return the ticket, and what the package's own verification has against it."""
    names = [block.name for block in (*cut.branches, *cut.layers)]
    granularity = "layer" if cut.layers else "branch"
    try:
        return remove_blocks(model, names, inputs, granularity=granularity), None
    except BlockpruneError as error:
        ticket = remove_blocks(model, names, inputs, granularity=granularity, verify=False)
        return ticket, f"{type(error).__name__}: {error}"


def _in_double_precision(
    oracle: Oracle, analysis: BlockAnalysis, ticket: nn.Module, cut: Cut, single: Verdict
) -> Verdict:
    """Compare again where rounding is small enough to tell it from an error.

    A removed branch can change the memory layout of what follows, and so the order in which a
    convolution adds; batch statistics then magnify the rounding.
    """
    model = copy.deepcopy(oracle.model).double()
    inputs = pytree.tree_map(_doubled, oracle.inputs)
    again = Oracle(model, inputs, analysis, cut.branches, train=oracle.train)
    if again.refusal:
        return single
    double = again.verdict(copy.deepcopy(ticket).double(), cut, ulps=DOUBLE_ULPS)
    if double.problems:
        return single
    rounding = f"equal in double precision, rounded differently in single: {single.problems[0]}"
    return Verdict(limits=(*double.limits, rounding))


def _doubled(value: Any) -> Any:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_floating else value


def _shapes(inputs: Any) -> str:
    """Say which tensors a model is given."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if hasattr(leaf, "shape")]
    return ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _with_peak(row: Row) -> Row:
    # Kilobytes on Linux.
    row["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return row


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - start, 2)
