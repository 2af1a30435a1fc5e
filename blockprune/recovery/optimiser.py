"""AdamW on any parameters: those of half precision have float32 twins that collect small steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.recovery.distillation import Distillation

__all__ = ["Optimiser"]


class Optimiser:
    """Takes the steps of a recipe.

    Args:
        parameters: that are trained.
        recipe: weight decay, and the longest gradient.
        accelerator: scales losses where its precision needs that.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        recipe: Distillation,
        accelerator: Accelerator | None,
    ) -> None:
        self._parameters, self._longest = parameters, recipe.max_grad_norm
        self._accelerator = accelerator
        self._wide = [_widened(parameter) for parameter in parameters]
        self._adam = torch.optim.AdamW(self._wide, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self._prepared: Any = self._adam
        if accelerator is not None:
            self._prepared = accelerator.prepare_optimizer(self._adam)

    def step(self, loss: Tensor, rate: float) -> None:
        """Lower a loss by one step at a learning rate."""
        if self._accelerator is None:
            torch.autograd.backward(loss)
        else:
            self._accelerator.backward(loss)
        for own, wide in zip(self._parameters, self._wide, strict=True):
            if own is not wide:
                wide.grad = None if own.grad is None else own.grad.to(wide.dtype)
        if self._accelerator is not None:
            self._accelerator.unscale_gradients(self._prepared)
        torch.nn.utils.clip_grad_norm_(self._wide, self._longest)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._prepared.step()
        with torch.no_grad():
            for own, wide in zip(self._parameters, self._wide, strict=True):
                if own is not wide:
                    own.copy_(wide)
                own.grad = wide.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on, by name."""
        found = {}
        for number, wide in enumerate(self._wide):
            if wide is not self._parameters[number]:
                found[f"{number}/wide"] = wide.detach()
            for name, value in self._adam.state[wide].items():
                found[f"{number}/{name}"] = torch.as_tensor(value)
        scaler = self._scaler()
        if scaler is not None:
            for name, value in scaler.state_dict().items():
                found[f"scaler/{name}"] = torch.tensor(value, dtype=torch.float64)
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for number, wide in enumerate(self._wide):
            own = {
                name.partition("/")[2]: value
                for name, value in state.items()
                if name.partition("/")[0] == str(number)
            }
            kept = own.pop("wide", None)
            if kept is not None:
                with torch.no_grad():
                    wide.copy_(kept)
            if own:
                # AdamW counts its steps on the CPU.
                self._adam.state[wide] = {
                    name: value if name == "step" else value.to(wide.device)
                    for name, value in own.items()
                }
        scaler = self._scaler()
        if scaler is not None:
            known = scaler.state_dict()
            scaler.load_state_dict(
                {name: type(value)(state[f"scaler/{name}"].item()) for name, value in known.items()}
            )

    def _scaler(self) -> Any:
        return None if self._accelerator is None else self._accelerator.scaler


def _widened(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype.itemsize >= torch.float32.itemsize:
        return parameter
    return nn.Parameter(parameter.detach().float())
