"""From the options that say how to prune to the tickets: shared by ``prune`` and ``bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.cli.batches import scoring_batch
from blockprune.criteria import CRITERIA
from blockprune.errors import close_names
from blockprune.plan import PruningPlan, make_plan
from blockprune.scoring import ScoreTable, score_blocks
from blockprune.surgery import cut_blocks
from blockprune.tracing import tensors_in

__all__ = ["Recipe", "Workbench"]


@dataclass(frozen=True)
class Recipe:
    """How to choose the blocks that go; everything but their number."""

    criterion: str
    granularity: str
    data: str
    data_root: Path
    protect: tuple[str, ...]
    min_blocks_per_stage: int
    seed: int
    preserve_root: bool
    leaf_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise typer.BadParameter(
                f"there is no criterion {self.criterion!r}."
                f"{close_names(self.criterion, CRITERIA)} Known: {', '.join(CRITERIA)}."
            )


class Workbench:
    """A dense model, analysed and scored once, from which tickets of several sizes are cut.

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
        budgets: Sequence[int | float],
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
        for budget in budgets:
            self._plan(None, budget)
        scores = score_blocks(
            model,
            recipe.criterion,
            scoring_batch(
                recipe.data, tuple(tensors_in(inputs)), root=recipe.data_root, seed=recipe.seed
            ),
            example_inputs=inputs,
            seed=recipe.seed,
            analysis=self.analysis,
        )
        self.plans = tuple(self._plan(scores, budget) for budget in budgets)

    def cut(self, plan: PruningPlan) -> nn.Module:
        """Cut the ticket of a plan; it is verified against the dense model."""
        return cut_blocks(self.model, self.analysis, plan, preserve_root=self.recipe.preserve_root)

    def _plan(self, scores: ScoreTable | None, budget: int | float) -> PruningPlan:
        return make_plan(
            self.analysis,
            scores,
            budget,
            protect=self.recipe.protect,
            min_blocks_per_stage=self.recipe.min_blocks_per_stage,
        )
