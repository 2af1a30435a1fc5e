"""`make_plan`: from an analysis, scores and a goal to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from blockprune.granularity import Granularity
from blockprune.plan.goals import CostGoal, CountGoal, Goal, Remaining
from blockprune.plan.ranking import checked_scores, ranked
from blockprune.plan.selection import Selection
from blockprune.plan.structure import Analysis, Block, Scores
from blockprune.plan.values import PruningPlan, checked_p

__all__ = ["as_plan", "make_plan", "named_plan"]


def make_plan(
    analysis: Analysis,
    scores: Scores | Mapping[str, float] | None = None,
    p: int | float | None = None,
    *,
    goal: Goal | None = None,
    by: str = "score",
    costs: Remaining | None = None,
    protect: str | Iterable[str] = (),
    min_blocks_per_stage: int = 0,
) -> PruningPlan:
    """Choose the blocks that go, lowest score first, without looking at the model.

    `blockprune.make_plan` is the same with goals and costs that it works out itself.

    Args:
        analysis: of the model.
        scores: a `ScoreTable`, or a mapping from block name to number; None: all equal, so
            that blocks go in order of execution.
        p: an int is a count of blocks, 0 for none; a float is a share in [0, 1] of the removable
            blocks, rounded down. A block that contains others counts with them.
        goal: in place of `p`.
        by: "score" or "score_per_cost", see `blockprune.plan.ranking.ranked`.
        costs: what "score_per_cost" divides by.
        protect: `fnmatch` patterns of names that stay, such as "layer1.*".
        min_blocks_per_stage: residual blocks that stay in each stage at the least.

    Returns:
        A plan that removes exactly `p` blocks; or as many as `goal` needs, and with one less, the
        last, it would not be met.

    Raises:
        PlanError: a budget, a pattern or scores that make no sense.
        InfeasibleBudgetError: the goal cannot be reached; says what can.
        StalePlanError: the scores are of another model.

    Example:
        >>> import torch
        >>> from blockprune.blocks import find_blocks
        >>> from blockprune.models import resnet20
        >>> analysis = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> make_plan(analysis, p=2, protect="layer1.0").remove
        ('layer1.1', 'layer1.2')
    """
    if goal is None:
        goal = CountGoal(checked_p(p), analysis)
    selection = Selection(analysis, protect, min_blocks_per_stage)
    criterion, values = checked_scores(analysis, scores)
    order = ranked(analysis.blocks, values, by, costs)
    taken = _take_until(goal, selection, order)
    if taken is not None:
        found = _with_the_dearest(goal, selection, order, taken)
        if found is None:
            raise goal.missed(selection, order)
        selection = found
    return as_plan(analysis, selection, goal, criterion, values)


def as_plan(
    analysis: Analysis,
    selection: Selection,
    goal: Goal,
    criterion: str | None,
    scores: Mapping[str, float],
) -> PruningPlan:
    """Return a selection that meets its goal as a plan."""
    return PruningPlan(
        remove=selection.in_order,
        granularity=analysis.granularity,
        criterion=criterion,
        scores=dict(scores),
        p=goal.p,
        budget=goal.budget,
        fingerprint=analysis.fingerprint,
        preserve_root=analysis.preserve_root,
        leaf_modules=analysis.leaf_modules,
    )


def named_plan(
    analysis: Analysis, names: Iterable[str], granularity: Granularity | None = None
) -> PruningPlan:
    """Return the plan that removes blocks by name, whatever they score.

    `granularity`: of the names; None: that of the analysis.
    """
    return PruningPlan(
        remove=tuple(names),
        granularity=granularity or analysis.granularity,
        fingerprint=analysis.fingerprint,
        preserve_root=analysis.preserve_root,
        leaf_modules=analysis.leaf_modules,
    )


def _take_until(goal: Goal, selection: Selection, order: Sequence[Block]) -> list[Block] | None:
    """Choose the first blocks that may go, until the goal is met.

    Returns:
        None; or, where all that may go do not meet it, what was taken.
    """
    taken: list[Block] = []
    if goal.is_met(selection.gone):
        return None
    for block in order:
        if selection.may_go(block, goal.room(selection.gone)):
            selection.take(block)
            taken.append(block)
            if goal.is_met(selection.gone):
                return None
    return None if goal.is_met(selection.gone, is_last=True) else taken


def _with_the_dearest(
    goal: Goal, stuck: Selection, order: Sequence[Block], taken: Sequence[Block]
) -> Selection | None:
    """Return a selection that meets a bound on costs where the lowest scores alone do not.

    Where blocks must stay in a stage, which of them stay decides what can be saved: after as
    many of the lowest scores as possible, those that save most go first.
    """
    if not isinstance(goal, CostGoal) or not stuck.depends_on_order:
        return None
    nothing = goal.remaining(frozenset())
    saved = {
        block.name: nothing - goal.remaining(frozenset((block.name, *block.contains)))
        for block in order
    }
    dearest = sorted(order, key=lambda block: -saved[block.name])
    for kept in range(len(taken) - 1, -1, -1):
        selection = stuck.restarted()
        for block in taken[:kept]:
            selection.take(block)
        if _take_until(goal, selection, dearest) is None:
            return selection
    return None
