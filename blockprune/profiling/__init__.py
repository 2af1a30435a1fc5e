"""What running a module costs, measured; and latency as a budget."""

from __future__ import annotations

from blockprune.profiling.latency import Latency, compare_latency, measure_latency
from blockprune.profiling.limits import LatencyGoal
from blockprune.profiling.table import LatencyTable
from blockprune.profiling.trials import trial_ticket

__all__ = [
    "Latency",
    "LatencyGoal",
    "LatencyTable",
    "compare_latency",
    "measure_latency",
    "trial_ticket",
]
