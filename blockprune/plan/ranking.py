"""In which order blocks go: by score, or by score per cost."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from blockprune.errors import PlanError, StalePlanError, close_names
from blockprune.plan.goals import Remaining
from blockprune.plan.structure import Analysis, Block, Scores

__all__ = ["RANKINGS", "checked_scores", "per_cost", "ranked"]

RANKINGS: Final = ("score", "score_per_cost")


def ranked(
    blocks: Iterable[Block],
    scores: Mapping[str, float],
    by: str = "score",
    costs: Remaining | None = None,
    gone: frozenset[str] = frozenset(),
) -> list[Block]:
    """Return blocks in the order in which they are to go; ties in the order given.

    "score": the lowest first. "score_per_cost": with `s` the score of a block and `c` what going
    alone saves of the quantity, the lowest of `s / c` first where `s > 0`, of `s * c` where not.

    Why: to save an amount `C` at the least loss of importance is `min sum s` over sets with
    `sum c >= C`, a knapsack turned round. Let blocks go in parts, and the best choice is known:
    by rising `s / c`, until `C` is saved, since exchanging a part for one of equal cost and
    a higher ratio loses more. A block of negative score should go at any price. Among those `s / c`
    would put the one that saves most last; `s * c` is lower the more harmful a block is and the
    more it saves, and is negative, so that they all go before any other. What saves nothing has an
    infinite ratio, and goes last among equals.

    Args:
        blocks: in order of execution.
        scores: by name; a block without one counts as 0.
        by: "score" or "score_per_cost".
        costs: of the model, for "score_per_cost".
        gone: blocks that went already, for what going *next* saves.

    Raises:
        PlanError: another `by`, or no costs.
    """
    if by not in RANKINGS:
        raise PlanError(f"by is {' or '.join(map(repr, RANKINGS))}, not {by!r}.")
    if by == "score":
        return sorted(blocks, key=lambda block: scores.get(block.name, 0.0))
    if costs is None:
        raise PlanError(
            "by='score_per_cost' needs costs, which the plan alone does not know; "
            "blockprune.make_plan counts them."
        )
    before = costs(gone)

    def place(block: Block) -> tuple[float, bool]:
        score = scores.get(block.name, 0.0)
        cost = before - costs(gone | {block.name, *block.contains})
        return per_cost(score, cost), cost <= 0

    return sorted(blocks, key=place)


def per_cost(score: float, cost: float) -> float:
    """Return what "score_per_cost" sorts by.

    Example:
        >>> [per_cost(s, c) for s, c in [(6.0, 2), (6.0, 0), (0.0, 2), (-6.0, 2), (-6.0, 0)]]
        [3.0, inf, 0.0, -12.0, 0.0]
    """
    if score <= 0:
        # Not -0.0, which would be printed, though it sorts as 0.
        return score * max(cost, 0) + 0.0
    return score / cost if cost > 0 else math.inf


def checked_scores(
    analysis: Analysis, scores: Scores | Mapping[str, float] | None
) -> tuple[str | None, dict[str, float]]:
    """Return the criterion's name and the score of each block, in order of execution.

    Raises:
        PlanError: they are not one finite number for each block.
        StalePlanError: they are of another model.
    """
    names = [block.name for block in analysis.blocks]
    if scores is None:
        return None, {}
    if isinstance(scores, Mapping):
        return None, _finite(scores, names)
    if scores.fingerprint != analysis.fingerprint:
        raise StalePlanError(
            f"The scores are of a model with fingerprint {scores.fingerprint}, the analysis of "
            f"one with {analysis.fingerprint}. Score the model that the analysis is of."
        )
    if scores.granularity != analysis.granularity:
        raise PlanError(
            f"The scores are of granularity {scores.granularity!r}, the analysis is of "
            f"{analysis.granularity!r}. Use one granularity for both."
        )
    return scores.criterion, _finite(scores.scores, names)


def _finite(scores: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    for name in scores:
        if name not in names:
            raise PlanError(
                f"There is a score for {name!r}, which is no removable block."
                f"{close_names(str(name), names)}"
            )
    for name in names:
        if name not in scores:
            raise PlanError(f"Block {name!r} has no score.")
        score = scores[name]
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise PlanError(f"The score of block {name!r} is {score!r}, not a finite number.")
    return {name: float(scores[name]) for name in names}
