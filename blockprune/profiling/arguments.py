"""What a module is called with, cut or repeated to batches of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import MeasurementError

__all__ = ["Arguments", "arguments_of", "batches", "check_counts", "device_of"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with, by place and by name."""


def arguments_of(example_inputs: Any) -> Arguments:
    """Return a tensor, a sequence of arguments or a dict of keywords as arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def batches(arguments: Arguments, batch_sizes: Sequence[int] | None) -> list[tuple[int, Arguments]]:
    """Return each batch size with a batch of it; the batch as it is given for None.

    Every tensor whose first axis has the batch's length (that of the first tensor) is repeated
    or cut; so is a list of tensors among the arguments, one a sample.

    Raises:
        MeasurementError: sizes are given, and the arguments hold no batch.
    """
    if batch_sizes is None:
        positional, named = arguments
        lengths = [len(value) for value in (*positional, *named.values()) if _is_batch(value)]
        # Inputs without a batch axis are one sample.
        return [((lengths or [1])[0], arguments)]
    return [(batch_size, _resized(arguments, batch_size)) for batch_size in batch_sizes]


def check_counts(batch_sizes: Sequence[int] | None, **counts: int | None) -> None:
    """Refuse what is not a count from 1 on.

    Raises:
        MeasurementError: there is no batch size, or a number is not whole or below 1.
    """
    if batch_sizes is not None and not batch_sizes:
        raise MeasurementError("There is no batch size to measure; give at least one, such as 1.")
    named = [("A batch size", size) for size in batch_sizes or ()]
    named += [(name, value) for name, value in counts.items() if value is not None]
    for name, value in named:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MeasurementError(f"{name} must be a whole number from 1 on, got {value!r}.")


def device_of(model: nn.Module) -> torch.device:
    """Return where a module is: with its first parameter; on the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _resized(arguments: Arguments, batch_size: int) -> Arguments:
    """Repeat or cut the samples of every batched argument to ``batch_size``."""
    positional, named = arguments
    values = [*positional, *named.values()]
    lengths = [len(value) for value in values if _is_batch(value)]
    if not lengths:
        raise MeasurementError(
            "example_inputs hold no tensor with a batch axis and no list of tensors, so no "
            "batch can be made of them."
        )

    def resize(value: Any) -> Any:
        if not _is_batch(value) or len(value) != lengths[0]:
            return value
        rows = [row % lengths[0] for row in range(batch_size)]
        return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]

    return (
        tuple(resize(value) for value in positional),
        {name: resize(value) for name, value in named.items()},
    )


def _is_batch(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) > 0
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)
