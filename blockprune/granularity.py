"""What counts as one block. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["GRANULARITIES", "Granularity"]

Granularity = Literal["branch", "layer", "layer_approx"]
"""See `blockprune.blocks.find_blocks`."""

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
