"""The structured baseline: single filters of residual networks go, and the network gets narrower.

    model ─ filter_layers ─► FilterLayer ─ filter_scores, make_filter_plan ─► FilterPlan
          ─ remove_filters ─► a narrower network, proved against the dense one

Blocks leave a network shallower, filters leave it as deep and narrower: the baseline that
papers/000 holds its tickets against (Table 3), at a matched number of filters, parameters or MACs.
"""

from __future__ import annotations

from blockprune.filters.layers import FilterLayer, FilterRefusal, filter_layers, filter_refusals
from blockprune.filters.making import make_filter_plan
from blockprune.filters.plans import FilterPlan, LayerCut
from blockprune.filters.removal import remove_filters
from blockprune.filters.scores import FILTER_CRITERIA, filter_scores
from blockprune.filters.slicing import fitted_filters

__all__ = [
    "FILTER_CRITERIA",
    "FilterLayer",
    "FilterPlan",
    "FilterRefusal",
    "LayerCut",
    "filter_layers",
    "filter_refusals",
    "filter_scores",
    "fitted_filters",
    "make_filter_plan",
    "remove_filters",
]
