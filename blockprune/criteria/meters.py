"""Criteria that read forward passes, and how several of them share one.

Such a criterion is a small value that makes a *meter*. The meter is shown what the passes
produce, keeps sums and no activations, and gives the scores at the end; so the passes are made
once, however many criteria look on.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockprune.batches import Batch
from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import Criterion, ScoringContext
from blockprune.losses import class_axis, main_output
from blockprune.tracing import tensors_in

__all__ = [
    "ActivationCriterion",
    "ActivationMeter",
    "OutputCriterion",
    "OutputMeter",
    "Result",
    "evaluate",
    "feature_axis",
    "rows",
]


class ActivationMeter(abc.ABC):
    """Is shown each block's input and output, batch by batch, and returns the scores."""

    @abc.abstractmethod
    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        """Look at what enters and what leaves a block; neither may be changed or kept."""

    def end(self, batch: Batch) -> None:  # noqa: B027 (most have nothing to do)
        """Look at the batch once all of its blocks have been seen."""

    @abc.abstractmethod
    def scores(self) -> dict[str, float]:
        """Return the score of each block."""


@dataclass(frozen=True)
class Result:
    """What one pass has produced.

    Attributes:
        outputs: what the model returns.
        features: what enters its last layer, (rows, features); None where nobody asked.
    """

    outputs: Any
    features: Tensor | None


class OutputMeter(abc.ABC):
    """Is shown what the model returns with and without each block, and returns the scores."""

    @abc.abstractmethod
    def see(self, batch: Batch, block: ResidualBlock, dense: Result, without: Result) -> None:
        """Look at the results of one batch, of the whole model and without one block."""

    @abc.abstractmethod
    def scores(self) -> dict[str, float]:
        """Return the score of each block."""


@dataclass(frozen=True)
class ActivationCriterion(abc.ABC):
    """A criterion on what flows through the blocks, in evaluation mode."""

    needs: ClassVar[str] = "inputs"
    reads_only: ClassVar[bool] = True

    @abc.abstractmethod
    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter that has seen nothing yet."""

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, over all batches."""
        meter = self.meter(context)
        _read_activations(context, [meter])
        return meter.scores()


@dataclass(frozen=True)
class OutputCriterion(abc.ABC):
    """A criterion on what the model returns with one block left out, in evaluation mode."""

    needs: ClassVar[str] = "inputs"
    reads_only: ClassVar[bool] = True
    reads_features: ClassVar[bool] = False

    @abc.abstractmethod
    def meter(self, context: ScoringContext) -> OutputMeter:
        """Return a meter that has seen nothing yet."""

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, over all batches."""
        meter = self.meter(context)
        _read_outputs(context, [meter], with_features=self.reads_features)
        return meter.scores()


def evaluate(
    context: ScoringContext, criteria: Mapping[str, Criterion]
) -> dict[str, Mapping[str, float]]:
    """Return what each criterion scores. Those that read passes share them.

    Each of the others is given a context of its own, since it may spoil the model in it; the one
    given here is only copied from.
    """
    observing = {n: c for n, c in criteria.items() if isinstance(c, ActivationCriterion)}
    leaving_out = {n: c for n, c in criteria.items() if isinstance(c, OutputCriterion)}
    shared = context.fresh(reads_only=True) if observing or leaving_out else None
    scores: dict[str, Mapping[str, float]] = {}
    if shared and observing:
        seeing = {name: criterion.meter(shared) for name, criterion in observing.items()}
        _read_activations(shared, list(seeing.values()))
        scores |= {name: meter.scores() for name, meter in seeing.items()}
    if shared and leaving_out:
        with_features = any(criterion.reads_features for criterion in leaving_out.values())
        comparing = {name: criterion.meter(shared) for name, criterion in leaving_out.items()}
        _read_outputs(shared, list(comparing.values()), with_features=with_features)
        scores |= {name: meter.scores() for name, meter in comparing.items()}
    for name in criteria.keys() - scores.keys():
        criterion = criteria[name]
        own = context.fresh(reads_only=getattr(criterion, "reads_only", False) is True)
        scores[name] = criterion(own)
    return scores


def _read_activations(context: ScoringContext, meters: Sequence[ActivationMeter]) -> None:
    def see(block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        for meter in meters:
            meter.see(block, entering, leaving)

    for batch in context.all_batches():
        with context.running(batch):
            context.passes.observe(batch.call, see)
        for meter in meters:
            meter.end(batch)


def _read_outputs(
    context: ScoringContext, meters: Sequence[OutputMeter], *, with_features: bool
) -> None:
    for batch in context.all_batches():
        with context.running(batch), _last_layer(context, on=with_features) as features_of:
            dense: Result | None = None
            passes = context.passes.leave_one_out(batch.call, context.max_cache_bytes)
            for block, outputs in passes:
                result = Result(outputs, features_of(outputs))
                if block is None:
                    dense = result
                    continue
                assert dense is not None
                for meter in meters:
                    meter.see(batch, block, dense, result)


@contextmanager
def _last_layer(context: ScoringContext, *, on: bool) -> Iterator[Callable[[Any], Tensor | None]]:
    """Give a function from what a pass returned to the features behind all blocks.

    They are what enters the last linear or convolution layer that the dense pass calls, the
    classifier of most networks; the model's main output where that layer is part of a block.
    """
    if not on:
        yield lambda outputs: None
        return
    latest: dict[str, Any] = {}
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    of_blocks = {id(context.parameter(n)) for block in context.blocks for n in block.parameters}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest["layer"], latest["input"] = module, next(tensors_in((args, kwargs)))

    def features(outputs: Any) -> Tensor:
        # The dense pass comes first, and ends in the head.
        if "head" not in latest:
            layer = latest.get("layer")
            weights = layer.parameters() if layer is not None else ()
            is_free = layer is not None and not any(id(weight) in of_blocks for weight in weights)
            latest["head"] = layer if is_free else None
        if latest["head"] is None:
            output = main_output(outputs)
            return rows(output, class_axis(output))
        return rows(latest["input"], -1 if isinstance(latest["head"], nn.Linear) else 1)

    modules = [m for m in context.passes.model.modules() if isinstance(m, layers)]
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def feature_axis(context: ScoringContext, block: ResidualBlock) -> int:
    """Return the axis of the block's features (channels), for any layout of its tensors.

    Of the second and the last axis it is the one of whose size the block has more vectors (biases,
    gains of normalisations). Where that does not tell: the second of maps, of at least four axes;
    else the last.
    """
    parameters = [context.parameter(name) for name in block.parameters]
    vectors = Counter(len(parameter) for parameter in parameters if parameter.dim() == 1)
    last = len(block.shape) - 1
    if last < 2:
        return last
    second_fits, last_fits = vectors[block.shape[1]], vectors[block.shape[last]]
    if second_fits == last_fits:
        return 1 if last > 2 else last
    return 1 if second_fits > last_fits else last


def rows(tensor: Tensor, axis: int) -> Tensor:
    """Return (rows, features): each position of each sample is a row. At least single precision."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.movedim(axis, -1).flatten(0, -2) if wide.dim() > 1 else wide.unsqueeze(0)
