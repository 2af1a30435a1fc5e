"""How a module is run when it is measured: number format, memory layout, compiled or not.

What is asked for is done to a copy. The module itself is measured, untouched, where nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockprune.errors import MeasurementError
from blockprune.profiling.arguments import Arguments
from blockprune.tracing import copy_model

__all__ = ["Execution", "recompiling"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_ENOUGH_VERSIONS = 10_000


@dataclass(frozen=True)
class Execution:
    """How a module is run.

    Attributes:
        channels_last: images and weights of convolutions lie in memory channels last.
        dtype: of parameters, buffers and inputs that are floating-point; None: their own.
        compile: by ``torch.compile``, for each batch size anew.

    Raises:
        MeasurementError: `dtype` is not a floating-point format.

    Example:
        >>> import torch
        >>> from blockprune.profiling import Execution, measure_latency
        >>> half = Execution(dtype=torch.bfloat16)
        >>> model = torch.nn.Linear(4, 2)
        >>> [one] = measure_latency(model, torch.zeros(1, 4), repeats=3, execution=half)
        >>> model.weight.dtype
        torch.float32
    """

    channels_last: bool = False
    dtype: torch.dtype | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        dtype = self.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise MeasurementError(
                f"dtype must be a floating-point format such as torch.bfloat16, got {dtype!r}."
            )

    def __str__(self) -> str:
        asked = [
            "channels last" if self.channels_last else "",
            str(self.dtype).removeprefix("torch.") if self.dtype else "",
            "compiled" if self.compile else "",
        ]
        return ", ".join(filter(None, asked))

    def check(self, device: torch.device) -> None:
        """Try the compiler of a device, where one is asked for.

        Raises:
            MeasurementError: it does not work; its error is quoted.
        """
        if self.compile and (failure := _compiler_failure(device)):
            raise MeasurementError(
                f"compile was asked for, and torch.compile does not work on {device.type} here: "
                f"{failure} Install the compiler it asks for (a C++ compiler such as g++ for the "
                "CPU, triton for a GPU), or leave compile out."
            )

    def converted(self, model: nn.Module, *, dtype: bool = True) -> nn.Module:
        """Return the module in the format asked for, not compiled yet: a copy, if it changes.

        Args:
            model: stays as it is.
            dtype: False leaves the number format out.
        """
        to_dtype = self.dtype if dtype else None
        if not self.channels_last and to_dtype is None:
            return model
        copied = copy_model(model)
        if to_dtype is not None:
            copied.to(to_dtype)
        if self.channels_last:
            for tensor in (*copied.parameters(), *copied.buffers()):
                tensor.data = _channels_last(tensor.data)
        return copied

    def inputs(
        self, arguments: Arguments, device: torch.device, *, dtype: bool = True
    ) -> Arguments:
        """Return the arguments of a converted module, on its device."""

        def convert(tensor: Tensor) -> Tensor:
            moved = tensor.to(device)
            if dtype and self.dtype is not None and moved.is_floating_point():
                moved = moved.to(self.dtype)
            return _channels_last(moved) if self.channels_last else moved

        converted: Arguments = pytree.tree_map_only(Tensor, convert, arguments)
        return converted

    def runnable(self, model: nn.Module) -> Any:
        """Return what is called in the place of a converted module."""
        # One size at a time: a version for any size would be another program.
        return torch.compile(model, dynamic=False) if self.compile else model


@contextmanager
def recompiling() -> Iterator[None]:
    """Let many modules and batch sizes be compiled, and none of them run uncompiled in silence.

    Past a number of versions of one piece of code, ``torch.compile`` goes back to running it
    as it is; the times would be those of something else than was asked for.
    """
    # Loads the compiler, which nobody else needs.
    import torch._dynamo.config as config

    with config.patch(
        recompile_limit=_ENOUGH_VERSIONS,
        accumulated_recompile_limit=_ENOUGH_VERSIONS,
        fail_on_recompile_limit_hit=True,
    ):
        yield


def _channels_last(tensor: Tensor) -> Tensor:
    layout = _CHANNELS_LAST.get(tensor.dim())
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


@cache
def _compiler_failure(device: torch.device) -> str:
    """Return why nothing can be compiled for a device; an empty text where something can."""
    try:
        torch.compile(nn.Softplus())(torch.zeros(8, device=device))
    # Whatever a broken tool chain raises.
    except Exception as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error's text, as a sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."
