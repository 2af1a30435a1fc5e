"""Third-party libraries: tiny models of them, with the number of branches that each has."""

from __future__ import annotations

from . import classification, detection, images, medical, sequences, tables
from .configuration import Built, Configuration

__all__ = ["CONFIGURATIONS", "Built", "Configuration"]

CONFIGURATIONS: tuple[Configuration, ...] = (
    *detection.CONFIGURATIONS,
    *classification.CONFIGURATIONS,
    *images.CONFIGURATIONS,
    *medical.CONFIGURATIONS,
    *sequences.CONFIGURATIONS,
    *tables.CONFIGURATIONS,
)
