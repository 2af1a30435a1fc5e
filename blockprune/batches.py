"""Batches: what scoring and recovery read, and how a user's data become them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import DataError, TraceError, raise_if_out_of_memory
from blockprune.randomness import preserved_rng
from blockprune.tracing import Call, as_call, isolated, map_tensors, structural_copy, tensors_in

__all__ = ["Batch", "Replay", "batches_of", "device_of", "example_of", "first_inputs", "items_of"]

# Two samples show what belongs to the batch; more of them would cost time and show no more.
EXAMPLE_SIZE = 2


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


def first_inputs(model: nn.Module, data: Any) -> tuple[Call, Any]:
    """Return a few first inputs of `data` as a call on the model's device, and data to use instead.

    They are those of `example_of` the first batch. An iterator is read once only, so what was
    looked at is put back in front; anything else is read from its start again, and a shuffling
    loader gives the same order then.

    Raises:
        DataError: there is no batch, or the first is not an `(inputs, targets)` pair.
    """
    with preserved_rng():
        if isinstance(data, Iterator):
            looked_at: Any = list(itertools.islice(data, 1))
            data = itertools.chain(looked_at, data)
        else:
            looked_at = data
        batch = next(batches_of(model, looked_at, device_of(model)), None)
    if batch is None:
        raise DataError("The data is empty: at least one batch is needed.")
    return example_of(model, batch), data


def example_of(model: nn.Module, batch: Batch) -> Call:
    """Return the first two samples of a batch, enough for an analysis and for its proof.

    The whole batch where the model does not run on two.
    """
    few = batch.part(0, EXAMPLE_SIZE).call
    return few if len(batch) > EXAMPLE_SIZE and _runs(model, few) else batch.call


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, the CPU where there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether a copy of the model takes these arguments."""
    inputs = call.map(lambda tensor: tensor.clone())
    with isolated(), torch.no_grad():
        try:
            structural_copy(model).eval()(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise_if_out_of_memory(error)
            return False
    return True


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
