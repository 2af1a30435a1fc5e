"""The exponential moving average of a model's weights, kept beside them while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Averages", "wide"]


class Averages:
    """``a <- decay * a + (1 - decay) * w`` after each step, for every entry of the state.

    Statistics of normalisation layers are averaged like weights, so that they fit them; counts
    and other whole numbers are taken as they are. Averages of weights of less than 32 bits are
    kept in 32: small steps would be lost to rounding.

    Args:
        model: the one that trains.
        decay: inside (0, 1).
        start: averages to go on from; the model's own weights if None.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(
        self, model: nn.Module, decay: float, start: Mapping[str, Tensor] | None = None
    ) -> None:
        self._model = model
        self._decay = decay
        own = _tensors(model)
        self.values = {
            name: wide(tensor.detach() if start is None else start[name].to(tensor.device)).clone()
            for name, tensor in own.items()
        }

    def update(self) -> None:
        """Take one step of the model in."""
        # Asked for anew each time: a module may replace a buffer instead of writing to it.
        own = _tensors(self._model)
        moving = [name for name, tensor in own.items() if _is_averaged(tensor)]
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.values[name] for name in moving],
                [wide(own[name]) for name in moving],
                1 - self._decay,
            )
        for name in own.keys() - set(moving):
            self.values[name].copy_(own[name])

    def fill_in(self) -> None:
        """Put the averages in place of the model's weights."""
        self._model.load_state_dict({**self._model.state_dict(), **self.values})

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in place of the model's weights for a while."""
        own = {name: tensor.clone() for name, tensor in _tensors(self._model).items()}
        self.fill_in()
        try:
            yield
        finally:
            self._model.load_state_dict({**self._model.state_dict(), **own})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # A module may also keep other things in its state.
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the type that its average has: floats of at least 32 bits."""
    low = tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    return tensor.float() if low else tensor
