"""Robustness: corrupted and shifted images, attacks, calibration, for a ticket and its dense model.

Nothing is imported before it is asked for, so that `robustness.record` is read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockprune.robustness.attacks import attack, transferred
    from blockprune.robustness.choices import measured
    from blockprune.robustness.corruptions import CORRUPTIONS, corrupt
    from blockprune.robustness.files import CorruptedFiles
    from blockprune.robustness.measuring import robustness_of
    from blockprune.robustness.normalising import Normalised, PixelData, pixels_of
    from blockprune.robustness.record import (
        AttackChoice,
        Normalisation,
        RobustnessChoice,
        RobustnessResult,
    )

__all__ = [
    "CORRUPTIONS",
    "AttackChoice",
    "CorruptedFiles",
    "Normalisation",
    "Normalised",
    "PixelData",
    "RobustnessChoice",
    "RobustnessResult",
    "attack",
    "corrupt",
    "measured",
    "pixels_of",
    "robustness_of",
    "transferred",
]

_HOMES = {
    "CORRUPTIONS": "corruptions",
    "AttackChoice": "record",
    "CorruptedFiles": "files",
    "Normalisation": "record",
    "Normalised": "normalising",
    "PixelData": "normalising",
    "RobustnessChoice": "record",
    "RobustnessResult": "record",
    "attack": "attacks",
    "corrupt": "corruptions",
    "measured": "choices",
    "pixels_of": "normalising",
    "robustness_of": "measuring",
    "transferred": "attacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blockprune.robustness' has no attribute {name!r}")
    return getattr(import_module(f"blockprune.robustness.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
