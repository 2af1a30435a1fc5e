"""Whether a run shows what a paper claims: decided by rule from its figures.

Differences are paired by seed, with intervals of Student's t as for verdicts. What a seed says is
the mean over all that is compared in it, since tickets of one seed are not independent; a seed that
lacks one of them says nothing. A finding *holds* or *fails* where the interval says so, and is
*undecided* where it does not: with few seeds that is the usual answer, and no sign against the
paper.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blockprune.lottery.record import TicketCase
from blockprune.lottery.verdicts import paired_interval
from blockprune.report.cases import Cases

__all__ = ["Decision", "Finding", "above_zero", "against"]

Decision = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Finding:
    """A claim of a paper, and what a run says to it.

    Attributes:
        paper: where it stands.
        claim: in one sentence.
        decision: of this run.
        figures: that decided.
    """

    paper: str
    claim: str
    decision: Decision
    figures: str


def against(
    cases: Cases,
    paper: str,
    claim: str,
    pairs: Sequence[tuple[TicketCase, TicketCase]],
    *,
    tolerance: float | None = None,
) -> Iterator[Finding]:
    """Decide whether the first of each pair is better, on the mean of all pairs of a seed.

    With a tolerance: whether both are as good, up to so many points.
    """
    by_seed = _by_seed(cases, pairs)
    interval = paired_interval([*by_seed.values()], cases.record.confidence)
    if interval is None:
        return
    low, high = interval
    yield Finding(
        paper,
        claim,
        _sign(interval) if tolerance is None else _within(interval, tolerance),
        f"{statistics.fmean(by_seed.values()):+.2f} points [{low:+.2f}, {high:+.2f}] on the mean "
        f"of {len(pairs)} comparison{'' if len(pairs) == 1 else 's'}"
        f"{'' if tolerance is None else f', with a tolerance of {tolerance:g}'}, "
        f"{len(by_seed)} seeds.",
    )


def _by_seed(cases: Cases, pairs: Sequence[tuple[TicketCase, TicketCase]]) -> dict[int, float]:
    """Return, for each seed that has all of the pairs, their mean difference, in points."""
    return _means(
        ((one, other), network.seed, 100 * (network.accuracy - beside.accuracy))
        for one, other in pairs
        for network in cases.networks(one)
        for beside in cases.networks(other)
        if beside.seed == network.seed
    )


def _means(found: Iterable[tuple[Hashable, int, float]]) -> dict[int, float]:
    """Return the mean of what each seed has a value of, for the seeds that have all of it."""
    values: dict[int, dict[Hashable, float]] = {}
    for what, seed, value in found:
        values.setdefault(seed, {})[what] = value
    every = {what for of_seed in values.values() for what in of_seed}
    return {
        seed: statistics.fmean(of_seed.values())
        for seed, of_seed in values.items()
        if len(of_seed) == len(every)
    }


def above_zero(cases: Cases, found: Iterable[tuple[Hashable, int, float]]) -> tuple[Decision, str]:
    """Decide whether values are above 0, on the mean of a seed, and say their interval."""
    by_seed = _means(found)
    interval = paired_interval([*by_seed.values()], cases.record.confidence)
    if interval is None:
        return "undecided", f"no interval of {len(by_seed)} seed{'' if len(by_seed) == 1 else 's'}"
    low, high = interval
    mean = statistics.fmean(by_seed.values())
    return _sign(interval), f"{mean:+.3g} [{low:+.3g}, {high:+.3g}] over {len(by_seed)} seeds"


def _sign(interval: tuple[float, float]) -> Decision:
    low, high = interval
    return "holds" if low > 0 else "fails" if high < 0 else "undecided"


def _within(interval: tuple[float, float], tolerance: float) -> Decision:
    low, high = interval
    if -tolerance <= low and high <= tolerance:
        return "holds"
    return "fails" if high < -tolerance or low > tolerance else "undecided"
