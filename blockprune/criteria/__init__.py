"""Criteria: how important is each block? Higher is more important; the lowest goes first.

A new criterion is one callable in a file of its family and one row here.
"""

from __future__ import annotations

from blockprune.criteria.base import Batch, Criterion, NoDataWarning, ScoringContext, main_output
from blockprune.criteria.control import Random
from blockprune.criteria.gradient import Grasp, Snip, ZeroScoresWarning
from blockprune.criteria.weights import L1

__all__ = [
    "CRITERIA",
    "L1",
    "Batch",
    "Criterion",
    "Grasp",
    "NoDataWarning",
    "Random",
    "ScoringContext",
    "Snip",
    "ZeroScoresWarning",
    "main_output",
]

CRITERIA: dict[str, Criterion] = {
    # From nothing but the seed, or the weights.
    "random": Random(),
    "l1": L1(),
    # From gradients of the loss on one batch: the first derivative, then the second.
    "snip": Snip(),
    "snip_sum": Snip("sum"),
    "grasp": Grasp(),
    "grasp_sum": Grasp("sum"),
}
