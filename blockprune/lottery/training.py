"""A training loop that knows nothing of pruning: a model, data and a recipe go in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from blockprune.data import make_loader, size_of
from blockprune.errors import TrainingDivergedError
from blockprune.lottery.recipe import Recipe
from blockprune.modes import in_mode
from blockprune.randomness import preserved_rng, seed_rng

__all__ = [
    "EpochRecord",
    "Evaluation",
    "History",
    "LossFunction",
    "Step",
    "evaluate",
    "train",
    "train_epochs",
]

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """Where a run stands after one step of the optimiser; every count is 1-based."""

    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training data.

    Attributes:
        epoch: 1-based.
        loss: mean over the samples, each taken before the step that used it.
        accuracy: share of those samples classified correctly, in [0, 1].
        seconds: wall-clock time of the pass, evaluation not included.
        test_accuracy: in [0, 1]; None where this epoch was not evaluated.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    test_accuracy: float | None = None


@dataclass(frozen=True)
class History:
    """What happened, epoch by epoch."""

    epochs: tuple[EpochRecord, ...]

    @property
    def seconds(self) -> float:
        """Wall-clock time spent training, evaluation not included."""
        return sum(record.seconds for record in self.epochs)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (share in [0, 1]) over ``samples`` samples."""

    loss: float
    accuracy: float
    samples: int


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    recipe: Recipe,
    *,
    test: Dataset[Any] | None = None,
    loss_fn: LossFunction = functional.cross_entropy,
    on_step: Callable[[Step], None] | None = None,
    accelerator: Accelerator | None = None,
) -> History:
    """Train ``model`` in place and return what happened.

    The order of the data and everything drawn while training (dropout, augmentation)
    depends on ``(recipe.seed, epoch)`` alone; the global generators come back as they
    were. The model ends on the accelerator's device, its modules in the modes they had.

    Args:
        model: maps a batch of inputs to logits ``(N, classes)``.
        dataset: map-style, of ``(input, label)``.
        recipe: see :class:`Recipe`. Under data parallelism each process takes batches
            of ``recipe.batch_size``.
        test: evaluated after every epoch, outside the time measured.
        loss_fn: maps ``(logits, labels)`` to the batch's mean loss.
        on_step: called after each step, for a progress display.
        accelerator: device, mixed precision, parallelism; accelerate's defaults if None.

    Returns:
        :class:`History`, one record per epoch.

    Raises:
        DataError: a data set is empty or has no length.
        TrainingDivergedError: the loss is not finite; epoch and iteration are named. The
            weights are then those that gave this loss.

    Example:
        >>> from blockprune.data import load_digits
        >>> from blockprune.lottery.recipe import Recipe
        >>> from blockprune.lottery.training import train
        >>> from blockprune.models import resnet20
        >>> data = load_digits()
        >>> history = train(resnet20(in_channels=1), data.test, Recipe(epochs=1))
        >>> len(history.epochs)
        1
    """
    epochs = train_epochs(
        model,
        dataset,
        recipe,
        test=test,
        loss_fn=loss_fn,
        on_step=on_step,
        accelerator=accelerator,
    )
    return History(tuple(epochs))


