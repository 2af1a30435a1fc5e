"""What running and training a module costs, measured; and latency as a budget."""

from __future__ import annotations

from blockprune.profiling.energy import (
    Energy,
    EnergyPart,
    formula_energy,
    metered_energy,
)
from blockprune.profiling.execution import Execution
from blockprune.profiling.latency import Latency, compare_latency, measure_latency
from blockprune.profiling.limits import LatencyGoal
from blockprune.profiling.memory import PeakMemory, inference_memory, training_memory
from blockprune.profiling.samples import Timing, median_interval
from blockprune.profiling.saturation import Saturation, saturated_batch
from blockprune.profiling.table import LatencyTable
from blockprune.profiling.training import StepTime, compare_training
from blockprune.profiling.trials import trial_ticket

__all__ = [
    "Energy",
    "EnergyPart",
    "Execution",
    "Latency",
    "LatencyGoal",
    "LatencyTable",
    "PeakMemory",
    "Saturation",
    "StepTime",
    "Timing",
    "compare_latency",
    "compare_training",
    "formula_energy",
    "inference_memory",
    "measure_latency",
    "median_interval",
    "metered_energy",
    "saturated_batch",
    "training_memory",
    "trial_ticket",
]
