"""Tensors without numbers on a kind of device that need not be there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import _get_current_function_mode

__all__ = ["DEVICES", "Elsewhere"]

DEVICES = ("cpu", "cuda")
"""Kinds of devices that torch can pretend to have anywhere."""


class Elsewhere:
    """Moves tensors and models to a kind of device, where they lose their numbers."""

    def __init__(self, kind: str) -> None:
        self.mode, self.device = FakeTensorMode(allow_non_fake_inputs=True), torch.device(kind)
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor like this one; the same one for the same one."""
        if id(tensor) not in self._moved:
            bare = tensor.detach().to("meta")
            convert = self.mode.fake_tensor_converter.from_meta_and_device
            found: Tensor = convert(self.mode, bare, self.device)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, tensor.requires_grad)
            self._moved[id(tensor)] = tensor, found
        return self._moved[id(tensor)][1]

    def model(self, model: nn.Module) -> nn.Module:
        """Return `model`, which is changed: its weights are moved."""
        for module in model.modules():
            registries: Any = module._parameters, module._buffers
            for tensors in registries:
                for name, tensor in tensors.items():
                    tensors[name] = None if tensor is None else self.tensor(tensor)
        return model

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Compute there, with devices read in a way that a mode for functions of torch sees."""
        holder: Any = FakeTensor
        own = vars(holder)["device"]

        def device(tensor: Tensor) -> Any:
            is_watched = _get_current_function_mode() is not None  # type: ignore[no-untyped-call]
            reader: Any = Tensor.device if is_watched else own
            return reader.__get__(tensor)

        holder.device = property(device)
        try:
            with self.mode:
                yield
        finally:
            holder.device = own
