"""Plans: which blocks go. A value, read and written as JSON, without torch.

A plan follows from an analysis, the scores and a budget alone; it looks at no weight and
changes no model. The lowest score goes first, ties by order of execution, until the budget is
spent. Three rules can stop a block from going:

* a pattern of `protect` names it, or a block nested in it;
* its stage would keep fewer than `min_blocks_per_stage` residual blocks, those that cannot be
  removed (projection shortcuts) counted in;
* it contains others, and with those of them that are still there it would overshoot the budget.
  It is passed over, and looked at again when smaller ones have gone.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from blockprune.errors import InfeasibleBudgetError, PlanError, StalePlanError, close_names
from blockprune.granularity import Granularity

__all__ = ["PLAN_VERSION", "PruningPlan", "make_plan"]

PLAN_VERSION: Final = 1

# A share such as 0.29 of 100 blocks is 28.999... in binary, and means 29.
ROUNDING = 1e-9

Name = Annotated[str, Field(min_length=1)]
Score = Annotated[float, Field(allow_inf_nan=False)]


class Block(Protocol):
    """What a plan reads of a `blockprune.blocks.ResidualBlock`."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> int: ...
    @property
    def contains(self) -> tuple[str, ...]: ...


class Stage(Protocol):
    """What a plan reads of a `blockprune.blocks.Stage`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def fixed(self) -> int: ...


class Analysis(Protocol):
    """What a plan reads of a `blockprune.blocks.BlockAnalysis`."""

    @property
    def blocks(self) -> Sequence[Block]: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def fingerprint(self) -> str: ...


class Scores(Protocol):
    """What a plan reads of a `blockprune.scoring.ScoreTable`."""

    @property
    def criterion(self) -> str: ...
    @property
    def granularity(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def fingerprint(self) -> str: ...


class PruningPlan(BaseModel):
    """Which blocks of one model go, and why.

    Attributes:
        remove: names of the blocks, in order of execution, nested ones included.
        granularity: that the names are of, "branch", "layer" or "layer_approx".
        criterion: that ranked them, None where nothing did.
        scores: of all blocks, empty where nothing ranked them.
        p: what was asked for, a count (int) or a share (float); None where names were given.
        fingerprint: of the analysis, which identifies the structure that the plan is for.
        version: of this format.

    Example:
        >>> plan = PruningPlan(remove=("layer1.1",), granularity="branch", fingerprint="3f2a")
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    remove: tuple[Name, ...]
    granularity: Granularity
    criterion: str | None = None
    scores: dict[Name, Score] = Field(default_factory=dict)
    p: StrictInt | StrictFloat | None = None
    fingerprint: Name
    version: Literal[1] = PLAN_VERSION

    @field_validator("remove")
    @classmethod
    def _each_once(cls, remove: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, times in Counter(remove).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is removed twice")
        return remove

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.p is not None:
            _budget(self.p)
        unranked = [name for name in self.remove if name not in self.scores]
        if self.scores and unranked:
            raise ValueError(f"{unranked[0]!r} is removed, and has no score")
        return self

    def to_json(self) -> str:
        """Return the plan as a JSON object; equal plans give equal text."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            PlanError: the text is no JSON, has a field too many or too few, or one of a wrong
                type; every such field is named.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'plan'}: {problem['msg']}"
                + (f", found {problem['input']!r}" if problem["loc"] == ("version",) else "")
                for problem in error.errors(include_url=False)
            )
            raise PlanError(
                f"This is not a pruning plan of version {PLAN_VERSION}: {found}. "
                "Plans are written by PruningPlan.to_json()."
            ) from error


def make_plan(
    analysis: Analysis,
    scores: Scores | Mapping[str, float] | None = None,
    p: int | float = 1,
    *,
    protect: str | Iterable[str] = (),
    min_blocks_per_stage: int = 0,
) -> PruningPlan:
    """Choose the blocks that go, lowest score first.

    Args:
        analysis: of the model.
        scores: a `ScoreTable`, or a mapping from block name to number; None: all equal, so
            that blocks go in order of execution.
        p: an int is a count of blocks, 0 for none; a float is a share in [0, 1] of the removable
            blocks, rounded down. A block that contains others counts with them.
        protect: `fnmatch` patterns of names that stay, such as "layer1.*".
        min_blocks_per_stage: residual blocks that stay in each stage at the least.

    Returns:
        A plan that removes exactly `p` blocks.

    Raises:
        PlanError: a budget, a pattern or scores that make no sense.
        InfeasibleBudgetError: fewer blocks can go than asked for; says how many can.
        StalePlanError: the scores are of another model.

    Example:
        >>> import torch
        >>> from blockprune.blocks import find_blocks
        >>> from blockprune.models import resnet20
        >>> analysis = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> make_plan(analysis, p=2, protect="layer1.0").remove
        ('layer1.1', 'layer1.2')
    """
    names = [block.name for block in analysis.blocks]
    p = _budget(p)
    _check_minimum(min_blocks_per_stage)
    criterion, values = _ranking(analysis, scores, names)
    count = p if isinstance(p, int) else math.floor(p * len(names) + ROUNDING)
    ranked = sorted(analysis.blocks, key=lambda block: values.get(block.name, 0.0))
    choice = _Choice(analysis, _protected(protect, names), min_blocks_per_stage)
    choice.spend(ranked, count)
    if len(choice.gone) < count:
        raise _infeasible(analysis, choice, ranked, p, count)
    return PruningPlan(
        remove=tuple(name for name in names if name in choice.gone),
        granularity=analysis.granularity,
        criterion=criterion,
        scores=values,
        p=p,
        fingerprint=analysis.fingerprint,
    )


class _Choice:
    """The blocks chosen so far, and the rules that a further one must keep to."""

    def __init__(self, analysis: Analysis, protected: frozenset[str], minimum: int) -> None:
        self.protected = protected
        self.minimum = minimum
        self.stage_of = {block.name: block.stage for block in analysis.blocks}
        self.left = Counter({i: stage.fixed for i, stage in enumerate(analysis.stages)})
        self.left.update(self.stage_of.values())
        self.gone: set[str] = set()

    def spend(self, ranked: Sequence[Block], count: int) -> None:
        """Take blocks, lowest first, until `count` are gone or no more can go."""
        before = -1
        while before < len(self.gone) < count:
            before = len(self.gone)
            for block in ranked:
                group = {block.name, *block.contains} - self.gone
                if block.name in group and len(self.gone) + len(group) <= count:
                    self._take(group)

    def _take(self, group: set[str]) -> None:
        losses = Counter(self.stage_of[name] for name in group)
        kept = all(self.left[stage] - lost >= self.minimum for stage, lost in losses.items())
        if kept and not group & self.protected:
            self.gone |= group
            self.left.subtract(losses)


def _infeasible(
    analysis: Analysis, choice: _Choice, ranked: Sequence[Block], p: int | float, count: int
) -> InfeasibleBudgetError:
    total = len(analysis.blocks)
    asked = f"p={p} asks for {count} of {total} removable {analysis.granularity} blocks"
    if total == 0:
        return InfeasibleBudgetError(
            f"p={p} asks for {count} blocks, and the model has no removable residual block. "
            "Its analysis lists every merge that was refused, and why, under rejections."
        )
    limits = []
    if choice.protected:
        limits.append(f"{len(choice.protected)} protected")
    if choice.minimum:
        limits.append(f"min_blocks_per_stage={choice.minimum}")
    under = f" with {' and '.join(limits)}" if limits else ""
    unlimited = _Choice(analysis, choice.protected, choice.minimum)
    unlimited.spend(ranked, total)
    reachable = max(len(unlimited.gone), len(choice.gone))
    return InfeasibleBudgetError(f"{asked}; at most {reachable} can go{under}.")


def _budget(p: object) -> int | float:
    """Return a count or a share, numpy's kinds made plain.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(p, numbers.Integral) and not isinstance(p, bool):
        p = int(p)
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise PlanError(
            f"p is a count of blocks (int) or a share of them (float in [0, 1]), not {p!r}."
        )
    if math.isnan(p):
        raise PlanError("p is NaN; it is a count of blocks (int) or a share (float in [0, 1]).")
    if p < 0:
        raise PlanError(f"p={p} is negative; the least that can go is 0 blocks.")
    if isinstance(p, float) and p > 1:
        hint = f" For {int(p)} blocks, pass the int p={int(p)}." if p.is_integer() else ""
        raise PlanError(f"p={p} is a float, so a share of the blocks, and above 1.{hint}")
    return p if isinstance(p, int) else float(p)


def _check_minimum(minimum: object) -> None:
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise PlanError(f"min_blocks_per_stage is a count of blocks, 0 or more, not {minimum!r}.")


def _protected(protect: str | Iterable[str], names: Sequence[str]) -> frozenset[str]:
    patterns = [protect] if isinstance(protect, str) else list(protect)
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PlanError(f"protect takes patterns of block names, not {pattern!r}.")
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise PlanError(
                f"protect={pattern!r} matches no removable block.{close_names(pattern, names)} "
                f"There are: {', '.join(names) or 'none'}."
            )
        found |= matches
    return frozenset(found)


def _ranking(
    analysis: Analysis, scores: Scores | Mapping[str, float] | None, names: Sequence[str]
) -> tuple[str | None, dict[str, float]]:
    """Return the criterion's name and the score of each block, in order of execution."""
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
