"""A training loop that knows nothing of pruning: a model, data and a recipe go in."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from blockprune.data import make_loader, size_of
from blockprune.errors import CheckpointError, TrainingDivergedError
from blockprune.lottery.averages import Averages
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.span import Span, span_of
from blockprune.lottery.state import TrainingState, copied, summary
from blockprune.lottery.steps import Step
from blockprune.modes import in_mode
from blockprune.randomness import preserved_rng, seed_rng

__all__ = [
    "EpochRecord",
    "Evaluation",
    "History",
    "LossFunction",
    "Progress",
    "evaluate",
    "train",
    "train_epochs",
]

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Progress:
    """Where a run stands after one step of the optimiser; every count is 1-based."""

    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training data, or the part of it that a run took.

    Attributes:
        epoch: 1-based.
        loss: mean over the samples, each taken before the step that used it.
        accuracy: share of those samples classified correctly, in [0, 1].
        seconds: wall-clock time of the pass; evaluations and ``on_state`` not included.
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
    start: TrainingState | None = None,
    stop: Step | None = None,
    keep: Iterable[Step] = (),
    on_state: Callable[[TrainingState], None] | None = None,
    test: Dataset[Any] | None = None,
    loss_fn: LossFunction = functional.cross_entropy,
    on_step: Callable[[Progress], None] | None = None,
    accelerator: Accelerator | None = None,
    workers: int = 0,
) -> History:
    """Train ``model`` in place and return what happened.

    The order of the data depends on ``(recipe.seed, epoch)`` alone, and everything drawn while
    training (dropout, augmentation) on that and the iteration; the global generators come back
    as they were. So training to a moment, saving the state and going on from it gives, on a CPU,
    the same weights bit for bit as not stopping. The model ends on the accelerator's device, its
    modules in the modes they had, with the averaged weights where the recipe has ``ema_decay``.

    Args:
        model: maps a batch of inputs to logits ``(N, classes)``.
        dataset: map-style, of ``(input, label)``.
        recipe: see :class:`Recipe`. Under data parallelism each process takes batches
            of ``recipe.batch_size``.
        start: weights, optimiser state and moment to go on from, copied into ``model``; the
            model's own weights before the first step if None.
        stop: train up to this moment; to the end of the recipe if None. The schedule stays
            that of the whole recipe.
        keep: moments whose states ``on_state`` is given, each as its batches are done, in every
            process; the start and the end may be among them, those before the start have passed.
            In ``Step(iteration=1000)`` the batches may run over epochs.
        on_state: called with the states to keep; nothing else copies the weights.
        test: evaluated after every epoch, outside the time measured; with the averaged weights
            where there are some.
        loss_fn: maps ``(logits, labels)`` to the batch's mean loss.
        on_step: called after each step, for a progress display.
        accelerator: device, mixed precision, parallelism; accelerate's defaults if None.
        workers: processes that fetch samples; 0: this one. The batches are the same.

    Returns:
        :class:`History`, one record per epoch; of an epoch that was begun before ``start`` or
        not ended at ``stop``, the record covers the batches taken here.

    Raises:
        DataError: a data set is empty or has no length.
        CheckpointError: ``start`` does not fit the model or the recipe, or a moment lies beyond
            the end.
        TrainingDivergedError: the loss, or a weight after an epoch, is not finite; epoch and
            iteration are named. The weights are then those that gave this loss.

    Example:
        >>> from blockprune.data import load_digits
        >>> from blockprune.lottery.recipe import Recipe
        >>> from blockprune.lottery.steps import Step
        >>> from blockprune.lottery.training import train
        >>> from blockprune.models import resnet20
        >>> data, states = load_digits(), []
        >>> recipe, moment = Recipe(epochs=1, batch_size=120), Step(iteration=2)
        >>> model = resnet20(in_channels=1)
        >>> history = train(model, data.test, recipe, keep=[moment], on_state=states.append)
        >>> resumed = resnet20(in_channels=1)
        >>> _ = train(resumed, data.test, recipe, start=states[0])
        >>> resumed.fc.weight.equal(model.fc.weight)
        True
    """
    epochs = train_epochs(
        model,
        dataset,
        recipe,
        start=start,
        stop=stop,
        keep=keep,
        on_state=on_state,
        test=test,
        loss_fn=loss_fn,
        on_step=on_step,
        accelerator=accelerator,
        workers=workers,
    )
    return History(tuple(epochs))


def train_epochs(
    model: nn.Module,
    dataset: Dataset[Any],
    recipe: Recipe,
    *,
    start: TrainingState | None = None,
    stop: Step | None = None,
    keep: Iterable[Step] = (),
    on_state: Callable[[TrainingState], None] | None = None,
    test: Dataset[Any] | None = None,
    loss_fn: LossFunction = functional.cross_entropy,
    on_step: Callable[[Progress], None] | None = None,
    accelerator: Accelerator | None = None,
    workers: int = 0,
) -> Generator[EpochRecord, None, None]:
    """Train ``model`` one epoch each time the next record is asked for.

    :func:`train` asks for all of them; several networks can also be trained in turns,
    which keeps their times comparable on a machine whose speed drifts. Between epochs
    modes and global generators are as the caller left them. Arguments, errors (data sets and
    moments are checked at once) and results are those of :func:`train`; the averaged weights
    are put in when the last record has been taken.

    Example:
        ``for record in train_epochs(model, data.train, recipe): print(record.loss)``
    """
    accelerator = accelerator or Accelerator()
    loader = make_loader(dataset, recipe.batch_size, seed=recipe.seed, workers=workers)
    if test is not None:
        size_of(test)
    moments = tuple(keep)
    if moments and on_state is None:
        raise CheckpointError("keep says which states to hand on, but on_state takes none.")
    batches = accelerator.prepare_data_loader(loader)
    span = span_of(
        recipe.epochs,
        len(batches),
        start=Step() if start is None else start.step,
        stop=stop,
        keep=moments,
    )
    if start is not None:
        _check_start(model, recipe, start)
    feed = _Feed(batches, accelerator)
    watch = _Watch(test, on_step, on_state, workers)
    return _epochs(model, feed, recipe, span, start, loss_fn, watch, accelerator)


def _epochs(
    model: nn.Module,
    feed: _Feed,
    recipe: Recipe,
    span: Span,
    start: TrainingState | None,
    loss_fn: LossFunction,
    watch: _Watch,
    accelerator: Accelerator,
) -> Generator[EpochRecord, None, None]:
    if start is not None:
        start.load_into(model, averaged=False)
    with _prepared(model, accelerator) as prepared:
        sgd = _optimizer(model, recipe)
        if start is not None:
            _set_momentum(model, sgd, start.momentum)
        averages = None
        if recipe.ema_decay is not None:
            averages = Averages(model, recipe.ema_decay, start.ema if start else None)
        optimizer = accelerator.prepare_optimizer(sgd)
        run = _Run(
            model, prepared, optimizer, averages, feed, recipe, span, loss_fn, watch, accelerator
        )
        run.keep(span.first)
        for epoch in span.epochs:
            with in_mode(True, prepared), preserved_rng():
                record = run.epoch(epoch)
            if watch.test is not None:
                with averages.in_place() if averages else nullcontext():
                    found = evaluate(
                        prepared,
                        watch.test,
                        batch_size=recipe.batch_size,
                        loss_fn=loss_fn,
                        accelerator=accelerator,
                        workers=watch.workers,
                    )
                record = replace(record, test_accuracy=found.accuracy)
            yield record
        if averages is not None:
            averages.fill_in()


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    batch_size: int = 256,
    loss_fn: LossFunction = functional.cross_entropy,
    accelerator: Accelerator | None = None,
    workers: int = 0,
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
        workers: processes that fetch samples; 0: this one.

    Raises:
        DataError: the data set is empty or has no length, or ``batch_size`` < 1.

    Example:
        ``evaluate(model, data.test).accuracy``
    """
    loader = make_loader(dataset, batch_size, workers=workers)
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
class _Feed:
    """The batches of a run, in the order of each epoch."""

    batches: Any
    accelerator: Accelerator

    def epoch(self, epoch: int, first: int, last: int) -> Iterator[tuple[int, Any, Tensor]]:
        """Yield the batches ``first`` to ``last - 1`` of an epoch, each with its number."""
        self.batches.set_epoch(epoch)
        # Skipped by their indices: nothing of them is read.
        batches = (
            self.accelerator.skip_first_batches(self.batches, first) if first else self.batches
        )
        for number, (inputs, labels) in enumerate(batches, first):
            yield number, inputs, labels
            if number + 1 == last < len(self.batches):
                return


