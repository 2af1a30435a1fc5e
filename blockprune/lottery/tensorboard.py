"""Curves of a training for TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["is_installed", "log_epochs"]


def is_installed() -> bool:
    """Return whether TensorBoard is."""
    return importlib.util.find_spec("tensorboard") is not None


def log_epochs(folder: Path, epochs: Iterable[Mapping[str, Any]]) -> None:
    """Write the figures of some epochs to TensorBoard's event files in a folder.

    Args:
        folder: of one curve; made where absent.
        epochs: with the keys "epoch", "loss", "accuracy" and perhaps "test_accuracy".
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    try:
        for figures in epochs:
            for name in ("loss", "accuracy", "test_accuracy"):
                if figures.get(name) is not None:
                    writer.add_scalar(name, figures[name], figures["epoch"])
    finally:
        writer.close()
