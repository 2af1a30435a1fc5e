"""One step of training, ready to be repeated: forward, loss, backward, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import MeasurementError
from blockprune.losses import class_axis, cross_entropy, main_output, own_loss
from blockprune.profiling.arguments import Arguments, device_of
from blockprune.profiling.execution import Execution, first_line
from blockprune.tracing import copy_model

__all__ = ["OutputLoss", "TrainingStep"]

OutputLoss = Callable[[Any], Tensor]
"""From what a model returns to the number to make small."""


class TrainingStep:
    """A step of stochastic gradient descent with momentum, on a copy of a module in train mode.

    The learning rate is 0: the work is the same, and weights trained on meaningless labels cannot
    grow until they slow the arithmetic down. With a number format asked for, the forward and the
    loss run under ``torch.autocast``, the weights as they are, as in mixed-precision training.

    Args:
        name: of the module, for errors.
        model: stays as it is.
        batch: its arguments.
        loss_fn: of the module's output. None: the loss that the output brings along, else cross
            entropy of its first floating-point tensor with labels of zeros, else its mean where
            that tensor has no axis of classes.
        execution: as the module is measured.

    Raises:
        MeasurementError: nothing of the module can be trained.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batch: Arguments,
        loss_fn: OutputLoss | None,
        execution: Execution,
    ) -> None:
        self.name = name
        self.model = copy_model(execution.converted(model, dtype=False)).train()
        self.device = device_of(model)
        self.inputs = execution.inputs(batch, self.device, dtype=False)
        self._run = execution.runnable(self.model)
        self._loss_fn = loss_fn or _default_loss
        self._dtype = execution.dtype
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            raise MeasurementError(f"{name} has no parameter that requires a gradient to train.")
        self.optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, nesterov=True)

    def __call__(self) -> None:
        """Take one step; gradients are gone before the forward and kept after the step."""
        self.optimizer.zero_grad(set_to_none=True)
        positional, named = self.inputs
        with torch.enable_grad():
            with self._autocast():
                loss = self._loss_fn(self._run(*positional, **named))
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def refused(self, error: Exception) -> MeasurementError:
        """Return the error for a step that fails, quoting its own."""
        if isinstance(error, torch.OutOfMemoryError):
            return MeasurementError(
                f"{self.name} does not fit in the memory of the device when it trains: {error}"
            )
        return MeasurementError(
            f"{self.name} does not train on the example inputs: {first_line(error)} Pass inputs "
            "that its forward takes in train mode (batch normalisation needs more than one value "
            "a channel), or a loss_fn of what it returns."
        )

    def _autocast(self) -> Any:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)


def _default_loss(outputs: Any) -> Tensor:
    own = own_loss(outputs)
    if own is not None:
        return own
    logits = main_output(outputs)
    if logits.dim() < 2:
        return logits.mean()
    shape = list(logits.shape)
    del shape[class_axis(logits)]
    return cross_entropy(logits, torch.zeros(shape, dtype=torch.int64, device=logits.device))
