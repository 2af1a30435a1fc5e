"""A plan, and what was asked for, as values that are read and written as JSON."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from typing import Annotated, Final, Literal, Self

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

from blockprune.errors import PlanError
from blockprune.granularity import Granularity

__all__ = ["PLAN_VERSION", "Budget", "PruningPlan", "budget_asked_for", "checked_p"]

PLAN_VERSION: Final = 1

Name = Annotated[str, Field(min_length=1)]
Score = Annotated[float, Field(allow_inf_nan=False)]
Kind = Literal["keep_macs", "keep_params", "max_latency_ms"]

UNITS: Final[dict[str, str]] = {
    "keep_macs": "MACs",
    "keep_params": "parameters",
    "max_latency_ms": "ms",
}


class Budget(BaseModel):
    """What may be left of a model, where a plan is not asked for a number of blocks.

    Attributes:
        kind: "keep_macs", "keep_params" or "max_latency_ms".
        value: of the first two, a share of the dense model in (0, 1] (float) or a number of MACs or
            parameters (int); of the last, milliseconds.

    Example:
        >>> str(Budget(kind="keep_macs", value=0.5))
        'keep_macs=0.5'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Kind
    value: StrictInt | StrictFloat

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        _checked_value(self.kind, self.value)
        return self

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    @property
    def unit(self) -> str:
        """Of what the budget bounds."""
        return UNITS[self.kind]


class PruningPlan(BaseModel):
    """Which blocks of one model go, and why.

    Attributes:
        remove: names of the blocks, in order of execution, nested ones included.
        granularity: that the names are of, "branch", "layer" or "layer_approx".
        criterion: that ranked them, None where nothing did.
        scores: of all blocks, empty where nothing ranked them.
        p: what was asked for, a count (int) or a share (float); None where it was a `budget`, or
            names were given.
        budget: what was asked for in place of `p`.
        fingerprint: of the analysis, which identifies the structure that the plan is for.
        preserve_root: whether the analysis was made to keep the root's class, which cutting by the
            plan then does.
        leaf_modules: what the analysis was told not to look into, classes by name.
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
    budget: Budget | None = None
    fingerprint: Name
    preserve_root: bool = False
    leaf_modules: tuple[Name, ...] = ()
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
            checked_p(self.p)
        if self.p is not None and self.budget is not None:
            raise ValueError(f"p={self.p} and {self.budget} are two budgets")
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


def budget_asked_for(
    p: object = None,
    *,
    keep_macs: object = None,
    keep_params: object = None,
    max_latency_ms: object = None,
) -> int | float | Budget:
    """Return the one budget that is given: `p`, a number of blocks, or a `Budget`.

    Raises:
        PlanError: there are two or none, or the value makes no sense.

    Example:
        >>> budget_asked_for(keep_params=0.25)
        Budget(kind='keep_params', value=0.25)
    """
    limits: dict[Kind, object] = {
        "keep_macs": keep_macs,
        "keep_params": keep_params,
        "max_latency_ms": max_latency_ms,
    }
    named = [("p", p), *limits.items()]
    given = {name: value for name, value in named if value is not None}
    if len(given) > 1:
        raise PlanError(
            f"{' and '.join(f'{name}={value!r}' for name, value in given.items())} are "
            f"{len(given)} budgets. Give one of p, {', '.join(limits)}."
        )
    for kind, value in limits.items():
        if value is not None:
            return Budget(kind=kind, value=_checked_value(kind, value))
    if p is None:
        raise PlanError(f"It is not said how much is to go. Give one of p, {', '.join(limits)}.")
    return checked_p(p)


def checked_p(p: object) -> int | float:
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
    if isinstance(p, float) and math.isnan(p):
        raise PlanError("p is NaN; it is a count of blocks (int) or a share (float in [0, 1]).")
    if p < 0:
        raise PlanError(f"p={p} is negative; the least that can go is 0 blocks.")
    if isinstance(p, float) and p > 1:
        hint = f" For {int(p)} blocks, pass the int p={int(p)}." if p.is_integer() else ""
        raise PlanError(f"p={p} is a float, so a share of the blocks, and above 1.{hint}")
    return p if isinstance(p, int) else float(p)


def _checked_value(kind: str, value: object) -> int | float:
    """Return the value of a budget as a plain number.

    Raises:
        PlanError: it is none that the budget can have.
    """
    takes = (
        "milliseconds, above 0"
        if kind == "max_latency_ms"
        else f"a share of the dense model (float in (0, 1]) or a number of {UNITS[kind]} (int)"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PlanError(f"{kind} is {takes}, not {value!r}.")
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    # Not asked of an int: one that no float can hold is a number all the same.
    if isinstance(number, float) and math.isnan(number):
        raise PlanError(f"{kind} is NaN; it is {takes}.")
    if number <= 0 or number == math.inf:
        raise PlanError(f"{kind}={number} cannot be kept to; it is {takes}.")
    if kind == "max_latency_ms":
        try:
            return float(number)
        except OverflowError as error:
            raise PlanError(f"{kind} is above all floats; it is {takes}.") from error
    if isinstance(number, float) and number > 1:
        hint = f" For {UNITS[kind]}, pass the int {int(number)}." if number.is_integer() else ""
        raise PlanError(f"{kind}={number} is a float, so a share, and above 1.{hint}")
    return number
