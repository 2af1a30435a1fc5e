"""Training and evaluation mode, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["in_mode"]


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Put ``models`` in training or evaluation mode; every module gets its own back on leaving.

    A user may have frozen single modules in evaluation mode, so one flag for the whole
    model would not do.

    Example:
        >>> from torch import nn
        >>> from blockprune.modes import in_mode
        >>> model = nn.Sequential(nn.Dropout().eval(), nn.ReLU())
        >>> with in_mode(False, model):
        ...     model.training
        False
        >>> [module.training for module in model.modules()]
        [True, False, True]
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
