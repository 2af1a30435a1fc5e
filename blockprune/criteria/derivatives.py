"""What the criteria that differentiate share: gradients of the loss, and sums over blocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from blockprune.criteria.base import Batch, ScoringContext
from blockprune.errors import CriterionError, DataError, raise_if_out_of_memory

__all__ = [
    "Aggregation",
    "Weights",
    "ZeroScoresWarning",
    "by_block",
    "check_aggregation",
    "distinct",
    "failures",
    "gradient_of",
    "loss_of",
    "running_statistics",
    "summed",
    "warn_if_all_zero",
]

Aggregation = Literal["mean", "sum"]
Weights = dict[str, nn.Parameter]


class ZeroScoresWarning(UserWarning):
    """Every block scores exactly 0, so the criterion ranks nothing."""


def loss_of(context: ScoringContext, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return the loss of a batch, ready to be differentiated.

    Raises:
        CriterionError: it is not finite, or has no gradient.
    """
    loss = context.loss(context.outputs(batch), batch.targets, temperature=temperature)
    if not loss.requires_grad:
        raise CriterionError(
            "The loss does not depend on any weight: the model's output, or the loss_fn, is "
            "detached from the graph."
        )
    return loss


def gradient_of(
    loss: Tensor, theta: Sequence[Tensor], *, differentiable: bool = False
) -> tuple[Tensor, ...]:
    """Return dloss/dtheta; what the loss does not depend on has gradient 0."""
    return torch.autograd.grad(
        loss, theta, create_graph=differentiable, allow_unused=True, materialize_grads=True
    )


def summed(terms: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums of the terms' tensors; no more than one term is held beside them."""
    sums: list[Tensor] = []
    for term in terms:
        if not sums:
            sums = list(term)
        else:
            # Not in place: autograd may return one tensor, or an expanded one, for two weights.
            for position, tensor in enumerate(term):
                sums[position] = sums[position] + tensor
        # Else it would stay alive while the next one is computed.
        del term
    return sums


def distinct(groups: Iterable[Weights]) -> list[nn.Parameter]:
    """Return the weights of all groups, each once, whatever names it goes by."""
    return list({id(weight): weight for group in groups for weight in group.values()}.values())


def by_block(
    blocks: Mapping[str, Weights],
    theta: Sequence[nn.Parameter],
    values: Iterable[float],
    aggregation: Aggregation = "sum",
) -> dict[str, float]:
    """Return the sum of each block's values, one of each of `theta`, or that over its weights."""
    known = {id(weight): value for weight, value in zip(theta, values, strict=True)}
    scores = {}
    for block, weights in blocks.items():
        scores[block] = math.fsum(known[id(weight)] for weight in weights.values())
        if aggregation == "mean":
            scores[block] /= sum(weight.numel() for weight in weights.values())
    return scores


def warn_if_all_zero(scores: Mapping[str, float]) -> None:
    """Warn, in the name of whoever called the criterion, that it ranks nothing.

    Warns:
        ZeroScoresWarning: there are scores, and all are 0.
    """
    if scores and not any(scores.values()):
        warnings.warn(
            f"Every one of the {len(scores)} blocks scores 0, so a plan takes them in order of "
            "execution. Where the last normalisation or gain of each branch starts at zero "
            "(zero_init_residual, zero_init_last, skip-init), no gradient reaches the rest of it: "
            "score after some training, or use a criterion without gradients, such as 'l1'.",
            ZeroScoresWarning,
            stacklevel=3,
        )


def check_aggregation(aggregation: str) -> None:
    """Refuse an unknown aggregation.

    Raises:
        CriterionError: it is one.
    """
    if aggregation not in ("mean", "sum"):
        raise CriterionError(f"aggregation is 'mean' or 'sum', not {aggregation!r}.")


@contextmanager
def running_statistics(context: ScoringContext) -> Iterator[None]:
    """Differentiate the model that would be deployed, in evaluation mode; all is put back."""
    with context.batch_statistics():
        context.model.eval()
        yield


@contextmanager
def failures(criterion: str) -> Iterator[None]:
    """Turn what autograd raises into an error that names the criterion."""
    try:
        yield
    except (CriterionError, DataError):
        raise
    except RuntimeError as error:
        raise_if_out_of_memory(error)
        raise CriterionError(
            f"{criterion} cannot differentiate this model: {error}. "
            "Use a criterion that asks for fewer derivatives: 'snip' takes one, 'l1' none."
        ) from error
