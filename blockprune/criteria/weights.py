"""Criteria that read the weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockprune.criteria.base import ScoringContext

__all__ = ["L1", "L2"]


@dataclass(frozen=True)
class L1:
    """L1: mean over filters of their L1 norm, summed over the block's layers.

    For the weights `W` of the block, with filters `w_f`, in the unit of a weight::

        score = sum over W of  mean over f of  ||w_f||_1

    A filter is what makes one output channel: a slice along the first axis, of a transposed
    convolution the second. Magnitudes differ from stage to stage, so across stages this score
    misleads; it is here as the control that shows so (papers/000, Figure 3).

    Reads no data. Made for a trained network: at initialisation it tells the sizes of the layers.

    Example:
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> import torch
        >>> len(score_blocks(resnet20(), L1(), example_inputs=torch.randn(1, 3, 32, 32)).scores)
        7

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017.
    """

    needs: ClassVar[str] = "nothing"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block; no data is read."""
        return _mean_filter_norms(context, order=1)


@dataclass(frozen=True)
class L2:
    """L2: mean over filters of their L2 norm, summed over the block's layers.

    For the weights `W` of the block, with filters `w_f`, in the unit of a weight::

        score = sum over W of  mean over f of  ||w_f||_2

    Filters are those of L1, and so is the warning: across stages this score misleads.

    Reads no data. Made for a trained network: at initialisation it tells the sizes of the layers.

    Example:
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> import torch
        >>> len(score_blocks(resnet20(), L2(), example_inputs=torch.randn(1, 3, 32, 32)).scores)
        7

    Source: He et al., "Soft filter pruning for accelerating deep convolutional neural networks",
    2018.
    """

    needs: ClassVar[str] = "nothing"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block; no data is read."""
        return _mean_filter_norms(context, order=2)


def _mean_filter_norms(context: ScoringContext, order: int) -> dict[str, float]:
    """Return, for each block, the sum over its weights of their mean filter norm."""
    groups = {
        f"{name}.weight" if name else "weight": module.groups
        for name, module in context.model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.conv._ConvTransposeNd)
    }
    return {
        block.name: math.fsum(
            _mean_norm(_filters(weight.detach(), groups.get(name)), order)
            for name, weight in context.weights(block).items()
        )
        for block in context.blocks
    }


def _filters(weight: Tensor, transposed_groups: int | None) -> Tensor:
    """Return the filters as rows: (filters, weights of each)."""
    if transposed_groups is not None:
        # (inputs, outputs of a group, ...), the inputs one group after the other.
        inputs = weight.shape[0] // transposed_groups
        grouped = weight.reshape(transposed_groups, inputs, *weight.shape[1:])
        weight = grouped.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1) if weight.dim() > 1 else weight.reshape(-1, 1)


def _mean_norm(rows: Tensor, order: int) -> float:
    """Return the mean norm of the rows, in double precision wherever they lie."""
    norms = torch.linalg.vector_norm(rows.cpu(), order, dim=1, dtype=torch.float64)
    return float(norms.sum()) / max(len(norms), 1)
