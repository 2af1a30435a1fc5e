"""From the options that say how to prune to the tickets: shared by ``prune`` and ``bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from blockprune.api import Planner
from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.cli.batches import scoring_batch
from blockprune.criteria import Criterion
from blockprune.plan import Budget, PruningPlan
from blockprune.surgery import cut_blocks
from blockprune.tracing import tensors_in

__all__ = ["Recipe", "Workbench"]


@dataclass(frozen=True)
class Recipe:
    """How to choose the blocks that go; everything but their number."""

    criterion: str | Criterion
    granularity: str
    data: str
    data_root: Path
    protect: tuple[str, ...]
    min_blocks_per_stage: int
    by: str
    schedule: str
    beam_width: int | None
    max_cache_bytes: int | None
    seed: int
    preserve_root: bool
    leaf_modules: tuple[str, ...]


class Workbench:
    """A dense model, analysed and scored, from which tickets of several sizes are cut.

    Args:
        model: the dense model.
        inputs: that it is analysed with.
        recipe: how blocks are chosen.
        budgets: of the tickets to come; one that cannot be met is refused before the scoring.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        recipe: Recipe,
        budgets: Sequence[int | float | Budget],
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.analysis: BlockAnalysis = find_blocks(
            model,
            inputs,
            recipe.granularity,
            preserve_root=recipe.preserve_root,
            leaf_modules=recipe.leaf_modules,
        )
        planner = Planner(
            model,
            self.analysis,
            recipe.criterion,
            scoring_batch(
                recipe.data, tuple(tensors_in(inputs)), root=recipe.data_root, seed=recipe.seed
            ),
            seed=recipe.seed,
            by=recipe.by,
            schedule=recipe.schedule,
            protect=recipe.protect,
            min_blocks_per_stage=recipe.min_blocks_per_stage,
            max_cache_bytes=recipe.max_cache_bytes,
            beam_width=recipe.beam_width,
        )
        for budget in budgets:
            planner.check(budget)
        self.plans = tuple(planner.plan(budget) for budget in budgets)

    def cut(self, plan: PruningPlan) -> nn.Module:
        """Cut the ticket of a plan; it is verified against the dense model."""
        return cut_blocks(self.model, self.analysis, plan)
