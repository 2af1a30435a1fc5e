"""Batches: what the criteria read, and how a user's data become them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import DataError, TraceError
from blockprune.tracing import Call, as_call, map_tensors, tensors_in

__all__ = ["Batch", "Replay", "batches_of", "items_of"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the model, and the targets of its outputs.

    Attributes:
        call: the arguments, on the device of the model.
        targets: whatever the loss function reads, on the same device.
    """

    call: Call
    targets: Any

    def __len__(self) -> int:
        """Samples: the first dimension of the first tensor that has one."""
        values = (self.call.args, self.call.kwargs, self.targets)
        return next((len(tensor) for tensor in tensors_in(values) if tensor.dim()), 0)

    def part(self, start: int, stop: int) -> Batch:
        """Return samples `start` to `stop` of every tensor whose first dimension is the batch."""
        size = len(self)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.dim() and len(tensor) == size else tensor

        return Batch(self.call.map(cut), map_tensors(self.targets, cut))


class Replay:
    """An iterable that is read from its source once, when asked for, and kept for the next time."""

    def __init__(self, source: Iterable[Batch]) -> None:
        self._source = iter(source)
        self._taken: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            if position == len(self._taken):
                following = next(self._source, None)
                if following is None:
                    return
                self._taken.append(following)
            yield self._taken[position]
            position += 1


def batches_of(model: nn.Module, data: Any, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `data`, as `items_of` tells them apart.

    Raises:
        DataError: an item is no batch, or its inputs are no arguments of the model.
    """
    for position, item in enumerate(items_of(data)):
        inputs, targets = _parts(item, position)
        try:
            call = as_call(model, inputs)
        except TraceError as error:
            raise DataError(f"batch {position} of the data: {error}") from error
        yield Batch(
            call.map(lambda tensor: tensor.detach().to(device)),
            map_tensors(targets, lambda tensor: tensor.detach().to(device)),
        )


def items_of(data: Any) -> Iterable[Any]:
    """Return `data` as an iterable of batches, as they were given: it is one batch, or has them.

    A batch is an `(inputs, targets)` pair, or inputs alone where no labels are needed or the model
    takes them itself: a tensor, a dict of keywords, or a sequence of one tensor. A tuple or list
    of two is one pair where its first item is a tensor or a dict, or its second a tensor;
    otherwise, as is a list of two dicts, it is an iterable.

    Raises:
        DataError: it is neither.
    """
    if _is_pair(data) or isinstance(data, Tensor | Mapping):
        return [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(
            "data must be an (inputs, targets) pair, inputs alone (a tensor or a dict), or an "
            f"iterable of them, such as a DataLoader; got {type(data).__name__}."
        )
    return data


def _parts(item: Any, position: int) -> tuple[Any, Any]:
    """Return inputs and targets, None where there are none, of an item of the data."""
    if isinstance(item, Tensor | Mapping):
        return item, None
    if isinstance(item, tuple | list) and len(item) == 1 and isinstance(item[0], Tensor | Mapping):
        return item[0], None
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(
        f"batch {position} of the data is a {type(item).__name__}{size}, not an (inputs, targets) "
        "pair, and neither a tensor nor a dict of inputs."
    )


def _is_pair(data: Any) -> bool:
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return False
    inputs, targets = data
    if isinstance(data, list) and isinstance(inputs, Mapping) and isinstance(targets, Mapping):
        return False
    return isinstance(inputs, Tensor | Mapping) or isinstance(targets, Tensor)
