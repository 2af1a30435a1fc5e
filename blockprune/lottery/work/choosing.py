"""Stages that decide what goes: scores and plans of blocks, filters, masks of weights."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockprune.api import Planner
from blockprune.costs import RemainingCosts, filter_count, macs_per_weight
from blockprune.criteria import Criterion, criterion_of
from blockprune.errors import CriterionError, SpecError, close_names
from blockprune.filters import (
    FILTER_CRITERIA,
    filter_layers,
    filter_scores,
    make_filter_plan,
    remove_filters,
)
from blockprune.imports import NotFound, imported
from blockprune.lottery.early_bird import has_settled
from blockprune.lottery.spec import Spec
from blockprune.lottery.work.bench import Bench, Made, device
from blockprune.lottery.work.cuts import MASK_FILE, cut_network, mask_in
from blockprune.plan import Selection, make_plan
from blockprune.scoring import score_blocks
from blockprune.sparsity import (
    IMPORTANCES,
    Mask,
    importance_of,
    prune_lowest,
    random_like,
    weights_to_prune,
)
from blockprune.surgery import cut_blocks

__all__ = [
    "check_criteria",
    "criterion_named",
    "early_bird",
    "filters",
    "iterative",
    "mask",
    "plan",
    "score",
]


def score(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Score all blocks."""
    del folder
    planner = _planner(bench, inputs)
    table = score_blocks(
        planner.model,
        planner.criterion,
        planner.data,
        example_inputs=planner.analysis.traced.call,
        seed=planner.seed,
        analysis=planner.analysis,
    )
    return {"criterion": inputs["criterion"], "scores": dict(table.scores)}, {}


