"""SynFlow: how much of what flows through the network flows through the block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockprune.criteria.base import Batch, ScoringContext, main_output, total
from blockprune.criteria.derivatives import (
    Aggregation,
    Weights,
    by_block,
    check_aggregation,
    distinct,
    failures,
    gradient_of,
    warn_if_all_zero,
)
from blockprune.errors import CriterionError, DataError
from blockprune.tracing import Call, copy_model

__all__ = ["SynFlow", "absolute", "flows"]


@dataclass(frozen=True)
class SynFlow:
    """SynFlow: `|theta * dR/dtheta|` of each weight, where R is the output for ones, summed.

    With all parameters replaced by their absolute values, in evaluation mode and float64, for one
    sample of ones of the example's shape::

        R     = sum f(ones; |theta|)
        score = sum (or mean) of  | |theta| * dR/d|theta| |   over the weights of the block

    `theta` has any shape, the unit is that of the output. In a network without biases whose layers
    follow one another, linear or ReLU, every layer sums to R; with shortcuts, a branch sums, layer
    by layer, to the part of R that flows through it.

    Only floating-point inputs become ones; token ids, which are no signal, stay those of the
    example. As in the authors' code running means become absolute too; other buffers (masks, tables
    of positions) are part of the function and stay. Of several outputs the first floating-point
    one is summed.

    Reads no data, only the shape of the example. Made for a network at initialisation; needs no
    training.

    Args:
        aggregation: "sum" or "mean" over the weights of the block.

    Raises (when called):
        CriterionError: all weights of a block are frozen, the model does not run in float64, or
            its product of absolute weights is beyond float64, as may happen in deep networks
            without normalisation.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> example = torch.randn(1, 3, 32, 32)
        >>> len(score_blocks(resnet20(), SynFlow(), example_inputs=example).scores)
        7

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020.
    """

    needs: ClassVar[str] = "nothing"
    reads_only: ClassVar[bool] = True
    aggregation: Aggregation = "sum"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block; no data is read."""
        flow = absolute(context)
        blocks = {block.name: flow.trainable_weights(block) for block in flow.blocks}
        theta = distinct(blocks.values())
        values = list(map(total, flows(flow, theta)))
        if not all(map(math.isfinite, values)):
            raise _overflow(blocks, theta, values)
        scores = by_block(blocks, theta, values, self.aggregation)
        warn_if_all_zero(scores)
        return scores


def absolute(context: ScoringContext) -> ScoringContext:
    """Return a context like this one, over the network of absolute weights, without data."""
    return ScoringContext(
        _absolute(context.model), context.blocks, None, context.example, seed=context.seed
    )


def flows(flow: ScoringContext, theta: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Return `|theta * dR/dtheta|` of each single weight of an `absolute` context."""
    with torch.enable_grad(), failures("synflow"):
        gradient = gradient_of(_signal(flow), theta)
    return ((w.detach() * g).abs() for w, g in zip(theta, gradient, strict=True))


@torch.no_grad()
def _absolute(model: nn.Module) -> nn.Module:
    """Return a copy of the model in evaluation mode and float64, without negative parameters."""
    positive = copy_model(model).eval().double()
    for parameter in positive.parameters():
        parameter.abs_()
    for module in positive.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.abs_()
    return positive


def _signal(flow: ScoringContext) -> Tensor:
    """Return R.

    Raises:
        CriterionError: the model does not run, or R depends on no weight.
    """
    try:
        outputs = flow.outputs(Batch(_one_sample_of_ones(flow.example), None))
    except DataError as error:
        raise CriterionError(f"SynFlow runs the model in float64 on ones. {error}") from error
    signal = main_output(outputs).sum()
    if not signal.requires_grad:
        raise CriterionError(
            "SynFlow's sum of outputs does not depend on any weight: the model's output is "
            "detached from the graph."
        )
    return signal


def _one_sample_of_ones(example: Call) -> Call:
    def ones(tensor: Tensor) -> Tensor:
        return (
            torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor
        )

    return Batch(example, None).part(0, 1).call.map(ones)


def _overflow(
    blocks: Mapping[str, Weights], theta: Sequence[nn.Parameter], values: Sequence[float]
) -> CriterionError:
    """Return the error that names the first block whose score is not finite."""
    beyond = {id(w) for w, value in zip(theta, values, strict=True) if not math.isfinite(value)}
    block = next(
        name for name, weights in blocks.items() if any(id(w) in beyond for w in weights.values())
    )
    return CriterionError(
        f"SynFlow's score of block {block!r} is not a finite number: the product of absolute "
        "weights along the network is beyond float64, as it may be in deep networks without "
        "normalisation, or a weight is not finite itself. Use a criterion that keeps the signs, "
        "such as 'snip', or smaller initial weights."
    )
