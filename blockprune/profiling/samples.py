"""Repeated times of one thing, and how far the figures taken from them can be trusted.

Times on a shared machine have no distribution that one could name, so the intervals assume none.
The median of `n` independent samples lies between the `k`-th smallest and the `k`-th largest with
the probability that a fair coin shows heads at least `k` and at most `n - k` times in `n` throws.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from blockprune.errors import MeasurementError

__all__ = ["CONFIDENCE", "Interval", "Timing", "median_interval"]

CONFIDENCE = 0.95
"""Of every interval, unless another is asked for."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """Time of doing one thing with one batch, measured in rounds.

    Attributes:
        batch_size: samples in the batch.
        samples_ms: milliseconds, one figure a round, in the order of the rounds.

    Example:
        >>> from blockprune.profiling import Timing
        >>> slow, fast = Timing(8, (2.0, 6.0, 20.0)), Timing(8, (1.0, 3.0, 10.0))
        >>> slow.median_ms, slow.ratio_to(fast), slow.samples_per_s
        (6.0, 2.0, 1333.33...)
    """

    batch_size: int
    samples_ms: tuple[float, ...] = field(repr=False)

    @property
    def median_ms(self) -> float:
        """Median over the rounds, in milliseconds."""
        return statistics.median(self.samples_ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range over the rounds, in milliseconds; 0 for a single round."""
        if len(self.samples_ms) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return third - first

    @property
    def samples_per_s(self) -> float:
        """Throughput at the median: ``1000 * batch_size / median_ms``."""
        return 1e3 * self.batch_size / self.median_ms

    def interval_ms(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Return an interval of the median; see :func:`median_interval`."""
        return median_interval(self.samples_ms, confidence)

    def ratio_to(self, other: Timing) -> float:
        """Return the median over the rounds of this time divided by ``other``'s.

        Both must come from one comparison (:func:`compare_latency`, :func:`compare_training`), so
        that their rounds pair up.

        Raises:
            MeasurementError: the numbers of rounds, or the batch sizes, differ.
        """
        return statistics.median(self._ratios(other))

    def ratio_interval_to(self, other: Timing, confidence: float = CONFIDENCE) -> Interval | None:
        """Return an interval of :meth:`ratio_to`; see :func:`median_interval`."""
        return median_interval(self._ratios(other), confidence)

    def _ratios(self, other: Timing) -> list[float]:
        if self._paired_with != other._paired_with:
            raise MeasurementError(
                "Only rounds of one comparison pair up: batch {} over {} rounds against batch "
                "{} over {} rounds.".format(*self._paired_with, *other._paired_with)
            )
        return [a / b for a, b in zip(self.samples_ms, other.samples_ms, strict=True)]

    @property
    def _paired_with(self) -> tuple[int, int]:
        return self.batch_size, len(self.samples_ms)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Return the narrowest symmetric pair of order statistics that holds the median.

    With ``x_(1) <= ... <= x_(n)`` it is ``(x_(k), x_(n+1-k))`` for the largest ``k`` with
    ``2 * P(Binomial(n, 1/2) < k) <= 1 - confidence``. Exact, whatever the distribution, for
    independent samples, and the same each time.

    Args:
        samples: at least one.
        confidence: above 0 and below 1.

    Returns:
        None where even the extremes hold the median less surely: 95 % needs 6 samples.

    Raises:
        MeasurementError: `confidence` is out of range.

    Example:
        >>> from blockprune.profiling import median_interval
        >>> median_interval([5, 1, 4, 2, 3, 6])
        (1, 6)
        >>> median_interval([1, 2, 3]) is None
        True

    Source: Conover, "Practical Nonparametric Statistics", section 3.2.
    """
    if not 0 < confidence < 1:
        raise MeasurementError(f"confidence must lie between 0 and 1, got {confidence!r}.")
    rank = _rank(len(samples), confidence)
    if rank == 0:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


@lru_cache(maxsize=64)
def _rank(count: int, confidence: float) -> int:
    """Return `k` of the interval; 0 where there is none."""
    # Whole numbers: the probabilities times 2 ** count. A thousand throws leave floats behind.
    allowed = int((1 - confidence) / 2 * 2**64) * 2**count >> 64
    ways, below, rank = 1, 1, 0
    while below <= allowed and rank < (count + 1) // 2:
        ways = ways * (count - rank) // (rank + 1)
        rank += 1
        below += ways
    return rank
