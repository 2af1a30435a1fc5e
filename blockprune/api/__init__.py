"""The composed calls: analysis, scoring, plan, costs and surgery in one."""

from __future__ import annotations

from blockprune.api.planning import Planner, make_plan
from blockprune.api.pruning import prune

__all__ = ["Planner", "make_plan", "prune"]
