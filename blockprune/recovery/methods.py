"""The methods of recovery, and which options each of them reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from blockprune.errors import RecoveryError
from blockprune.recovery.fitting import FAMILIES

__all__ = ["METHODS", "check_method", "check_options"]

METHODS: Final = ("norms", *FAMILIES, "distill")
"""What `recover` knows."""

_OF_FITS: Final = tuple(FAMILIES)
_READ_BY: Final[dict[str, Collection[str]]] = {
    "ridge": _OF_FITS,
    "mask_fn": (*_OF_FITS, "distill"),
    "recipe": ("distill",),
    "loss_fn": ("distill",),
    "accelerator": ("distill",),
    "checkpoint": ("distill",),
}
"""Option to the methods that read it."""


def check_method(method: str) -> None:
    """Refuse a method that there is not.

    Raises:
        RecoveryError: names those that there are.
    """
    if method not in METHODS:
        raise RecoveryError(f"there is no method {method!r}; there are {', '.join(METHODS)}.")


def check_options(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options that a method does not read; those that are None were not given.

    Raises:
        RecoveryError: names one, and the methods that it is for.
    """
    for name, value in given.items():
        if value is not None and method not in _READ_BY[name]:
            methods = ", ".join(map(repr, _READ_BY[name]))
            raise RecoveryError(f"{name} is an option of {methods}; the method is {method!r}.")
