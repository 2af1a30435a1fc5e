"""Who wins: equation 1 for each seed, and a paired confidence interval over the seeds.

With d_s the accuracy of a ticket minus that of the dense network of the same seed, in percentage
points, the ticket of seed s is winning where ``d_s + xi >= 0``. Over m seeds, with mean d and
standard deviation s of the differences (m - 1 in the denominator), the interval of the mean is::

    d -/+ t * s / sqrt(m),  t the (1 + confidence) / 2 quantile of Student's t with m - 1 degrees

Pairing by seed takes out what a seed does to both networks: its weights and its order of the data.

Sources: papers/000, equation 1; W. S. Gosset ("Student"), "The probable error of a mean", 1908.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.special import stdtrit

from blockprune.lottery.record import NetworkRecord, TicketCase, Verdict, VerdictRecord

__all__ = ["paired_interval", "verdict_of", "verdicts_of"]

FEWEST_SEEDS = 2

# Accuracies are counts divided by a count: rounding away the last digits keeps a difference of
# exactly xi a win.
DIGITS = 9


def paired_interval(
    differences: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Return the confidence interval of the mean of paired differences, None for fewer than two.

    Example:
        >>> from blockprune.lottery.verdicts import paired_interval
        >>> low, high = paired_interval([1.0, 2.0, 3.0])
        >>> round(low, 4), round(high, 4)
        (-0.4841, 4.4841)
    """
    count = len(differences)
    if count < FEWEST_SEEDS:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * deviation / math.sqrt(count)
    return round(mean - half, DIGITS), round(mean + half, DIGITS)


def verdict_of(interval: tuple[float, float] | None, xi_points: float) -> Verdict:
    """Return what an interval of differences says about equation 1.

    Example:
        >>> from blockprune.lottery.verdicts import verdict_of
        >>> verdict_of((-0.5, 2.0), xi_points=1.0), verdict_of((-1.5, 2.0), xi_points=1.0)
        ('wins', 'ties')
    """
    if interval is None:
        return "not enough seeds"
    low, high = interval
    if low + xi_points >= 0:
        return "wins"
    return "loses" if high + xi_points < 0 else "ties"


def verdicts_of(
    networks: Sequence[NetworkRecord], *, xi_points: float, confidence: float
) -> tuple[VerdictRecord, ...]:
    """Return a verdict for each case but the dense one, in the order of their first networks.

    A case is judged on the seeds that it and the dense network have been trained with; without
    such a seed there is no verdict. Random blocks are compared with where there are any of the
    same p and start; see `random_twin`.
    """
    by_case: dict[TicketCase, dict[int, float]] = {}
    for network in networks:
        by_case.setdefault(network.case, {})[network.seed] = network.accuracy
    dense = by_case.pop(TicketCase(kind="dense"), {})
    found = []
    for case, accuracies in by_case.items():
        differences = _points(accuracies, dense)
        if not differences:
            continue
        interval = paired_interval([*differences.values()], confidence)
        against = _points(accuracies, by_case.get(random_twin(case), {}))
        if case.kind == "random":
            against = {}
        found.append(
            VerdictRecord(
                case=case,
                differences=differences,
                winning={seed: value + xi_points >= 0 for seed, value in differences.items()},
                mean=round(statistics.fmean(differences.values()), DIGITS),
                interval=interval,
                against_random=round(statistics.fmean(against.values()), DIGITS)
                if against
                else None,
                against_random_interval=paired_interval([*against.values()], confidence),
                verdict=verdict_of(interval, xi_points),
            )
        )
    return tuple(found)


def random_twin(case: TicketCase) -> TicketCase:
    """Return the control that is trained like a ticket, and lacks as much at random.

    That of filters or weights is like one ticket: it has as many of each layer as this has.
    """
    if case.structure != "blocks":
        return case.model_copy(update={"kind": "random"})
    return case.model_copy(
        update={
            "kind": "random",
            "criterion": "random",
            "scored_at": None,
            "schedule": "one-shot",
        }
    )


def _points(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Return the differences in percentage points, by seed that both have."""
    return {
        seed: round(100 * (accuracy - other[seed]), DIGITS)
        for seed, accuracy in one.items()
        if seed in other
    }
