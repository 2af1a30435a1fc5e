"""Losses: a number from what a model returns, whatever form that has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blockprune.errors import CriterionError, DataError, raise_if_out_of_memory
from blockprune.tracing import tensors_in

__all__ = [
    "LossFunction",
    "class_axis",
    "cross_entropy",
    "divided",
    "loss_of",
    "main_output",
    "own_loss",
]

LossFunction = Callable[[Any, Any], Tensor]

# torch's own convention for positions without a label.
IGNORED_LABEL = -100


def main_output(outputs: Any) -> Tensor:
    """Return the first floating-point tensor of a model's output, however nested, but its loss.

    Raises:
        CriterionError: there is none.

    Example:
        >>> import torch
        >>> main_output({"mask": torch.tensor([True]), "logits": torch.tensor([[2.0]])})
        tensor([[2.]])
    """
    own = own_loss(outputs)
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point() and tensor is not own:
            found: Tensor = tensor
            return found
    raise CriterionError(
        f"The model's output ({type(outputs).__name__}) holds no floating-point tensor to take "
        "a loss of. Pass a loss_fn that knows what to do with it."
    )


def divided(outputs: Any, divisor: float) -> Any:
    """Divide every floating-point tensor of a nested output; types are kept."""
    if isinstance(outputs, Tensor):
        return outputs / divisor if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        entries: Any = copy.copy(outputs)
        for key, value in outputs.items():
            entries[key] = divided(value, divisor)
        return entries
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        record = copy.copy(outputs)
        for field in dataclasses.fields(outputs):
            # Frozen dataclasses refuse setattr; this is a fresh copy.
            object.__setattr__(record, field.name, divided(getattr(outputs, field.name), divisor))
        return record
    if isinstance(outputs, list):
        return [divided(value, divisor) for value in outputs]
    if isinstance(outputs, tuple):
        values = [divided(value, divisor) for value in outputs]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else tuple(values)
    return outputs


def own_loss(outputs: Any) -> Tensor | None:
    """Return the loss that a model computed itself from labels among its inputs, else None.

    That is the entry or attribute `loss` of its output, where it is a tensor of one element.
    """
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def loss_of(loss_fn: LossFunction | None, outputs: Any, targets: Any) -> Tensor:
    """Return the loss of what a model returned, a tensor of one element.

    Args:
        loss_fn: the user's; None: the loss that the model returns itself, having been given labels
            among its inputs, else cross entropy of its main output.
        outputs: the model's.
        targets: of the batch.

    Raises:
        CriterionError: the loss function fails, or returns something else; or there are no labels
            for the default loss.
        DataError: the targets do not suit the default loss.
    """
    if loss_fn is None:
        loss = own_loss(outputs)
        return cross_entropy(main_output(outputs), targets) if loss is None else loss
    try:
        loss = loss_fn(outputs, targets)
    except Exception as error:
        raise_if_out_of_memory(error)
        raise CriterionError(
            f"loss_fn failed on an output of type {type(outputs).__name__}: "
            f"{type(error).__name__}: {error}. "
            "It is called as loss_fn(outputs, targets), with what the model returns."
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise CriterionError(f"The loss must be a tensor of one element, not {found}.")
    return loss


def class_axis(logits: Tensor) -> int:
    """Return the axis of the classes where no labels tell: sequence models put them last."""
    return -1 if logits.dim() <= 3 else 1


def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    """Return the mean cross entropy of logits with class labels, classes second or last.

    Raises:
        CriterionError: there are no labels.
        DataError: the targets are no class labels of these logits.
    """
    if targets is None:
        raise CriterionError(
            "The loss is cross entropy, which needs labels, and the batch has none. Pass data of "
            "(inputs, labels) pairs; inputs with which the model computes a loss of its own; a "
            "loss_fn; or take a criterion or a recipe that reads no labels."
        )
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"The default loss is cross entropy with integer class labels; the targets are {found}."
            " Pass the loss_fn that they are for."
        )
    if logits.dim() > 2 and _class_second(logits) != targets.shape == logits.shape[:-1]:
        # Sequence models put the classes last.
        logits = logits.movedim(-1, 1)
    classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
    labels = targets[targets != IGNORED_LABEL]
    # CUDA would answer a label out of range by an assertion that ends the process.
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise DataError(
            f"The targets hold class labels from {int(labels.min())} to {int(labels.max())}, and "
            f"the model's output has {classes} classes: labels go from 0 to {classes - 1}."
        )
    try:
        return functional.cross_entropy(logits, targets.long(), ignore_index=IGNORED_LABEL)
    except (RuntimeError, ValueError, IndexError) as error:
        raise_if_out_of_memory(error)
        raise DataError(
            f"Cross entropy of an output of shape {tuple(logits.shape)} with targets of shape "
            f"{tuple(targets.shape)} fails: {error}. Pass a loss_fn, or targets that are class "
            "labels of that output."
        ) from error


def _class_second(logits: Tensor) -> torch.Size:
    return torch.Size((logits.shape[0], *logits.shape[2:]))
