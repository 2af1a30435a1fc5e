"""The one definition of "removable residual block", and the analysis that applies it."""

from __future__ import annotations

from blockprune.blocks.activations import clamped_range
from blockprune.blocks.cuts import Cut, Cuts, by_flow, cut_together, still_added
from blockprune.blocks.find import find_blocks
from blockprune.blocks.flow import Flow, input_of
from blockprune.blocks.naming import carried_names, carry_name, lies_in
from blockprune.blocks.rule import parameters_read
from blockprune.blocks.types import BlockAnalysis, Reason, Rejection, ResidualBlock, Stage

__all__ = [
    "BlockAnalysis",
    "Cut",
    "Cuts",
    "Flow",
    "Reason",
    "Rejection",
    "ResidualBlock",
    "Stage",
    "by_flow",
    "carried_names",
    "carry_name",
    "clamped_range",
    "cut_together",
    "find_blocks",
    "input_of",
    "lies_in",
    "parameters_read",
    "still_added",
]
