"""Criteria that read gradients of the loss with respect to the weights.

Let `theta` be the weights of the model, `L` the loss on one batch, `g = dL/dtheta` and `H` the
Hessian. Removing weight `q` moves theta by `-theta_q` along its axis.

* How much does the loss change? To first order `|theta_q g_q|`: **SNIP** on one batch, **Taylor**
  on all of them.
* How much does the *gradient flow* `||g||^2`, which is what the next training step gains,
  change? A step `d` changes it by `2 d.Hg`, so removal changes it by `-2 theta_q (Hg)_q`.
  Where that is positive, training profits. **GraSP** therefore prunes the highest
  `-theta_q (Hg)_q`; as an importance, where the lowest goes first, it is `+theta_q (Hg)_q`.
* How much of the gradient flow is this block's own? **Gradient norm**.

SNIP, GraSP and the gradient norm judge a network before it is trained, so they are taken with
batch normalisation in training mode. There a filter's scale has no effect on the loss, so that
`sum theta g = 0` and `sum theta Hg = -||g||^2` over each filter; with running statistics at
initialisation the signs flip and magnitudes explode. Taylor judges what training made of the
weights, as they will be used: in evaluation mode. Dropout and drop path stay off in both.

A block's score is the mean (or sum) of those numbers over its weights. The mean of GraSP is what
gives the removal patterns of papers/000; sums follow the sizes of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockprune.criteria.base import Batch, ScoringContext, total
from blockprune.criteria.derivatives import (
    Aggregation,
    ZeroScoresWarning,
    by_block,
    check_aggregation,
    distinct,
    failures,
    gradient_of,
    loss_of,
    running_statistics,
    summed,
    warn_if_all_zero,
)
from blockprune.errors import CriterionError, DataError

__all__ = [
    "GradNorm",
    "Grasp",
    "Snip",
    "Taylor",
    "ZeroScoresWarning",
    "saliencies",
    "sensitivities",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Snip:
    """SNIP: `|theta * dL/dtheta|` of each weight, over one batch.

    Absolute values are taken before aggregating. For the weights `theta` of the block, of any
    shape, in the unit of the loss::

        score = mean (or sum) of  |theta * g|

    Reads the first batch, with labels. Made for a network at initialisation; needs no training.

    Args:
        aggregation: "mean" or "sum" over the weights of the block.

    Raises (when called):
        CriterionError: all weights of a block are frozen, or the loss is not finite.
        DataError: no data, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> data = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> len(score_blocks(resnet20(), Snip("sum"), data).scores)
        7

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", 2019.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = distinct(blocks.values())
        values = map(total, sensitivities(context, theta))
        scores = by_block(blocks, theta, values, self.aggregation)
        warn_if_all_zero(scores)
        return scores


@dataclass(frozen=True)
class Taylor:
    """Taylor: `|theta * sum over batches of dL/dtheta|` of each weight.

    The first-order estimate of how the loss over all batches changes without the weight. For the
    weights `theta` of the block, of any shape, and batches `b`, in the unit of the loss::

        score = sum (or mean) of  |theta * sum over b of g_b|

    Signs of different batches cancel, absolute values are taken weight by weight. Each batch counts
    once, so the score grows with their number, and batches of equal size weigh samples equally.

    Reads every batch, with labels, at one forward and backward each, in evaluation mode. Made for a
    trained network: before training, running statistics say nothing yet, and SNIP does better.

    Args:
        aggregation: "sum" or "mean" over the weights of the block.

    Raises (when called):
        CriterionError: all weights of a block are frozen, or the loss is not finite.
        DataError: no data, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> batches = list(zip(images.split(10), labels.split(10)))
        >>> len(score_blocks(resnet20(), Taylor(), batches).scores)
        7

    Source: Kim et al., "Shortened LLaMA: a simple depth pruning for large language models", 2024.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True
    aggregation: Aggregation = "sum"

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from all batches."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = distinct(blocks.values())
        with torch.enable_grad(), running_statistics(context), failures("taylor"):
            gradient = _total_gradient(context, theta)
        scores = by_block(blocks, theta, map(_sensitivity, theta, gradient), self.aggregation)
        warn_if_all_zero(scores)
        return scores


@dataclass(frozen=True)
class GradNorm:
    """Gradient norm: the L2 norm of the gradient of each layer, summed over the block's layers.

    For the weights `W` of the block, of any shape, and batches `b`, in units of loss per weight::

        score = sum over W of  ||sum over b of dL_b/dW||_2

    A weight tensor is a layer; an attention's joint input projection is one.

    Reads every batch, with labels, at one forward and backward each, with batch normalisation in
    training mode. Made for a network at initialisation, where it tells what training will move
    first; it says nothing at a minimum, where gradients vanish.

    Raises (when called):
        CriterionError: all weights of a block are frozen, or the loss is not finite.
        DataError: no data, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> data = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> len(score_blocks(resnet20(), GradNorm(), data).scores)
        7

    Source: Abdelfattah et al., "Zero-cost proxies for lightweight NAS", 2021.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from all batches."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = distinct(blocks.values())
        with torch.enable_grad(), context.batch_statistics(), failures("grad_norm"):
            gradient = _total_gradient(context, theta)
        scores = by_block(blocks, theta, map(_norm, gradient))
        warn_if_all_zero(scores)
        return scores


