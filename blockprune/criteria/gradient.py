"""Criteria that read gradients of the loss, at initialisation or later.

Let `theta` be the weights of the model, `L` the loss on one batch, `g = dL/dtheta` and `H` the
Hessian. Removing weight `q` moves theta by `-theta_q` along its axis.

* How much does the loss change? To first order `|theta_q g_q|`: **SNIP**.
* How much does the *gradient flow* `||g||^2`, which is what the next training step gains,
  change? A step `d` changes it by `2 d.Hg`, so removal changes it by `-2 theta_q (Hg)_q`.
  Where that is positive, training profits. **GraSP** therefore prunes the highest
  `-theta_q (Hg)_q`; as an importance, where the lowest goes first, it is `+theta_q (Hg)_q`.

Both are taken with batch normalisation in training mode. There a filter's scale has no effect on
the loss, so that `sum theta g = 0` and `sum theta Hg = -||g||^2` over each filter; with running
statistics at initialisation the signs flip and magnitudes explode. Dropout and drop path stay off.

A block's score is the mean (or sum) of those numbers over its weights. The mean of GraSP is what
gives the removal patterns of papers/000; sums follow the sizes of the layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockprune.criteria.base import Batch, ScoringContext, total
from blockprune.errors import CriterionError, DataError

__all__ = ["Grasp", "Snip", "ZeroScoresWarning"]

Aggregation = Literal["mean", "sum"]
Weights = dict[str, nn.Parameter]


class ZeroScoresWarning(UserWarning):
    """Every block scores exactly 0, so the criterion ranks nothing."""


@dataclass(frozen=True)
class Snip:
    """SNIP: `|theta * dL/dtheta|` of each weight, over one batch.

    Absolute values are taken before aggregating.

    Args:
        aggregation: "mean" or "sum" over the weights of the block.

    Raises (when called):
        CriterionError: all weights of a block are frozen, or the loss is not finite.
        DataError: no data, or data that the model refuses.

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", 2019.
    """

    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        _check(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = _distinct(blocks.values())
        batch = context.first_batch()
        with torch.enable_grad(), context.batch_statistics(), _failures("snip"):
            gradient = _gradient(context, batch, theta, temperature=1.0)
        saliency = [(w.detach() * g).abs() for w, g in zip(theta, gradient, strict=True)]
        return _aggregated(blocks, theta, saliency, self.aggregation)


@dataclass(frozen=True)
class Grasp:
    """GraSP: `theta * (H g)` of each weight, over the two halves of one batch.

    With `g` the sum of the gradients of both halves, for each half `h`::

        z_h = g . dL_h/dtheta           (g held constant)
        Hg  = sum over h of dz_h/dtheta

    `theta` are all convolution and linear weights of the model, the losses those of logits
    divided by `temperature`.

    Args:
        aggregation: "mean" or "sum" over the weights of the block.
        temperature: T; the larger, the less the first predictions matter.

    Raises (when called):
        CriterionError: all weights of a block are frozen, the loss is not finite, or an
            operation of the model cannot be differentiated twice.
        DataError: no data, fewer than two samples, or data that the model refuses.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    2020.
    """

    aggregation: Aggregation = "mean"
    temperature: float = 200.0

    def __post_init__(self) -> None:
        _check(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = _distinct((*blocks.values(), context.all_trainable_weights()))
        halves = _halves(context.first_batch())
        # Fused attention kernels have no second derivative; the plain one does.
        with (
            torch.enable_grad(),
            context.batch_statistics(),
            sdpa_kernel(SDPBackend.MATH),
            _failures("grasp"),
        ):
            gradient = _summed(_gradient(context, h, theta, self.temperature) for h in halves)
            product = _summed(
                _hessian_product(context, h, theta, gradient, self.temperature) for h in halves
            )
        saliency = [w.detach() * hg for w, hg in zip(theta, product, strict=True)]
        return _aggregated(blocks, theta, saliency, self.aggregation)


def _gradient(
    context: ScoringContext,
    batch: Batch,
    theta: Sequence[nn.Parameter],
    temperature: float,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, ...]:
    """Return dL/dtheta; a weight that the loss does not reach has gradient 0."""
    loss = context.loss(context.outputs(batch), batch.targets, temperature=temperature)
    if not loss.requires_grad:
        raise CriterionError(
            "The loss does not depend on any weight: the model's output, or the loss_fn, is "
            "detached from the graph."
        )
    return torch.autograd.grad(
        loss, theta, create_graph=differentiable, allow_unused=True, materialize_grads=True
    )


def _hessian_product(
    context: ScoringContext,
    batch: Batch,
    theta: Sequence[nn.Parameter],
    vector: Sequence[Tensor],
    temperature: float,
) -> tuple[Tensor, ...]:
    """Return d(vector . dL/dtheta)/dtheta."""
    gradient = _gradient(context, batch, theta, temperature, differentiable=True)
    z = torch.stack([(v * g).sum() for v, g in zip(vector, gradient, strict=True)]).sum()
    if not z.requires_grad:
        # A loss that is linear in the weights: its Hessian is zero.
        return tuple(torch.zeros_like(weight) for weight in theta)
    _check_differentiable(z)
    return torch.autograd.grad(z, theta, allow_unused=True, materialize_grads=True)


def _check_differentiable(z: Tensor) -> None:
    """Refuse a function marked as differentiable once.

    Its second derivative would raise only where it was run, and ``torch.autograd.grad`` runs no
    more than leads to its inputs, which this does not: the terms would be silently missing.

    Raises:
        CriterionError: there is one.
    """
    seen, waiting = set(), [z.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            raise CriterionError(
                "The model holds an autograd function that is marked as differentiable once, and "
                "GraSP differentiates twice. Use 'snip', which takes one derivative, or 'l1'."
            )
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


def _summed(terms: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(tensors).sum(0) for tensors in zip(*terms, strict=True))


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    size = len(batch)
    if size < 2:
        raise DataError(
            f"GraSP splits the batch in two halves, so it needs at least 2 samples, not {size}. "
            "Ten of each class are usual."
        )
    return batch.part(0, size // 2), batch.part(size // 2, size)


def _distinct(groups: Iterable[Weights]) -> list[nn.Parameter]:
    """Return the weights of all groups, each once, whatever names it goes by."""
    return list({id(weight): weight for group in groups for weight in group.values()}.values())


def _aggregated(
    blocks: Mapping[str, Weights],
    theta: Sequence[nn.Parameter],
    saliency: Sequence[Tensor],
    aggregation: Aggregation,
) -> dict[str, float]:
    totals = {id(weight): total(values) for weight, values in zip(theta, saliency, strict=True)}
    scores = {}
    for block, weights in blocks.items():
        summed = math.fsum(totals[id(weight)] for weight in weights.values())
        count = sum(weight.numel() for weight in weights.values())
        scores[block] = summed / count if aggregation == "mean" else summed
    if scores and not any(scores.values()):
        warnings.warn(
            f"Every one of the {len(scores)} blocks scores 0, so a plan takes them in order of "
            "execution. Where the last normalisation or gain of each branch starts at zero "
            "(zero_init_residual, zero_init_last, skip-init), no gradient reaches the rest of it: "
            "score after some training, or use a criterion without gradients, such as 'l1'.",
            ZeroScoresWarning,
            stacklevel=3,
        )
    return scores


def _check(aggregation: str) -> None:
    if aggregation not in ("mean", "sum"):
        raise CriterionError(f"aggregation is 'mean' or 'sum', not {aggregation!r}.")


@contextmanager
def _failures(criterion: str) -> Iterator[None]:
    """Turn what autograd raises into an error that names the criterion."""
    try:
        yield
    except (CriterionError, DataError):
        raise
    except RuntimeError as error:
        raise CriterionError(
            f"{criterion} cannot differentiate this model: {error}. "
            "Use a criterion that asks for fewer derivatives: 'snip' takes one, 'l1' none."
        ) from error
