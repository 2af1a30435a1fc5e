"""The smallest inputs that a model runs on, preferably in both modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .draws import seeded
from .outcome import copied, fresh

__all__ = ["first_that_runs", "runs"]


def first_that_runs(model: nn.Module, candidates: Iterable[Callable[[], Any]]) -> Any:
    """Return the first inputs that the model takes in both modes, else in eval mode, else None."""
    fallback = None
    for make in candidates:
        inputs = make()
        if fallback is None and not runs(model, inputs, train=False):
            continue
        if runs(model, inputs, train=True) and runs(model, inputs, train=False):
            return inputs
        fallback = inputs if fallback is None else fallback
    return fallback


def runs(model: nn.Module, inputs: Any, *, train: bool) -> bool:
    """Whether a copy of the model takes these inputs in that mode."""
    args, kwargs = fresh(inputs)
    with seeded(0), torch.no_grad():
        try:
            copied(model).train(train)(*args, **kwargs)
        # Whatever a model raises on inputs that are not its own means "not these".
        except Exception:
            return False
    return True
