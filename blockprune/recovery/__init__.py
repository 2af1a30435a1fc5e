"""Recovery: a network that has lost blocks works again."""

from __future__ import annotations

from blockprune.recovery.distillation import Distillation, Progress
from blockprune.recovery.methods import METHODS, check_method
from blockprune.recovery.recover import recover, recovery_of
from blockprune.recovery.running_statistics import recalibrate_norms

__all__ = [
    "METHODS",
    "Distillation",
    "Progress",
    "check_method",
    "recalibrate_norms",
    "recover",
    "recovery_of",
]
