"""Stages that train: the dense network, and everything that is cut from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockprune.lottery.recipe import Recipe
from blockprune.lottery.state import TrainingState
from blockprune.lottery.steps import Step
from blockprune.lottery.weights import start_of
from blockprune.lottery.work.bench import Bench, Made
from blockprune.lottery.work.cuts import cut_network, mask_in
from blockprune.sparsity import common, partial_reinit

__all__ = ["dense", "ticket"]


def dense(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Train a whole network, and keep its states of some moments."""
    model = bench.setting.build(inputs["seed"])
    return bench.train(
        model,
        inputs,
        folder,
        recipe=Recipe.model_validate(inputs["recipe"]),
        start=_state(bench, inputs["from"]),
        keep=[Step.model_validate(step) for step in inputs["keep"]],
        with_optimizer=inputs["carry_optimizer"],
    )


def ticket(bench: Bench, inputs: Mapping[str, Any], folder: Path) -> Made:
    """Train what a cut leaves, from where a policy says."""
    network = cut_network(bench, inputs["seed"], inputs["cut"])
    policy, state = inputs["weights"], network.fitted(_state(bench, inputs["from"]))
    how: dict[str, Any]
    if policy == "rewind":
        how = {"dense_state_at": lambda _: state}
    else:
        how = {"fresh" if policy == "reinit" else "dense_final": state}
    if inputs["rewound_to"] is not None:
        how["rewound_to"] = Step.model_validate(inputs["rewound_to"])
    if policy == "finetune":
        how["finetune_epochs"] = inputs["finetune"]["epochs"]
        how["finetune_lr"] = inputs["finetune"]["lr"]
    start = start_of(
        policy,
        network.model,
        recipe=Recipe.model_validate(inputs["recipe"]),
        carry_optimizer=inputs["carry_optimizer"] and policy != "reinit",
        **how,
    )
    with network.holding():
        return bench.train(
            network.model,
            inputs,
            folder,
            recipe=start.recipe,
            start=start.state,
            # The next level may go on from here.
            with_optimizer=inputs["carry_optimizer"],
        )


def _state(bench: Bench, source: Mapping[str, Any]) -> TrainingState:
    """Return the state that inputs name; new weights may keep the first ones of some places."""
    if "masks" not in source:
        return bench.state(source)
    fresh, first = (
        TrainingState.of(bench.setting.build(seed)) for seed in (source["fresh"], source["first"])
    )
    overlap = common(*(mask_in(bench, folder) for folder in source["masks"]))
    return TrainingState(Step(), partial_reinit(fresh.weights, first.weights, overlap))