def plan(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose the lowest scores, and prove the cut."""
    del folder
    model = bench.setting.build(inputs["seed"])
    analysis = bench.setting.analyse(model)
    plan = make_plan(
        analysis,
        inputs["scores"],
        p=inputs["p"],
        protect=inputs["protect"],
        min_blocks_per_stage=inputs["min_blocks_per_stage"],
    )
    cut_blocks(model, analysis, plan)
    return {"removed": list(plan.remove)}, {}


def iterative(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose a block, score what is left, and so on, from one set or several; prove the cut."""
    del folder
    planner = _planner(bench, inputs)
    plan = planner.plan(inputs["p"])
    cut_blocks(planner.model, planner.analysis, plan)
    return {"removed": list(plan.remove), "scores": dict(plan.scores)}, {}


def early_bird(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Draw a mask after every epoch until masks have settled; prove the cut."""
    del folder
    candidates = len(_candidates(bench, inputs))
    masks: list[tuple[str, ...]] = []
    for step in inputs["steps"]:
        planner = _planner(bench, {**inputs, "source": {"dense": inputs["dense"], "step": step}})
        plan = planner.plan(inputs["p"])
        masks.append(plan.remove)
        settled = has_settled(
            masks, candidates, window=inputs["window"], distance=inputs["distance"]
        )
        if settled:
            cut_blocks(planner.model, planner.analysis, plan)
            return {"masks": masks, "removed": list(plan.remove), "step": step}, {}
    return {"masks": masks, "removed": None, "step": None}, {}


def mask(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose the weights that stay, and leave their mask."""
    chosen = _random_mask(bench, inputs) if "like" in inputs else _important(bench, inputs)
    chosen.save(folder / MASK_FILE)
    layers = {name: [layer.kept, layer.total] for name, layer in chosen.layers.items()}
    return {"layers": layers, "collapsed": list(chosen.collapsed)}, {}


def filters(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Choose the filters that go, as many as the ticket of blocks lacks, and prove the cut."""
    del folder
    setting, seed = bench.setting, inputs["seed"]
    model = setting.build(seed)
    layers = filter_layers(model, setting.image)
    scores = filter_scores(
        _weighted(bench, model, inputs["source"]),
        inputs["criterion"],
        bench.batch(inputs),
        example_inputs=setting.image.to(device()),
        seed=seed,
    )
    by = "count" if inputs["by"] == "filters" else inputs["by"]
    goal = {by: _lacking(bench, inputs)}
    plan = make_filter_plan(layers, scores, seed=seed, **goal)
    remove_filters(setting.build(seed), plan, setting.image)
    return {"filters": json.loads(plan.to_json())}, {}


def _important(bench: Bench, inputs: Mapping[str, Any]) -> Mask:
    """Prune the weights of the lowest importance, in the trained network that inputs name."""
    setting, seed = bench.setting, inputs["seed"]
    model = setting.build(seed)
    before = Mask.full(model)
    if inputs["parent"] is not None:
        before = mask_in(bench, inputs["parent"])
    scores = importance_of(
        inputs["criterion"],
        _weighted(bench, model, inputs["source"]),
        before,
        data=bench.batch(inputs),
        seed=seed,
    )
    if "blocks" in inputs:
        return _matched(bench, inputs, scores, before)
    after = before
    for _ in range(inputs["rounds"]):
        count = weights_to_prune(after, inputs["share"])
        after = prune_lowest(scores, after, count, scope=inputs["scope"])
    return after


def _matched(
    bench: Bench, inputs: Mapping[str, Any], scores: Mapping[str, Tensor], before: Mask
) -> Mask:
    """Prune the fewest weights that leave no more than the ticket of blocks has."""
    lacking = _lacking(bench, inputs)
    if inputs["by"] == "params":
        return prune_lowest(scores, before, lacking)
    uses = macs_per_weight(bench.setting.build(inputs["seed"]), bench.setting.image)

    def macs(kept: Mask) -> int:
        return sum(layer.kept * uses[name] for name, layer in kept.layers.items())

    most = macs(before) - lacking
    # Masks of more pruned weights lie inside those of fewer, so the cost falls with the count.
    fewest = bisect_left(
        range(before.kept),
        True,
        key=lambda count: macs(prune_lowest(scores, before, count)) <= most,
    )
    return prune_lowest(scores, before, fewest)


def _lacking(bench: Bench, inputs: Mapping[str, Any]) -> int:
    """Return what the ticket of blocks has less of than the dense network."""
    model = bench.setting.build(inputs["seed"])
    if inputs["by"] == "filters":
        ticket = cut_network(bench, inputs["seed"], {"blocks": inputs["blocks"]}).model
        return filter_count(model) - filter_count(ticket)
    remaining = RemainingCosts(bench.setting.analyse(model))
    dense, left = remaining.without(()), remaining.without(inputs["blocks"])
    lacking: int = getattr(dense, inputs["by"]) - getattr(left, inputs["by"])
    return lacking


def _random_mask(bench: Bench, inputs: Mapping[str, Any]) -> Mask:
    return random_like(mask_in(bench, inputs["like"]), inputs["seed"])


def _weighted(bench: Bench, model: nn.Module, source: Mapping[str, Any]) -> nn.Module:
    """Give a model the weights that training moved to where a source says."""
    if "dense" in source:
        bench.state(source).load_into(model, averaged=False)
    return model.to(device())


def _planner(bench: Bench, inputs: Mapping[str, Any]) -> Planner:
    """Return what ranks the blocks of the network that inputs name, with weights and batch."""
    setting, seed = bench.setting, inputs["seed"]
    # What training moves is scored, as it is what a rewind goes back to.
    model = _weighted(bench, setting.build(seed), inputs["source"])
    return Planner(
        model,
        setting.analyse(model),
        criterion_named(inputs["criterion"]),
        bench.batch(inputs),
        seed=seed,
        schedule=inputs.get("schedule", "one-shot"),
        protect=tuple(inputs.get("protect", ())),
        min_blocks_per_stage=inputs.get("min_blocks_per_stage", 0),
        beam_width=inputs.get("beam_width"),
    )


def check_criteria(spec: Spec) -> None:
    """Refuse names that rank nothing of what a spec removes.

    Raises:
        CriterionError: there is no such criterion.
        SpecError: there is, and not for this structure.
    """
    for criterion in spec.criteria:
        criterion_named(criterion)
    if spec.early_bird is not None:
        criterion_named(spec.early_bird.criterion)
    of_levels = () if spec.levels is None else spec.levels.importances
    of_weights = spec.criteria if "weights" in spec.structures else ()
    of_filters = spec.criteria if "filters" in spec.structures else ()
    asked = {
        "weights": ((*of_weights, *of_levels), IMPORTANCES),
        "filters": (of_filters, FILTER_CRITERIA),
    }
    for structure, (names, known) in asked.items():
        for name in names:
            if name not in known or name == "random":
                ranks = ", ".join(sorted(set(known) - {"random"}))
                raise SpecError(
                    f"{name!r} ranks no {structure}.{close_names(name, known)} There are {ranks}; "
                    "random ones are a control."
                )


def criterion_named(name: str) -> str | Criterion:
    """Return the criterion of that name, or the callable that package.module:function is.

    Raises:
        CriterionError: there is none.
    """
    module, separator, attribute = name.partition(":")
    if not separator:
        return criterion_of(name)[0]
    try:
        found = imported(module, attribute)
    except NotFound as error:
        raise CriterionError(f"The criterion {name!r}: {error}") from error
    return criterion_of(found)[1]


def _candidates(bench: Bench, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the blocks that may go."""
    analysis = bench.setting.analyse(bench.setting.build(inputs["seed"]))
    selection = Selection(analysis, inputs["protect"], inputs["min_blocks_per_stage"])
    return tuple(b.name for b in analysis.blocks if selection.may_go(b, len(analysis.blocks)))
