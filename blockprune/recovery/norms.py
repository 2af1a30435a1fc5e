"""Normalisations that take statistics of each position: layer norm and RMS norm.

    n(x) = (x - m) s,   m, s: mean and inverse deviation of x over the channels of its position
    norm(x) = n(x) weight + bias

Of x, a norm is not linear. With m and s held at what they are in one run it is, and multiplies each
channel and position by a number: what lies in front of it can be fitted as if nothing but a scale
stood between. That is the norm's tangent without the part that rescales the position, so what the
stream becomes has to be measured. Weight and bias themselves are a linear operation on n(x), and
nothing has to be held for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HELD", "NORMS", "HeldStatistics", "normalised"]

NORMS = (F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
"""Functions that normalise positions."""
HELD = (torch.rsqrt, Tensor.rsqrt)
"""Functions that norms written by hand scale positions with."""


class HeldStatistics:
    """Statistics of the norms of a run, in the order of their calls.

    The first run that is given them fills them in; those after it use them again.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next = 0

    @property
    def is_empty(self) -> bool:
        """Whether no norm was called."""
        return not self._kept

    def rewind(self) -> None:
        """Begin another run."""
        self._next = 0

    def of(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the next statistic, computed if this is the first run."""
        if self._next == len(self._kept):
            self._kept.append(compute().detach())
        self._next += 1
        return self._kept[self._next - 1]


def normalised(func: Any, given: dict[str, Any], held: HeldStatistics) -> Tensor:
    """Return n(x) of a call of one of `NORMS`, with the statistics that are held.

    Args:
        func: which.
        given: its arguments by name.
        held: the statistics.
    """
    x: Tensor = given["input"]
    axes = tuple(range(-len(given["normalized_shape"]), 0))
    eps = given.get("eps")
    if func in (F.rms_norm, torch.rms_norm):
        room = torch.finfo(x.dtype).eps if eps is None else eps
        return x * held.of(lambda: (x.square().mean(axes, keepdim=True) + room).rsqrt())
    room = 1e-5 if eps is None else eps
    centred = x - held.of(lambda: x.mean(axes, keepdim=True))
    deviation = held.of(
        lambda: (x.var(axes, correction=0, keepdim=True) + room).rsqrt(),
    )
    return centred * deviation
