"""How long a forward pass takes, and how to compare modules on a machine that drifts.

A machine's speed changes over seconds (frequency, temperature, other programs), often
by more than two modules differ. So the modules take turns: a round times each of them
once, the next round in the reverse order, and the figures of one round belong together.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockprune.errors import MeasurementError, TraceError
from blockprune.modes import in_mode

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

__all__ = ["Latency", "compare_latency", "measure_latency"]

MIN_SAMPLE_SECONDS = 0.002
"""Shorter samples would measure the clock; short passes are repeated up to this."""

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with, by place and by name."""


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass of one batch.

    Attributes:
        batch_size: samples in the batch.
        samples_ms: milliseconds a pass, one figure a round, in the order of the rounds.
    """

    batch_size: int
    samples_ms: tuple[float, ...] = field(repr=False)

    @property
    def median_ms(self) -> float:
        """Median over the rounds, in milliseconds."""
        return statistics.median(self.samples_ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range over the rounds, in milliseconds; 0 for a single round."""
        if len(self.samples_ms) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return third - first

    def ratio_to(self, other: Latency) -> float:
        """Return the median over the rounds of this time divided by ``other``'s.

        Both must come from one call of :func:`compare_latency`, so that their rounds pair up.

        Raises:
            MeasurementError: the numbers of rounds, or the batch sizes, differ.
        """
        if self._paired_with != other._paired_with:
            raise MeasurementError(
                "Only rounds of one comparison pair up: batch {} over {} rounds against batch "
                "{} over {} rounds.".format(*self._paired_with, *other._paired_with)
            )
        return statistics.median(
            a / b for a, b in zip(self.samples_ms, other.samples_ms, strict=True)
        )

    @property
    def _paired_with(self) -> tuple[int, int]:
        return self.batch_size, len(self.samples_ms)


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> tuple[Latency, ...]:
    """Return the latency of ``model`` for each batch size; see :func:`compare_latency`.

    Example:
        >>> import torch
        >>> from blockprune.profiling import measure_latency
        >>> [one] = measure_latency(torch.nn.Linear(4, 2), torch.zeros(1, 4), repeats=3)
        >>> one.batch_size, len(one.samples_ms), one.median_ms > 0
        (1, 3, True)
    """
    measured = compare_latency(
        {"model": model},
        example_inputs,
        batch_sizes=batch_sizes,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
    )
    return measured["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int] | None = (1,),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> dict[str, tuple[Latency, ...]]:
    """Time the forward passes of several modules in turns, so that drift cancels.

    Modules run in evaluation mode without gradients, on the device they are on, and get
    their modes back.

    Args:
        models: the modules by name; all take the same inputs.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of
            keyword arguments. Every tensor whose first axis has the batch's length (that
            of the first tensor) is repeated or cut to each batch size; so is a list of
            tensors among the arguments, one a sample.
        batch_sizes: at least one, each at least 1; None: the batch as it is given.
        repeats: rounds, one figure each, at least 1.
        warmup: untimed passes of each module before the first round, at least 1.
        threads: of torch inside an operation; what torch is set to if None.

    Returns:
        For each name, one :class:`Latency` a batch size, in the order given.

    Raises:
        MeasurementError: an argument is out of range; raised before anything runs.
        TraceError: a module refuses the inputs; its own error is quoted.

    Example:
        ``compare_latency({"dense": model, "ticket": ticket}, images, batch_sizes=(1, 64))``
    """
    _check(models, batch_sizes, repeats, warmup, threads)
    arguments = _arguments(example_inputs)
    counted = torch.get_num_threads() if threads is None else threads
    measured: dict[str, list[Latency]] = {name: [] for name in models}
    with in_mode(False, *models.values()), torch.no_grad():
        for batch_size, batch in _batches(arguments, batch_sizes):
            timers = {
                name: _timer(name, model, batch, counted, warmup) for name, model in models.items()
            }
            for name, samples in _rounds(timers, repeats).items():
                measured[name].append(Latency(batch_size, tuple(samples)))
    return {name: tuple(latencies) for name, latencies in measured.items()}


def _check(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int] | None,
    repeats: int,
    warmup: int,
    threads: int | None,
) -> None:
    if not models:
        raise MeasurementError("There is no model to time; give at least one.")
    if batch_sizes is not None and not batch_sizes:
        raise MeasurementError("There is no batch size to time; give at least one, such as 1.")
    counts = [("A batch size", size) for size in batch_sizes or ()]
    counts += [("repeats", repeats), ("warmup", warmup)]
    counts += [] if threads is None else [("threads", threads)]
    for name, value in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MeasurementError(f"{name} must be a whole number from 1 on, got {value!r}.")


def _arguments(example_inputs: Any) -> _Arguments:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _batches(
    arguments: _Arguments, batch_sizes: Sequence[int] | None
) -> Iterator[tuple[int, _Arguments]]:
    """Yield each batch size with a batch of it."""
    if batch_sizes is None:
        positional, named = arguments
        lengths = [len(value) for value in (*positional, *named.values()) if _is_batch(value)]
        # Inputs without a batch axis are one sample.
        yield (lengths or [1])[0], arguments
        return
    for batch_size in batch_sizes:
        yield batch_size, _resized(arguments, batch_size)


def _resized(arguments: _Arguments, batch_size: int) -> _Arguments:
    """Repeat or cut the samples of every batched argument to ``batch_size``."""
    positional, named = arguments
    values = [*positional, *named.values()]
    lengths = [len(value) for value in values if _is_batch(value)]
    if not lengths:
        raise MeasurementError(
            "example_inputs hold no tensor with a batch axis and no list of tensors, so no "
            "batch can be made of them."
        )

    def resize(value: Any) -> Any:
        if not _is_batch(value) or len(value) != lengths[0]:
            return value
        rows = [row % lengths[0] for row in range(batch_size)]
        return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]

    return (
        tuple(resize(value) for value in positional),
        {name: resize(value) for name, value in named.items()},
    )


def _is_batch(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) > 0
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


@dataclass(frozen=True)
class _Timer:
    timer: Timer
    passes: int

    def sample_ms(self) -> float:
        return self.timer.timeit(self.passes).mean * 1e3


def _timer(
    name: str,
    model: nn.Module,
    batch: _Arguments,
    threads: int,
    warmup: int,
) -> _Timer:
    with _quiet_extensions():
        from torch.utils.benchmark import Timer

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    positional, named = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    timer = Timer(
        "model(*positional, **named)",
        globals={"model": model, "positional": positional, "named": named},
        num_threads=threads,
    )
    try:
        estimate = timer.timeit(warmup).mean
    except Exception as error:
        raise TraceError(f"{name} refused the example inputs: {error}") from error
    return _Timer(timer, max(1, math.ceil(MIN_SAMPLE_SECONDS / estimate)))


def _rounds(timers: dict[str, _Timer], repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(repeats):
        # Turning the order over cancels a steady drift within a round as well.
        order = list(timers) if number % 2 == 0 else list(reversed(timers))
        for name in order:
            samples[name].append(timers[name].sample_ms())
    return samples


@contextmanager
def _quiet_extensions() -> Iterator[None]:
    # torch.utils.benchmark loads the C++ extension builder, which logs where it looks for
    # CUDA; nothing is built here.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
