"""What a model costs, what each block of it, and what is left without any set of blocks."""

from __future__ import annotations

from blockprune.costs.counting import (
    Costs,
    UncountedWarning,
    block_costs,
    model_costs,
    node_costs,
    paper_memory_bytes,
)
from blockprune.costs.executions import Chain, WatchedModel, goes_first
from blockprune.costs.remaining import Quantity, RemainingCosts, RemainingQuantity
from blockprune.costs.weights import filter_count, macs_per_weight

__all__ = [
    "Chain",
    "Costs",
    "Quantity",
    "RemainingCosts",
    "RemainingQuantity",
    "UncountedWarning",
    "WatchedModel",
    "block_costs",
    "filter_count",
    "goes_first",
    "macs_per_weight",
    "model_costs",
    "node_costs",
    "paper_memory_bytes",
]
