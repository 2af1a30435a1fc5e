"""The dense network and the cut one on the same batch: how far apart they are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from blockprune.batches import Batch
from blockprune.losses import LossFunction, class_axis, loss_of, main_output
from blockprune.recovery.data import weights_of
from blockprune.recovery.distillation import Distillation
from blockprune.recovery.gaps import Location
from blockprune.recovery.masks import Masks
from blockprune.recovery.networks import Networks
from blockprune.recovery.reach import watched
from blockprune.tracing import Call

__all__ = ["Pair"]

_TINY = 1e-30


class Pair:
    """Two networks, and which of their values are to become equal.

    Args:
        networks: are moved to the device of the accelerator, if there is one.
        places: value of the cut network to that of the dense one.
        masks: which positions count.
        call: an example.
        recipe: the weights of the terms of the loss.
        loss_fn: of the labels; None: see `loss_of`.
        accelerator: for its device and precision; None: those of the model.
    """

    def __init__(
        self,
        networks: Networks,
        places: Mapping[Location, Location],
        masks: Masks,
        call: Call,
        recipe: Distillation,
        loss_fn: LossFunction | None,
        accelerator: Accelerator | None,
    ) -> None:
        self._dense, self._cut = networks.dense, networks.cut
        self._places, self._masks, self._recipe = places, masks, recipe
        self._loss_fn = loss_fn
        self._accelerator = accelerator
        if accelerator is not None:
            networks.dense.model.to(accelerator.device)
            networks.cut.model.to(accelerator.device)
        example = self._moved(call)
        self._mask_of = {
            place: masks.name_for(example, partial(self._cut.value, place=place))
            for place in places
        }
        # Channels of a convolution are no positions.
        seen = watched(networks.cut, example).calls
        self._with_sinks = any(one.layout == "convolution" for one in seen)
        self._mask_of_outputs = masks.name_for(example, self._output)

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """Return what a step of the cut network lowers; see `Distillation`.

        `seed` is that of what the cut network draws.
        """
        recipe, call = self._recipe, self._moved(batch.call)
        with self._autocast():
            wanted, targets = self._dense.outputs_and_values(call, self._places.values())
            found, streams = self._cut.outputs_and_values(call, self._places, seed)
        loss = self._outputs(call, main_output(found), main_output(wanted))
        if self._places and recipe.stream:
            terms = [
                _share(*self._missing(call, streams[own][0], targets[other][0], self._mask_of[own]))
                for own, other in self._places.items()
            ]
            loss = loss + recipe.stream * torch.stack(terms).mean()
        if recipe.labels:
            loss = loss + recipe.labels * loss_of(self._loss_fn, found, batch.targets).reshape(())
        return loss

    def missing(self, batch: Batch, places: Mapping[Location, Location]) -> dict[Location, Tensor]:
        """Return, for each place of the cut network, the squared error and the size of its target.

        Both are sums over a batch, in evaluation mode.
        """
        call = self._moved(batch.call)
        with self._autocast():
            targets = self._dense.values(call, *places.values())
            streams = self._cut.values(call, *places)
        return {
            own: torch.stack(
                self._missing(call, streams[own][0], targets[other][0], self._mask_of[own])
            )
            for own, other in places.items()
        }

    def _output(self, call: Call) -> Tensor:
        return main_output(self._cut.outputs_and_values(call, ())[0])

    def _outputs(self, call: Call, found: Tensor, wanted: Tensor) -> Tensor:
        if self._recipe.outputs == "mse":
            return _share(*self._missing(call, found, wanted, self._mask_of_outputs, True))
        axis, temperature = class_axis(wanted), self._recipe.temperature
        divergences = functional.kl_div(
            (_wide(found) / temperature).log_softmax(axis),
            (_wide(wanted) / temperature).log_softmax(axis),
            reduction="none",
            log_target=True,
        ).sum(axis, keepdim=True)
        counts = self._weights(call, wanted, self._mask_of_outputs, True).expand_as(divergences)
        return temperature**2 * _share((counts * divergences).sum(), counts.sum())

    def _missing(
        self,
        call: Call,
        found: Tensor,
        wanted: Tensor,
        mask: str | None,
        with_sinks: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights = self._weights(
            call, wanted, mask, self._with_sinks if with_sinks is None else with_sinks
        )
        wanted = _wide(wanted)
        error = (weights * (_wide(found) - wanted) ** 2).sum()
        return error, (weights * wanted**2).sum()

    def _weights(self, call: Call, value: Tensor, mask: str | None, with_sinks: bool) -> Tensor:
        own = self._masks.of(call, mask)
        return _wide(weights_of(value, own, is_sequence=value.dim() == 3, with_sinks=with_sinks))

    def _moved(self, call: Call) -> Call:
        if self._accelerator is None:
            return call
        device = self._accelerator.device
        return call.map(lambda tensor: tensor.to(device))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._accelerator is None:
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[Any] = self._accelerator.autocast()
        return found


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in 32 bits at least: sums of half precision lose small terms."""
    return tensor.float() if tensor.dtype.itemsize < torch.float32.itemsize else tensor


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(_TINY)