def train_epochs(
    model: nn.Module,
    dataset: Dataset[Any],
    recipe: Recipe,
    *,
    test: Dataset[Any] | None = None,
    loss_fn: LossFunction = functional.cross_entropy,
    on_step: Callable[[Step], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Generator[EpochRecord, None, None]:
    """Train ``model`` one epoch each time the next record is asked for.

    :func:`train` asks for all of them; several networks can also be trained in turns,
    which keeps their times comparable on a machine whose speed drifts. Between epochs
    modes and global generators are as the caller left them. Arguments, errors (the data
    sets are checked at once) and results are those of :func:`train`.

    Example:
        ``for record in train_epochs(model, data.train, recipe): print(record.loss)``
    """
    loader = make_loader(dataset, recipe.batch_size, seed=recipe.seed)
    if test is not None:
        size_of(test)
    return _epochs(model, loader, recipe, test, loss_fn, on_step, accelerator or Accelerator())


def _epochs(
    model: nn.Module,
    loader: DataLoader[Any],
    recipe: Recipe,
    test: Dataset[Any] | None,
    loss_fn: LossFunction,
    on_step: Callable[[Step], None] | None,
    accelerator: Accelerator,
) -> Generator[EpochRecord, None, None]:
    with _prepared(model, accelerator) as prepared:
        optimizer = accelerator.prepare_optimizer(_optimizer(model, recipe))
        batches = accelerator.prepare_data_loader(loader)
        run = _Run(prepared, optimizer, batches, recipe, loss_fn, accelerator, on_step)
        for epoch in range(recipe.epochs):
            with in_mode(True, prepared), preserved_rng():
                record = run.epoch(epoch)
            if test is not None:
                found = evaluate(
                    prepared,
                    test,
                    batch_size=recipe.batch_size,
                    loss_fn=loss_fn,
                    accelerator=accelerator,
                )
                record = replace(record, test_accuracy=found.accuracy)
            yield record


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 256,
    loss_fn: LossFunction = functional.cross_entropy,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Return the mean loss and the accuracy of ``model`` in evaluation mode.

    Under data parallelism the accuracy is exact; the loss of the last batch includes the
    samples that were repeated to give every process the same number.

    Args:
        model: maps a batch of inputs to logits ``(N, classes)``; moved to the
            accelerator's device, unchanged otherwise.
        dataset: map-style, of ``(input, label)``.
        batch_size: samples a forward pass.
        loss_fn: maps ``(logits, labels)`` to the batch's mean loss.
        accelerator: accelerate's defaults if None.

    Raises:
        DataError: the data set is empty or has no length, or ``batch_size`` < 1.

    Example:
        ``evaluate(model, data.test).accuracy``
    """
    loader = make_loader(dataset, batch_size)
    accelerator = accelerator or Accelerator()
    losses, hits, samples = 0.0, 0, 0
    with in_mode(False, model), torch.no_grad():
        model.to(accelerator.device)
        for inputs, labels in accelerator.prepare_data_loader(loader):
            with accelerator.autocast():
                logits = model(inputs)
                loss = loss_fn(logits, labels)
            # Processes are given copies of samples to even out their batches; these
            # must not be counted twice.
            counts = torch.stack([loss.float().expand(len(labels)), _hits(logits, labels)], dim=1)
            gathered = accelerator.gather_for_metrics(counts)
            losses += gathered[:, 0].sum().item()
            hits += int(gathered[:, 1].sum().item())
            samples += len(gathered)
    return Evaluation(losses / samples, hits / samples, samples)


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Any
    recipe: Recipe
    loss_fn: LossFunction
    accelerator: Accelerator
    on_step: Callable[[Step], None] | None

    def epoch(self, epoch: int) -> EpochRecord:
        """Take every step of one epoch (0-based)."""
        self.batches.set_epoch(epoch)
        seed_rng((self.recipe.seed * 1_000_003 + epoch) * 1_009 + self.accelerator.process_index)
        totals = torch.zeros(3, dtype=torch.float64)
        start = time.perf_counter()
        for iteration, (inputs, labels) in enumerate(self.batches):
            loss, hits = self._step(epoch, iteration, inputs, labels)
            totals += torch.tensor([loss * len(labels), hits, len(labels)], dtype=torch.float64)
        seconds = time.perf_counter() - start
        loss_sum, hit_sum, samples = self._over_processes(totals)
        return EpochRecord(epoch + 1, loss_sum / samples, hit_sum / samples, seconds)

    def _step(self, epoch: int, iteration: int, inputs: Any, labels: Tensor) -> tuple[float, float]:
        done = epoch * len(self.batches) + iteration
        rate = self.recipe.learning_rate(done, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            logits = self.model(inputs)
            loss = self.loss_fn(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"The loss is {value} at epoch {epoch + 1} of {self.recipe.epochs}, iteration "
                f"{iteration + 1} of {len(self.batches)}, learning rate {rate:.3g}. A lower lr, "
                "a longer warm-up, or inputs without NaN or infinity would help."
            )
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.on_step is not None:
            self.on_step(
                Step(epoch + 1, self.recipe.epochs, iteration + 1, len(self.batches), value)
            )
        return value, _hits(logits, labels).sum().item()

    def _over_processes(self, totals: Tensor) -> list[float]:
        summed: Tensor = self.accelerator.reduce(
            totals.to(self.accelerator.device, torch.float32), reduction="sum"
        )
        values: list[float] = summed.tolist()
        return values


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == labels).float()


@contextmanager
def _prepared(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    # accelerate leaves attributes on the model (a mark that it was prepared, under mixed
    # precision a replaced forward) which would mislead the next run and follow copies.
    known = set(vars(model))
    prepared: nn.Module = accelerator.prepare_model(model)
    try:
        yield prepared
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        for name in set(vars(model)) - known:
            delattr(model, name)
