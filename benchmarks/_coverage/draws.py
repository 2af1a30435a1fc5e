"""Random draws that agree between two models of which one draws less often.

Every torch operation starts from a seed made of its name and of the shape it is given, so that
what two models both draw is drawn equally, wherever it stands in the order of execution. Draws fill
memory in its own order, so a tensor in another layout is drawn for as if it were contiguous.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["fixed_draws", "seeded"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators; put them back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def fixed_draws(salt: int = 0) -> Iterator[None]:
    """Make every draw of torch a function of the operation, the shape and `salt`."""
    with seeded(salt), _SeedEach(salt):
        yield


# Operations whose draws follow the layout of their first argument: a new result, or in place.
_LIKE = frozenset(
    {
        "alpha_dropout",
        "bernoulli",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_alpha_dropout",
        "rand_like",
        "randn_like",
        "rrelu",
    }
)
_INTO = frozenset({"bernoulli_", "dropout_", "exponential_", "normal_", "uniform_"})


class _SeedEach(TorchFunctionMode):
    def __init__(self, salt: int) -> None:
        super().__init__()
        self.salt = salt

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Reading an attribute of a tensor draws nothing, and happens all the time.
        if name != "__get__":
            text = f"{self.salt} {name} {_shape(args)}"
            torch.default_generator.manual_seed(zlib.crc32(text.encode()))
        if args and isinstance(args[0], Tensor) and not args[0].is_contiguous():
            first, rest = args[0], args[1:]
            if name in _LIKE:
                result = func(first.contiguous(), *rest, **kwargs)
                is_in_place = kwargs.get("inplace") or (len(rest) > 2 and rest[2] is True)
                return first.copy_(result) if is_in_place else result
            if name in _INTO:
                return first.copy_(func(first.contiguous(), *rest, **kwargs))
        return func(*args, **kwargs)


def _shape(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape of the first tensor, else the sizes that a factory is asked for."""
    for value in args:
        if isinstance(value, Tensor):
            return tuple(value.shape)
    sizes = args[0] if args and isinstance(args[0], tuple | list) else args
    return tuple(size for size in sizes if isinstance(size, int))
