"""What modules return while the model runs, in graphs that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from blockprune.tracing import map_tensors, tensors_in

__all__ = ["LayerOutput", "Watch", "modules_around", "sample_axis"]

Result = TypeVar("Result")


class LayerOutput(NamedTuple):
    """What one call of a module returned: the first floating-point tensor, and its version."""

    module: nn.Module
    tensor: Tensor
    version: int

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody has written into it since."""
        return bool(self.tensor._version != self.version)


class Watch:
    """Runs the model and keeps what some of its modules return, as they return it.

    Attributes:
        modules: those it looks at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._overwritten: set[nn.Module] = set()

    def run(self, function: Callable[[], Result]) -> tuple[Result, list[LayerOutput]]:
        """Return what `function` returns, and the modules' outputs in order of the calls.

        It is called again where an operation writes into an output: that gets a copy to write into.
        """
        while True:
            found: list[LayerOutput] = []
            handles = [m.register_forward_hook(partial(self._note, found)) for m in self.modules]
            try:
                result = function()
            finally:
                for handle in handles:
                    handle.remove()
            changed = {output.module for output in found if output.is_overwritten}
            if not changed:
                return result, found
            self._overwritten |= changed

    def _note(self, found: list[LayerOutput], module: nn.Module, args: Any, output: Any) -> Any:
        tensor = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if tensor is None:
            return None
        # A copy in general would cost the memory of all outputs once more.
        kept = tensor.clone() if module in self._overwritten else tensor
        found.append(LayerOutput(module, kept, kept._version))
        if kept is tensor:
            return None
        return map_tensors(output, lambda other: kept.clone() if other is tensor else other)


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the module that owns the parameter of that name, and those around it, outwards."""
    modules = []
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        # What a parametrization returns is the weight.
        if not isinstance(module, ParametrizationList):
            modules.append(module)
    return modules


def sample_axis(two: Tensor, three: Tensor) -> int | None:
    """Return the axis along which samples follow one another, from passes of two and three.

    Where an axis holds several rows of each sample, such as windows of an image, these may be in
    either order: in the right one, the longer pass begins with what the shorter one is.
    """
    if two.dim() != three.dim():
        return None
    axes = [axis for axis in range(two.dim()) if two.shape[axis] != three.shape[axis]]
    if len(axes) != 1 or two.shape[axes[0]] * 3 != three.shape[axes[0]] * 2:
        return None
    difference = three.narrow(axes[0], 0, two.shape[axes[0]]) - two
    is_same = difference.norm() <= torch.finfo(two.dtype).eps ** 0.5 * two.norm()
    return axes[0] if bool(is_same) else None
