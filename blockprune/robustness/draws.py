"""Random numbers of a corruption: a function of seed, name, severity and sample alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = ["Array", "Draws"]

Array = NDArray[np.float64]

_WORDS = 4
"""64-bit numbers that one value of Philox's counter gives."""


class Draws:
    """The draws of the samples ``first_index, first_index + 1, ...``, whatever the batch.

    Philox counts: sample ``k`` that needs ``m`` numbers owns the counter values from
    ``k * ceil(m / 4)`` on. Each call takes a stream of its own.

    Args:
        seed: any integer.
        name: of the corruption.
        severity: of the corruption.
        first_index: of the first sample in the data set, 0 or more.
        count: samples.

    Example:
        >>> from blockprune.robustness.draws import Draws
        >>> whole = Draws(0, "fog", 1, first_index=0, count=5).uniform(3)
        >>> part = Draws(0, "fog", 1, first_index=2, count=3).uniform(3)
        >>> bool((whole[2:] == part).all())
        True

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """

    def __init__(self, seed: int, name: str, severity: int, first_index: int, count: int) -> None:
        self._stem = f"{seed} {name} {severity}"
        self._first = first_index
        self._streams = 0
        self.count = count

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Array:
        """Return numbers ``(count, *shape)`` uniform in ``[low, high)``."""
        size = int(np.prod(shape))
        blocks = -(-size // _WORDS)
        bits = np.random.Philox(key=self._key())
        bits.advance(self._first * blocks)
        drawn = np.random.Generator(bits).random((self.count, blocks * _WORDS))[:, :size]
        return low + (high - low) * drawn.reshape(self.count, *shape)

    def normal(self, *shape: int) -> Array:
        """Return numbers ``(count, *shape)`` of the standard normal distribution."""
        # Half a step off zero, where the inverse is infinite.
        drawn: Array = ndtri(self.uniform(*shape) + 2.0**-54)
        return drawn

    def poisson(self, rates: Array) -> Array:
        """Return numbers of events, one for each rate ``(count, ...)``."""
        key = self._key()
        drawn = np.empty_like(rates)
        for row, own in enumerate(rates):
            bits = np.random.Philox(key=key, counter=(self._first + row) << 128)
            drawn[row] = np.random.Generator(bits).poisson(own)
        return drawn

    def _key(self) -> Any:
        self._streams += 1
        text = f"{self._stem} {self._streams}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
