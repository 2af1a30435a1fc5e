"""Criteria that read the weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockprune.criteria.base import ScoringContext, total

__all__ = ["L1"]


@dataclass(frozen=True)
class L1:
    """L1: mean over filters of their L1 norm, summed over the block's layers.

    For the weights `W` of the block, with filters `w_f`::

        score = sum over W of  mean over f of  ||w_f||_1

    A filter is what makes one output channel: a slice along the first axis, of a transposed
    convolution the second. Magnitudes differ from stage to stage, so across stages this score
    misleads; it is here as the control that shows so (papers/000, Figure 3).

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017.
    """

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block; no data is read."""
        filters = {
            f"{name}.weight" if name else "weight": module.out_channels
            for name, module in context.model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.modules.conv._ConvTransposeNd)
        }
        return {
            block.name: math.fsum(
                _mean_filter_norm(weight, filters.get(name))
                for name, weight in context.weights(block).items()
            )
            for block in context.blocks
        }


@torch.no_grad()
def _mean_filter_norm(weight: Tensor, filters: int | None) -> float:
    """Return ||weight||_1 over its number of filters, the first axis where none is given."""
    if filters is None:
        filters = weight.shape[0] if weight.dim() else 1
    return total(weight.abs()) / max(filters, 1)
