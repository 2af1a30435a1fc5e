"""From a model to a plan: budgets that are worked out, and scoring once or after each removal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from torch import nn

from blockprune import plan as plans
from blockprune.api.rounds import Rounds
from blockprune.api.search import Search
from blockprune.batches import Replay
from blockprune.blocks import BlockAnalysis
from blockprune.costs import Quantity, RemainingCosts
from blockprune.criteria import Criterion
from blockprune.criteria.base import LossFunction
from blockprune.errors import PlanError
from blockprune.plan import (
    Budget,
    CostGoal,
    CountGoal,
    Goal,
    PruningPlan,
    Remaining,
    Selection,
)
from blockprune.profiling import LatencyGoal
from blockprune.scoring import ScoreTable, score_blocks

__all__ = ["SCHEDULES", "Planner", "make_plan"]

SCHEDULES: Final = ("one-shot", "iterative", "beam")
BEAM_WIDTH: Final = 3

QUANTITIES: Final[dict[str, Quantity]] = {"keep_macs": "macs", "keep_params": "params"}


def make_plan(
    analysis: BlockAnalysis,
    scores: ScoreTable | Mapping[str, float] | None = None,
    p: int | float | None = None,
    *,
    keep_macs: int | float | None = None,
    keep_params: int | float | None = None,
    max_latency_ms: float | None = None,
    by: str = "score",
    protect: str | Iterable[str] = (),
    min_blocks_per_stage: int = 0,
) -> PruningPlan:
    """Choose the blocks that go, lowest score first, until one budget is met.

    One of the four budgets is given. Costs are those of the model and the batch that were analysed,
    and of the *set* that goes: shared weights, nested blocks and what two branches both read are
    counted as in the ticket.

    Args:
        analysis: of the model.
        scores: a `ScoreTable`, or a mapping from block name to number; None: all equal, so
            that blocks go in order of execution.
        p: an int is a count of blocks, 0 for none; a float is a share in [0, 1] of the removable
            blocks, rounded down. A block that contains others counts with them.
        keep_macs: the multiply-accumulate operations that may be left: a float in (0, 1] is a share
            of the dense model's, an int a number.
        keep_params: the parameters (elements) that may be left, likewise.
        max_latency_ms: milliseconds that a forward pass of the analysed batch may take, in
            evaluation mode on the device of the model. Blocks are chosen by a measured table, then
            a ticket is timed beside the dense model, and more blocks go while it is too slow.
        by: "score", or "score_per_cost": the lowest of score / cost first, where the score is above
            0, after those of score * cost where it is not; the cost is what the block saves of the
            budget's own quantity, of MACs where the budget is `p`. It loses the least importance
            for what is saved; see `blockprune.plan.ranking.ranked`.
        protect: `fnmatch` patterns of names that stay, such as "layer1.*".
        min_blocks_per_stage: residual blocks that stay in each stage at the least. Where what is
            to stay by score would miss `keep_macs` or `keep_params`, the last blocks are chosen by
            what they save.

    Returns:
        A plan that removes exactly `p` blocks; or one that meets the budget, and that with one
        block less, the last, does not.

    Raises:
        PlanError: budgets, a pattern or scores that make no sense.
        InfeasibleBudgetError: the budget cannot be met; says what can be reached.
        StalePlanError: the scores are of another model.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> analysis = blockprune.find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> blockprune.make_plan(analysis, keep_macs=0.8).remove
        ('layer1.0', 'layer1.1')
    """
    asked = plans.budget_asked_for(
        p, keep_macs=keep_macs, keep_params=keep_params, max_latency_ms=max_latency_ms
    )
    goals = Goals(analysis)
    goal = goals.of(asked)
    return plans.make_plan(
        analysis,
        scores,
        goal=goal,
        by=by,
        costs=None if by == "score" else goals.costs(goal),
        protect=protect,
        min_blocks_per_stage=min_blocks_per_stage,
    )


@dataclass(frozen=True)
class Goals:
    """What budgets of one model ask for; its operations are counted once for all of them."""

    analysis: BlockAnalysis

    @cached_property
    def remaining(self) -> RemainingCosts:
        """Of the analysed model."""
        return RemainingCosts(self.analysis)

    def of(self, asked: int | float | Budget) -> Goal:
        """Return the goal of a number of blocks, or of a budget."""
        if not isinstance(asked, Budget):
            return CountGoal(asked, self.analysis)
        if asked.kind == "max_latency_ms":
            return LatencyGoal(self.analysis, asked)
        return CostGoal(asked, self.remaining.of(QUANTITIES[asked.kind]))

    def costs(self, goal: Goal) -> Remaining:
        """Return the quantity that a goal is about; of a number of blocks, their MACs."""
        if isinstance(goal, LatencyGoal):
            return goal.table
        return goal.remaining if isinstance(goal, CostGoal) else self.remaining.of("macs")


@dataclass(frozen=True)
class Planner:
    """How to choose the blocks of one model that go, whatever the budget.

    Attributes:
        model: the dense model.
        analysis: of it.
        criterion: a name, or a callable of the protocol.
        data, loss_fn, seed, max_batches, max_cache_bytes: see `score_blocks`.
        by, protect, min_blocks_per_stage: see `make_plan`.
        schedule: "one-shot": all blocks are scored once. "iterative": after each removal, those
            that are left are scored again. "beam": the same from the best sets of each step.
        beam_width: how many sets those are, for "beam"; None: 3.
    """

    model: nn.Module
    analysis: BlockAnalysis
    criterion: str | Criterion
    data: Any = None
    loss_fn: LossFunction | None = None
    seed: int = 0
    by: str = "score"
    schedule: str = "one-shot"
    protect: str | tuple[str, ...] = ()
    min_blocks_per_stage: int = 0
    max_batches: int | None = None
    max_cache_bytes: int | None = None
    beam_width: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise PlanError(
                f"schedule is {' or '.join(map(repr, SCHEDULES))}, not {self.schedule!r}."
            )
        width = self.beam_width
        if width is None:
            return
        if self.schedule != "beam":
            raise PlanError(
                f"beam_width={width!r} is for schedule='beam', and the schedule is "
                f"{self.schedule!r}. Leave it out, or search by a beam."
            )
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise PlanError(f"beam_width is a count of sets, 1 or more, not {width!r}.")

    def check(self, asked: int | float | Budget) -> None:
        """Refuse a budget that cannot be met before the scoring, which may take long.

        Whether a latency limit is out of reach is only known by timing tickets.

        Raises:
            PlanError, InfeasibleBudgetError: see `make_plan`.
        """
        goal = self._goals.of(asked)
        if isinstance(goal, LatencyGoal):
            goal = CountGoal(0, self.analysis)
        self._plan_once(None, goal)

    def plan(self, asked: int | float | Budget) -> PruningPlan:
        """Score, and choose blocks until a budget is met.

        Raises:
            PlanError, InfeasibleBudgetError: see `make_plan`.
            CriterionError, DataError, TraceError: see `score_blocks`.
        """
        goal = self._goals.of(asked)
        if self.schedule == "one-shot":
            return self._plan_once(self._dense_scores, goal)
        width = 1 if self.schedule == "iterative" else self.beam_width or BEAM_WIDTH
        rounds = Rounds(self.analysis, self.criterion, self._score)
        search = Search(self.analysis, rounds, goal, width, self.by, self._costs(goal))
        selection = Selection(self.analysis, self.protect, self.min_blocks_per_stage)
        found = search.best(selection, self._dense_scores)
        table = found.table
        if found.is_enough:
            chosen = found.selection
            return plans.as_plan(self.analysis, chosen, goal, table.criterion, table.scores)
        # Says what can be reached, unless another choice of what stays in a stage meets the goal.
        return self._plan_once(table, goal)

    @cached_property
    def _goals(self) -> Goals:
        return Goals(self.analysis)

    @cached_property
    def _data(self) -> Any:
        """The data; an iterator is read once, and what was read serves every round."""
        return Replay(self.data) if isinstance(self.data, Iterator) else self.data

    @cached_property
    def _dense_scores(self) -> ScoreTable:
        return self._score(self.model, self.analysis, self.criterion)

    def _score(
        self, model: nn.Module, analysis: BlockAnalysis, criterion: str | Criterion
    ) -> ScoreTable:
        return score_blocks(
            model,
            criterion,
            self._data,
            self.loss_fn,
            self.analysis.traced.call,
            seed=self.seed,
            analysis=analysis,
            max_batches=self.max_batches,
            max_cache_bytes=self.max_cache_bytes,
        )

    def _costs(self, goal: Goal) -> Remaining | None:
        return None if self.by == "score" else self._goals.costs(goal)

    def _plan_once(self, scores: ScoreTable | None, goal: Goal) -> PruningPlan:
        return plans.make_plan(
            self.analysis,
            scores,
            goal=goal,
            by=self.by,
            costs=self._costs(goal),
            protect=self.protect,
            min_blocks_per_stage=self.min_blocks_per_stage,
        )
