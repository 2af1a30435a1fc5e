"""Adversarial-robustness-toolbox (extra `attacks`), kept from changing the model it attacks."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockprune.errors import DataError, MeasurementError, MissingExtraError
from blockprune.modes import in_mode
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.robustness.normalising import device_of, dtype_of, logits_of
from blockprune.robustness.projecting import within
from blockprune.robustness.record import AttackChoice

__all__ = ["Run", "attackable", "library", "with_gradient"]


def library(module: str) -> Any:
    """Return a module of the library; `MissingExtraError` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            "Attacks need adversarial-robustness-toolbox, which is not installed: "
            "pip install 'blockprune[attacks]'"
        ) from error


@contextmanager
def attackable(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with gradients of images only, seeded, in evaluation mode; all as before on leaving."""
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        seed_rng(seed)
        stack.enter_context(in_mode(False, model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            # The library calls backward, which must leave no gradient in the weights.
            for parameter in needed:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, need in needed.items():
                parameter.requires_grad_(need)


def with_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """Return the logits as a function of the images, with a gradient of zero where they have none.

    A model may cut its graph, as one does that makes its images whole numbers; to an attack that
    is the same as one whose gradient is zero.
    """
    return logits + (0 * images).flatten(1).sum(1, keepdim=True)


class Run:
    """One attack on one batch of images: the library's view of the model, and the bounds."""

    def __init__(
        self,
        model: nn.Module,
        clean: Tensor,
        labels: Tensor,
        choice: AttackChoice,
        epsilon: float,
        batch_size: int,
    ) -> None:
        self.model = model
        self.clean = clean
        self.labels = labels
        self.choice = choice
        self.epsilon = epsilon
        self.batch_size = min(batch_size, len(clean))
        self.classes = logits_of(model, clean[:1]).shape[1]
        if self.classes < 2:
            raise MeasurementError(
                f"An attack turns one class into another; the model has {self.classes}."
            )
        if int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise DataError(
                f"Labels lie in [{int(labels.min())}, {int(labels.max())}]; the model has the "
                f"classes 0 to {self.classes - 1}."
            )
        self.methods = library("art.attacks.evasion")
        self.estimator = self._estimator()

    def _estimator(self) -> Any:
        estimators = library("art.estimators.classification")
        device = self.clean.device
        if device.type not in ("cpu", "cuda"):
            raise MeasurementError(
                f"adversarial-robustness-toolbox attacks on CPU and CUDA; the model is on {device}."
            )
        return estimators.PyTorchClassifier(
            model=_Shielded(self.model),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(self.clean.shape[1:]),
            nb_classes=self.classes,
            clip_values=(0.0, 1.0),
            device_type="cpu" if device.type == "cpu" else "gpu",
        )

    def generate(self, method: Any, rows: Tensor | None = None) -> Tensor:
        """Return what an attack of the library makes of the clean images, unbounded."""
        chosen = slice(None) if rows is None else rows
        pixels = self.clean[chosen].float().cpu().numpy()
        right = self.labels[chosen].cpu().numpy().astype(np.int64)
        with warnings.catch_warnings():
            # What the library's own dependencies will change one day.
            warnings.simplefilter("ignore")
            made = method.generate(x=pixels, y=right)
        return torch.from_numpy(made).to(self.clean.device)

    def bounded(self, method: Any, rows: Tensor | None = None) -> Tensor:
        """Return what an attack of the library makes, within epsilon and [0, 1]."""
        clean = self.clean if rows is None else self.clean[rows]
        return within(clean, self.generate(method, rows), self.epsilon)

    def right(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return which of the images, those of ``rows``, the model gets right."""
        decided = logits_of(self.model, images, batch_size=self.batch_size).argmax(dim=1)
        return decided == self.labels[rows]


class _Shielded(nn.Module):
    """The model behind a call: the library takes a `Sequential` apart and changes its mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a list, so that moving or training this module leaves the model alone.
        self._held = [model]

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self._held
        # The library knows no device but the current one.
        logits: Tensor = model(images.to(device_of(model), dtype_of(model)))
        return with_gradient(logits.to(images.device, torch.float32), images)
