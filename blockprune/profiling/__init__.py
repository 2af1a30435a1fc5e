"""What running a module costs, measured."""

from __future__ import annotations

from blockprune.profiling.latency import Latency, compare_latency, measure_latency

__all__ = ["Latency", "compare_latency", "measure_latency"]