@dataclass(frozen=True)
class Grasp:
    """GraSP: `theta * (H g)` of each weight, over the two halves of one batch.

    With `g` the sum of the gradients of both halves, for each half `h`::

        z_h   = g . dL_h/dtheta           (g held constant)
        Hg    = sum over h of dz_h/dtheta
        score = mean (or sum) of  theta * Hg   over the weights of the block, of any shape

    `theta` are all convolution and linear weights of the model, the losses those of logits
    divided by `temperature`. The unit is that of the loss, squared, over that of a weight, squared.

    Reads the first batch, with labels; ten samples of each class are usual. Two or three samples
    are not split where a half of one could not be batch-normalised. Made for a network at
    initialisation; needs no training.

    Args:
        aggregation: "mean" or "sum" over the weights of the block.
        temperature: T; the larger, the less the first predictions matter.

    Raises (when called):
        CriterionError: all weights of a block are frozen, the loss is not finite, or an
            operation of the model cannot be differentiated twice.
        DataError: no data, fewer than two samples, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> data = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> len(score_blocks(resnet20(), Grasp(temperature=1.0), data).scores)
        7

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    2020.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True
    aggregation: Aggregation = "mean"
    temperature: float = 200.0

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation)

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        blocks = {block.name: context.trainable_weights(block) for block in context.blocks}
        theta = distinct((*blocks.values(), context.all_trainable_weights()))
        # Sums over each weight, for the products of one half need not wait for the other's.
        terms = saliencies(context, theta, self.temperature, of=total)
        values = map(math.fsum, zip(*terms, strict=True))
        scores = by_block(blocks, theta, values, self.aggregation)
        warn_if_all_zero(scores)
        return scores


def sensitivities(context: ScoringContext, theta: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Return `|theta * dL/dtheta|` of each single weight over the first batch, tensor by tensor."""
    batch = context.first_batch()
    with torch.enable_grad(), context.batch_statistics(), failures("snip"):
        gradient = gradient_of(loss_of(context, batch), theta)
    return ((w.detach() * g).abs_() for w, g in zip(theta, gradient, strict=True))


def saliencies(
    context: ScoringContext,
    theta: Sequence[nn.Parameter],
    temperature: float,
    *,
    of: Callable[[Tensor], T],
    among: Sequence[Tensor] | None = None,
) -> list[list[T]]:
    """Return `of(theta * H_h g)` of each tensor of `theta`, for each half `h` of the first batch.

    There is one, the whole batch, where that is too small to be split.

    `among`: 1 for each single weight that exists, 0 for one that is masked and takes no part in
    the gradient flow; None: all exist.
    """
    batch = context.first_batch()
    # Fused attention kernels have no second derivative; the plain one does.
    with (
        torch.enable_grad(),
        context.batch_statistics(),
        sdpa_kernel(SDPBackend.MATH),
        failures("grasp"),
    ):
        halves = _halves(context, batch)
        gradient = summed(
            gradient_of(loss_of(context, half, temperature), theta) for half in halves
        )
        if among is not None:
            gradient = [g * exists for g, exists in zip(gradient, among, strict=True)]
        return [
            [of(p) for p in _products(loss_of(context, half, temperature), theta, gradient)]
            for half in halves
        ]


def _total_gradient(context: ScoringContext, theta: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the sum over all batches of dL/dtheta; no graph outlives its batch."""
    return summed(gradient_of(loss_of(context, batch), theta) for batch in context.all_batches())


def _sensitivity(weight: Tensor, gradient: Tensor) -> float:
    """Return the sum of |weight * gradient|."""
    return total((weight.detach() * gradient).abs_())


def _norm(gradient: Tensor) -> float:
    """Return ||gradient||_2 in double precision, in which no square vanishes."""
    # Metal has no double precision.
    within_reach = gradient.cpu() if gradient.device.type == "mps" else gradient
    return float(torch.linalg.vector_norm(within_reach, dtype=torch.float64))


def _products(
    loss: Tensor, theta: Sequence[nn.Parameter], vector: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Yield theta * d(vector . dloss/dtheta)/dtheta, tensor by tensor."""
    gradient = gradient_of(loss, theta, differentiable=True)
    z = torch.stack([(v * g).sum() for v, g in zip(vector, gradient, strict=True)]).sum()
    if not z.requires_grad:
        # A loss that is linear in the weights: its Hessian is zero.
        yield from (torch.zeros_like(w) for w in theta)
        return
    _check_differentiable(z)
    product = gradient_of(z, theta)
    yield from (w.detach() * hg for w, hg in zip(theta, product, strict=True))


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


def _halves(context: ScoringContext, batch: Batch) -> tuple[Batch, ...]:
    """Return the two halves of a batch; the batch alone if a half is too small to be normalised."""
    size = len(batch)
    if size < 2:
        raise DataError(
            f"GraSP splits the batch in two halves, so it needs at least 2 samples, not {size}. "
            "Ten of each class are usual."
        )
    middle = size // 2
    if middle == 1 and _normalises_single_values(context, batch):
        return (batch,)
    return batch.part(0, middle), batch.part(middle, size)


def _normalises_single_values(context: ScoringContext, batch: Batch) -> bool:
    """Whether some batch norm is given one value per channel and sample.

    In training it refuses a single sample then, of which there is no variance.
    """
    found: list[bool] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].numel() == args[0].shape[0] * args[0].shape[1])

    norms = [m for m in context.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with torch.no_grad():
            context.outputs(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)
