"""What a network of a run lacks, and the network without it.

Inputs of stages tell it in one of three forms: ``{"blocks": [names]}``, of which an empty list is
the dense network; ``{"filters": plan}``; ``{"mask": folder}``, of the stage that made the mask.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from blockprune.filters import FilterPlan, fitted_filters, remove_filters
from blockprune.lottery.state import TrainingState
from blockprune.lottery.work.bench import Bench, Setting
from blockprune.plan import named_plan
from blockprune.sparsity import Mask, held
from blockprune.surgery import cut_blocks

__all__ = ["MASK_FILE", "Cut", "CutNetwork", "cut_network", "mask_in"]

Cut = Mapping[str, Any]
"""What is lacking, as inputs tell it."""

MASK_FILE = "mask.safetensors"
"""Of the stage that makes a mask."""


@dataclass(frozen=True)
class CutNetwork:
    """A network without what a cut takes away.

    Attributes:
        model: of the smaller structure; with a mask, that of the dense network.
        removed: names of the blocks that are gone.
        plan: of the filters that are gone.
        mask: of the weights that are left.
    """

    model: nn.Module
    removed: tuple[str, ...] = ()
    plan: FilterPlan | None = None
    mask: Mask | None = None

    def fitted(self, state: TrainingState) -> TrainingState:
        """Return what a dense state leaves of itself; blocks go later, by their names."""
        return replace(
            state,
            weights=self._part(state.weights),
            # Masked weights do not move, whatever their velocity: see `held`.
            momentum=state.momentum if self.plan is None else self._part(state.momentum),
            ema=None if state.ema is None else self._part(state.ema),
        )

    def holding(self) -> AbstractContextManager[object]:
        """Return a context in which training leaves masked weights at zero."""
        return nullcontext() if self.mask is None else held(self.model, self.mask)

    def _part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.plan is not None:
            return fitted_filters(tensors, self.plan)
        return dict(tensors) if self.mask is None else self.mask.apply(tensors)


def cut_network(bench: Bench, seed: int, cut: Cut) -> CutNetwork:
    """Return the network of a seed, with its first weights, without what a cut names.

    Nothing is verified: the stage that chose the cut has done so.
    """
    model = bench.setting.build(seed)
    if "mask" in cut:
        mask = mask_in(bench, cut["mask"])
        model.load_state_dict(mask.apply(model.state_dict()))
        return CutNetwork(model, mask=mask)
    if "filters" in cut:
        plan = FilterPlan.from_json(json.dumps(cut["filters"]))
        smaller = remove_filters(model, plan, bench.setting.image, verify=False)
        return CutNetwork(smaller, plan=plan)
    removed = tuple(cut["blocks"])
    return CutNetwork(_without(bench.setting, model, removed), removed=removed)


def mask_in(bench: Bench, folder: str) -> Mask:
    """Return the mask that a stage left."""
    return Mask.load(bench.store.folder / folder / MASK_FILE)


def _without(setting: Setting, model: nn.Module, removed: tuple[str, ...]) -> nn.Module:
    if not removed:
        return model
    analysis = setting.analyse(model)
    return cut_blocks(model, analysis, named_plan(analysis, removed), verify=False)
