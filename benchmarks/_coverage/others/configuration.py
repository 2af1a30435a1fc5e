"""One model of a third-party library: how it is built, and how many branches it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["BATCH", "Built", "Configuration"]

BATCH = 2

Built = tuple[nn.Module, Any]
"""A model with random weights, and the inputs that its forward takes."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A tiny model of a library, and its truth.

    Attributes:
        library: the distribution on PyPI that the model comes from.
        model: what it is called within that library.
        branches: how many identity branches with parameters one forward adds, read off the source.
        why: the sum that this number comes from.
        build: makes the model; nothing is downloaded. It imports the library, which need not be
            installed for its configurations to be listed.
    """

    library: str
    model: str
    branches: int
    why: str
    build: Callable[[], Built]

    @property
    def name(self) -> str:
        """A name that no other configuration has."""
        return f"{self.library}/{self.model}"
