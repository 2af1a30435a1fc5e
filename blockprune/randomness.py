"""The random state of the process: left as found, or set as a whole."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

__all__ = [
    "RANDOM_OPERATIONS",
    "AlikeDraws",
    "LayoutFreeDraws",
    "RngState",
    "preserved_rng",
    "rng_state",
    "seed_rng",
    "set_rng_state",
]

RANDOM_OPERATIONS = frozenset(
    {
        "alpha_dropout",
        "alpha_dropout_",
        "bernoulli",
        "bernoulli_",
        "binomial",
        "cauchy_",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "dropout_",
        "exponential_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
        "feature_dropout",
        "feature_dropout_",
        "fractional_max_pool2d",
        "fractional_max_pool2d_with_indices",
        "fractional_max_pool3d",
        "fractional_max_pool3d_with_indices",
        "geometric_",
        "gru",
        "gumbel_softmax",
        "log_normal_",
        "lstm",
        "multi_head_attention_forward",
        "multinomial",
        "native_dropout",
        "normal",
        "normal_",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "random_",
        "randperm",
        "rnn_relu",
        "rnn_tanh",
        "rrelu",
        "rrelu_",
        "scaled_dot_product_attention",
        "uniform_",
    }
)
"""Names of the functions of torch that may draw from its generators."""


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the generators of torch (CPU and CUDA), numpy and ``random`` on leaving.

    CUDA's are looked at only where CUDA is in use already: to ask for them would start it.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with preserved_rng():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@dataclass(frozen=True)
class RngState:
    """The states of all generators."""

    cpu: Tensor
    cuda: list[Tensor]
    python: Any
    legacy_numpy: Any


def rng_state() -> RngState:
    """Return the state of every generator that `preserved_rng` restores."""
    return RngState(
        cpu=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if _cuda_in_use() else [],
        python=random.getstate(),
        legacy_numpy=np.random.get_state(),
    )


def set_rng_state(state: RngState) -> None:
    """Put every generator in a state that `rng_state` returned."""
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
    random.setstate(state.python)
    np.random.set_state(state.legacy_numpy)


def seed_rng(seed: int) -> None:
    """Seed every generator that :func:`preserved_rng` restores.

    ``torch.manual_seed`` is not used: where CUDA has not started it leaves an order to seed
    CUDA later, which nothing could take back.

    Args:
        seed: any integer; numpy's generator takes it modulo 2**32.
    """
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class LayoutFreeDraws(TorchFunctionMode):
    """Make what a random operation draws independent of how its argument lies in memory.

    Dropout draws in the order of memory, so equal tensors in another order (channels last) would
    lose other elements.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in RANDOM_OPERATIONS or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        given = args[0]
        if given.is_contiguous():
            return func(*args, **kwargs)
        drawn = func(given.contiguous(), *args[1:], **kwargs)
        if name.endswith("_") or kwargs.get("inplace", False):
            return given.copy_(drawn)
        return drawn


class AlikeDraws(LayoutFreeDraws):
    """Make what is drawn during a call of a function of torch depend on its name and shape alone.

    Modules that draw in another way (from the generators of Python or numpy, say) draw alike where
    they are among `names`, for the time in which this mode is on.

    Args:
        names: module to the name that says what it draws.
    """

    def __init__(self, names: Mapping[nn.Module, str] | None = None) -> None:
        super().__init__()
        self.names = names or {}

    def __enter__(self) -> AlikeDraws:
        self._hook = register_module_forward_pre_hook(self._seed)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def _seed(self, module: nn.Module, args: Any) -> None:
        if module in self.names:
            seed_rng(zlib.crc32(self.names[module].encode()))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":  # reading a property, such as a shape
            seed_rng(zlib.crc32(f"{name} {_shape_of(args[0]) if args else ()}".encode()))
        return super().__torch_function__(func, types, args, kwargs)


def _shape_of(argument: Any) -> Any:
    """Return the shape of a tensor, or sizes that are given as such; else nothing."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape)
    sizes = argument if isinstance(argument, tuple | list) else (argument,)
    return tuple(sizes) if all(isinstance(size, int) for size in sizes) else ()
