"""One pass through an eager model, on inputs of its own and with draws that can be repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .draws import fixed_draws
from .outcome import Inputs, fresh

__all__ = ["all_trainable", "run"]


def run(model: nn.Module, inputs: Inputs, *, differentiable: bool = False) -> Any:
    """Return the output of `model`; `differentiable` inputs are such that autograd sees."""
    args, kwargs = fresh(inputs, differentiable=differentiable)
    with fixed_draws(), _no_fast_path():
        return model(*args, **kwargs)


@contextlib.contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Let autograd see every parameter, frozen ones too."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    was = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in zip(parameters, was, strict=True):
            parameter.requires_grad_(before)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep attention from a kernel that computes in another order in eval mode."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
