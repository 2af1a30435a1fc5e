"""Which tickets of levels are compared with one another, and the steps they are rewound to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from blockprune.lottery.record import TicketCase
from blockprune.lottery.steps import Step
from blockprune.report.cases import Cases, moment_of

__all__ = ["LevelGroup", "by_group", "criteria_of", "percent_left", "rewind_places"]


@dataclass(frozen=True)
class LevelGroup:
    """What tickets of levels share: all but importance and level."""

    scope: str
    schedule: str
    weights: str | None
    rewound_to: Step | None

    @classmethod
    def of(cls, case: TicketCase) -> LevelGroup:
        """Return the group of a case."""
        return cls(case.scope, case.schedule, case.weights, case.rewound_to)

    def title(self) -> str:
        """Return the group in a few words."""
        words = ["over all layers" if self.scope == "global" else "each layer the same share"]
        words.append(self.schedule)
        if self.weights not in (None, "rewind"):
            words.append(str(self.weights))
        if self.rewound_to is not None:
            words.append(f"rewound to {moment_of(self.rewound_to)}")
        return ", ".join(words)

    def has_control(self, control: TicketCase) -> bool:
        """Return whether a control belongs beside these tickets."""
        if control.kind == "random":
            return LevelGroup.of(control) == self
        mine = (self.scope, self.schedule, self.rewound_to)
        is_new = self.weights != "partial-reinit"
        return is_new and (control.scope, control.schedule, control.rewound_to) == mine


def by_group(cases: Iterable[TicketCase]) -> dict[LevelGroup, list[TicketCase]]:
    """Return the cases of each group."""
    found: dict[LevelGroup, list[TicketCase]] = {}
    for case in cases:
        found.setdefault(LevelGroup.of(case), []).append(case)
    return found


def criteria_of(cases: Iterable[TicketCase]) -> tuple[str, ...]:
    """Return the importances of cases, each once."""
    return tuple(dict.fromkeys(str(case.criterion) for case in cases))


def percent_left(cases: Cases, members: Iterable[TicketCase]) -> float:
    """Return the mean share of prunable weights that are left, in percent; NaN where unknown."""
    found = [
        100 * network.weights_left / network.weights_total
        for case in members
        for network in cases.networks(case)
        if network.weights_left is not None and network.weights_total
    ]
    return statistics.fmean(found) if found else math.nan


def rewind_places(cases: Cases, steps: Iterable[Step]) -> tuple[dict[Step, float], str]:
    """Return where steps lie on an axis, and its title.

    In epochs, where the batches of one are known; in their order otherwise.
    """
    ordered = sorted(set(steps), key=lambda step: (step.epoch, step.iteration))
    if not any(step.iteration for step in ordered):
        return {step: float(step.epoch) for step in ordered}, "rewound to epoch"
    batches = _batches(cases)
    if batches is None:
        return {step: float(place) for place, step in enumerate(ordered)}, "rewind step, in order"
    places = {step: float(step.iterations(batches)) for step in ordered}
    return places, "rewound to iteration"


def _batches(cases: Cases) -> int | None:
    """Return the batches of an epoch, the last of which may not be full."""
    recipe = cases.record.spec.get("recipe")
    images = cases.record.data.get("train_images")
    size = recipe.get("batch_size") if isinstance(recipe, dict) else None
    if isinstance(images, int) and isinstance(size, int) and size > 0:
        return math.ceil(images / size)
    return None
