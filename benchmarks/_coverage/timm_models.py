"""Every model of timm: on the meta device for its analysis, with random weights for its tickets."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

from .sizes import first_that_runs
from .waking import wake

__all__ = ["build", "build_on_meta", "file_of", "names"]

BATCH = 2
SMALL_SIZES = (64, 96, 128, 160)
NATIVE_LIMIT = 256
# For models that only take the size they were built for, where that is a large one.
BUILT_SIZES = (128, 224, 256)


def names() -> list[str]:
    """Return the names of all models of the installed version."""
    return list(timm.list_models())


def file_of(name: str) -> str:
    """Return the module of timm that a model is written in."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def build_on_meta(name: str) -> tuple[nn.Module, Any]:
    """Build a model without memory for its weights, and an input of the size it is meant for."""
    with torch.device("meta"):
        model = timm.create_model(name)
        return model, torch.rand(BATCH, *_native(model))


def build(name: str) -> tuple[nn.Module, Any]:
    """Build a model with random weights, and images as small as it takes.

    Raises:
        ValueError: it takes no image of any size tried.
    """
    for model, sizes in _attempts(name):
        shapes = [(BATCH, _native(model)[0], *size) for size in sizes]
        inputs = first_that_runs(model, [functools.partial(torch.rand, shape) for shape in shapes])
        if inputs is not None:
            return wake(model), inputs
    raise ValueError(f"{name} takes no image of any size tried")


def _attempts(name: str) -> Iterator[tuple[nn.Module, list[tuple[int, int]]]]:
    """Yield the model as it is, and built for small images, with the sizes to try on each."""
    model = timm.create_model(name)
    native = _native(model)[1:]
    is_small = max(native) <= NATIVE_LIMIT
    small = [(size, size) for size in SMALL_SIZES if size < max(native)]
    yield model, [*small, native] if is_small else small
    if is_small:
        return
    for size in BUILT_SIZES:
        try:
            yield timm.create_model(name, img_size=size), [(size, size)]
        except (TypeError, ValueError, AssertionError, RuntimeError):
            continue  # not every constructor takes a size, nor this one
    yield model, [native]


def _native(model: nn.Module) -> tuple[int, int, int]:
    return tuple(model.pretrained_cfg["input_size"])
