"""Plans: which blocks go. Values, read and written as JSON, without torch.

A plan follows from an analysis, the scores and a goal alone; it looks at no weight and changes no
model. The lowest score goes first, ties by order of execution, until the goal is met: a number of
blocks, or a bound on what is left of the model. Three rules can stop a block from going:

* a pattern of `protect` names it, or a block nested in it;
* its stage would keep fewer than `min_blocks_per_stage` residual blocks, those that cannot be
  removed (projection shortcuts) counted in;
* it contains others, and with those of them that are still there it would overshoot the number.
"""

from __future__ import annotations

from blockprune.plan.goals import CostGoal, CountGoal, Goal, Remaining
from blockprune.plan.making import as_plan, make_plan, named_plan
from blockprune.plan.ranking import RANKINGS, checked_scores, per_cost, ranked
from blockprune.plan.selection import Selection
from blockprune.plan.values import PLAN_VERSION, Budget, PruningPlan, budget_asked_for

__all__ = [
    "PLAN_VERSION",
    "RANKINGS",
    "Budget",
    "CostGoal",
    "CountGoal",
    "Goal",
    "PruningPlan",
    "Remaining",
    "Selection",
    "as_plan",
    "budget_asked_for",
    "checked_scores",
    "make_plan",
    "named_plan",
    "per_cost",
    "ranked",
]
