"""Which filters go, as a value that is read and written as JSON. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blockprune.errors import PlanError

__all__ = ["FILTER_PLAN_VERSION", "FilterPlan", "LayerCut", "Target"]

FILTER_PLAN_VERSION: Final = 1

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Target = Literal["count", "params", "macs"]


class LayerCut(BaseModel):
    """What goes of one layer.

    Attributes:
        filters: how many the layer has before.
        remove: indices of those that go, ascending; at least one filter stays.
        axes: name of each tensor that holds a slice of every filter, to the axis of the slices.

    Example:
        >>> LayerCut(filters=4, remove=(1,), axes={"conv.weight": 0}).kept
        (0, 2, 3)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    filters: Annotated[int, Field(ge=1)]
    remove: tuple[Count, ...]
    axes: dict[Name, Annotated[int, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if list(self.remove) != sorted(set(self.remove)):
            raise ValueError("indices of filters must ascend, each given once")
        if self.remove and self.remove[-1] >= self.filters:
            raise ValueError(f"there is no filter {self.remove[-1]} among {self.filters}")
        if not self.kept:
            raise ValueError("at least one filter stays in a layer")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the filters that stay."""
        gone = set(self.remove)
        return tuple(index for index in range(self.filters) if index not in gone)


class FilterPlan(BaseModel):
    """Which filters of one model go, and what goes with them.

    Attributes:
        cuts: by name of layer, in order of execution; layers that lose nothing are left out.
        params: parameters that vanish.
        macs: multiply-accumulate operations that vanish, for the batch the layers were found with.
        target: what was matched, "count", "params" or "macs".
        asked: how much of it should go; what goes is never more.
        seed: of the layers drawn for the remainder.
        version: of this format.

    Example:
        >>> plan = FilterPlan(
        ...     cuts={"conv1": LayerCut(filters=4, remove=(1,), axes={"conv1.weight": 0})},
        ...     params=9, macs=90, target="count", asked=1, seed=0,
        ... )
        >>> plan.count, FilterPlan.from_json(plan.to_json()) == plan
        (1, True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cuts: dict[Name, LayerCut]
    params: Count
    macs: Count
    target: Target
    asked: Count
    seed: int
    version: Literal[1] = FILTER_PLAN_VERSION

    @property
    def count(self) -> int:
        """How many filters go."""
        return sum(len(cut.remove) for cut in self.cuts.values())

    @property
    def reached(self) -> int:
        """How much of the target goes."""
        return {"count": self.count, "params": self.params, "macs": self.macs}[self.target]

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan that `to_json` wrote.

        Raises:
            PlanError: the text is no such plan; says where and why.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise PlanError(f"this is no plan of filters: {where}: {first['msg']}.") from error
