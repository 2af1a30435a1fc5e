"""Intervals of medians, against sums of binomial coefficients and against drawing."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction

import pytest

from blockprune.errors import MeasurementError
from blockprune.profiling import Latency, Timing, median_interval


def coverage(count: int, rank: int) -> Fraction:
    """Probability that the median lies between the rank-th smallest and the rank-th largest."""
    outside = sum(math.comb(count, heads) for heads in range(rank))
    return 1 - 2 * Fraction(outside, 2**count)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_interval_is_the_narrowest_that_holds_the_median_surely_enough(
    confidence: float,
) -> None:
    for count in range(1, 61):
        found = median_interval(range(1, count + 1), confidence)
        ranks = [
            rank
            for rank in range(1, (count + 1) // 2 + 1)
            if coverage(count, rank) >= Fraction(confidence)
        ]
        assert found == ((ranks[-1], count + 1 - ranks[-1]) if ranks else None)


@pytest.mark.parametrize(
    ("count", "expected"),
    # Printed tables of the sign test's interval, 95 %.
    [(5, None), (6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15)), (30, (10, 21))],
)
def test_printed_tables(count: int, expected: tuple[int, int] | None) -> None:
    assert median_interval(range(1, count + 1)) == expected


def test_order_does_not_matter() -> None:
    samples = [3.0, 1.0, 9.0, 2.0, 8.0, 7.0, 4.0]
    assert median_interval(samples) == median_interval(sorted(samples)) == (1.0, 9.0)


def test_of_skewed_draws_it_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0).expovariate
    hits = 0
    for _ in range(2000):
        interval = median_interval([draw(1.0) for _ in range(15)])
        assert interval is not None
        hits += interval[0] <= math.log(2) <= interval[1]
    # Exactly 96.5 % for 15 samples; the rest is three standard deviations of 2000 draws.
    assert hits / 2000 == pytest.approx(float(coverage(15, 4)), abs=0.0125)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(MeasurementError, match="confidence must lie between 0 and 1"):
        median_interval([1.0], confidence)


def test_ratio_intervals_come_from_pairs_of_rounds() -> None:
    # The machine varies a hundredfold, the pairs do not.
    fast = Timing(1, (1.0, 100.0, 10.0, 3.0, 50.0, 7.0))
    slow = Latency(1, tuple(2 * sample for sample in fast.samples_ms))
    assert slow.ratio_interval_to(fast) == (2.0, 2.0)
    assert fast.interval_ms() == (1.0, 100.0)
    assert fast.interval_ms(0.999) is None
    with pytest.raises(MeasurementError, match="Only rounds of one comparison pair up"):
        slow.ratio_interval_to(Timing(2, fast.samples_ms))
    assert slow.median_ms == statistics.median(slow.samples_ms)