@dataclass(frozen=True)
class _Watch:
    """What else wants to look at a run."""

    test: Dataset[Any] | None
    on_step: Callable[[Progress], None] | None
    on_state: Callable[[TrainingState], None] | None
    workers: int


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Averages | None
    feed: _Feed
    recipe: Recipe
    span: Span
    loss_fn: LossFunction
    watch: _Watch
    accelerator: Accelerator

    def epoch(self, epoch: int) -> EpochRecord:
        """Take the steps of one epoch (0-based) that are the run's."""
        totals = torch.zeros(3, dtype=torch.float64)
        first, last = self.span.within(epoch)
        begin = time.perf_counter()
        pauses = 0.0
        for iteration, inputs, labels in self.feed.epoch(epoch, first, last):
            loss, hits = self._step(epoch, iteration, inputs, labels)
            totals += torch.tensor([loss * len(labels), hits, len(labels)], dtype=torch.float64)
            pauses += self.keep(epoch * self.span.per_epoch + iteration + 1)
        seconds = time.perf_counter() - begin - pauses
        self._check_weights(epoch, last)
        loss_sum, hit_sum, samples = self._over_processes(totals)
        return EpochRecord(epoch + 1, loss_sum / samples, hit_sum / samples, seconds)

    def keep(self, done: int) -> float:
        """Hand on the state after so many batches where it is wanted; return the seconds taken."""
        if self.watch.on_state is None or done not in self.span.keep:
            return 0.0
        begin = time.perf_counter()
        self.watch.on_state(
            TrainingState(
                step=Step.of_iterations(done, self.span.per_epoch),
                weights=copied(self.model.state_dict()),
                momentum=_momentum(self.model, self.optimizer),
                ema=None if self.averages is None else copied(self.averages.values),
            )
        )
        return time.perf_counter() - begin

    def _step(self, epoch: int, iteration: int, inputs: Any, labels: Tensor) -> tuple[float, float]:
        _seed_step(self.recipe.seed, epoch, iteration, self.accelerator.process_index)
        done = epoch * self.span.per_epoch + iteration
        rate = self.recipe.learning_rate(done, self.span.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            logits = self.prepared(inputs)
            loss = self.loss_fn(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"The loss is {value}", epoch, iteration + 1)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averages is not None:
            self.averages.update()
        if self.watch.on_step is not None:
            per_epoch = self.span.per_epoch
            self.watch.on_step(
                Progress(epoch + 1, self.recipe.epochs, iteration + 1, per_epoch, value)
            )
        return value, _hits(logits, labels).sum().item()

    def _check_weights(self, epoch: int, iteration: int) -> None:
        # The last step of a run has no loss after it to tell what it did.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise self._diverged(f"{name} is not finite", epoch, iteration)

    def _diverged(self, what: str, epoch: int, iteration: int) -> TrainingDivergedError:
        done = epoch * self.span.per_epoch + iteration - 1
        rate = self.recipe.learning_rate(done, self.span.per_epoch)
        return TrainingDivergedError(
            f"{what} at epoch {epoch + 1} of {self.recipe.epochs}, iteration {iteration} of "
            f"{self.span.per_epoch}, learning rate {rate:.3g}. A lower lr, a longer warm-up, or "
            "inputs without NaN or infinity would help."
        )

    def _over_processes(self, totals: Tensor) -> list[float]:
        summed: Tensor = self.accelerator.reduce(
            totals.to(self.accelerator.device, torch.float32), reduction="sum"
        )
        values: list[float] = summed.tolist()
        return values


def _seed_step(*place: int) -> None:
    # Generators that ran on from step to step would make a run that resumes draw other numbers.
    # A hash, since sums of multiples would give some places the same draws.
    digest = hashlib.blake2b(str(place).encode(), digest_size=8).digest()
    seed_rng(int.from_bytes(digest, "big"))


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _check_start(model: nn.Module, recipe: Recipe, start: TrainingState) -> None:
    problems = start.misfits(model)
    if problems:
        raise CheckpointError(f"start does not fit the model: {summary(problems)}.")
    if start.ema is not None and recipe.ema_decay is None:
        raise CheckpointError(
            "start holds averaged weights, but the recipe has no ema_decay to go on with. Set it, "
            "or leave the averages out: dataclasses.replace(start, ema=None)."
        )


def _momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the velocities, under every name of a parameter that several share."""
    buffers = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
    }
    return copied(buffers)


def _set_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, momentum: Mapping[str, Tensor]
) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in momentum and parameter.requires_grad:
            velocity = momentum[name].to(parameter.device, copy=True)
            optimizer.state[parameter]["momentum_buffer"] = velocity


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
