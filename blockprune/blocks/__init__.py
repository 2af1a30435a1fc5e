"""The one definition of "removable residual block", and the analysis that applies it."""

from __future__ import annotations

from blockprune.blocks.cuts import Cut, Cuts
from blockprune.blocks.find import find_blocks
from blockprune.blocks.flow import Flow
from blockprune.blocks.naming import NAME_KEY
from blockprune.blocks.rule import parameters_read
from blockprune.blocks.types import BlockAnalysis, Reason, Rejection, ResidualBlock, Stage

__all__ = [
    "NAME_KEY",
    "BlockAnalysis",
    "Cut",
    "Cuts",
    "Flow",
    "Reason",
    "Rejection",
    "ResidualBlock",
    "Stage",
    "find_blocks",
    "parameters_read",
]
