"""Importances of single weights from nothing but the weights of their layer.

Each is a function of ``w``, the absolute values of a layer's weight in float64, and of which of
them survive; sums, minima and maxima are over the survivors. It returns a tensor of that shape,
higher = kept; what it holds for a pruned weight is not looked at.

============  =====================================================  ======================
name          importance of a survivor                               of a layer
============  =====================================================  ======================
`magnitude`   ``w``                                                  layers compare as they are
`l1`          ``w / sum w'``                                         sums to 1
`l2`          ``w^2 / sum w'^2``                                     sums to 1
`softmax`     ``exp w / sum exp w'``                                 sums to 1; at least
                                                                     ``1 / sum exp w'``
`minmax`      ``(w - min w') / (max w' - min w')``                   from 0 to 1
`lamp`        ``w^2 / sum of w'^2 over w' >= w``                     the largest has 1
============  =====================================================  ======================

A layer whose survivors are all 0 has importance 0 under `l1`, `l2` and `lamp`, whose sums are 0
then: it computes nothing. Where all survivors are equal, `minmax` is 0/0 and defined as 1: each is
the largest of its layer, and the largest always has 1. So the last weight of a layer goes after all
that are not the largest of theirs, as under `lamp`, and no layer collapses by the definition of a
quotient that does not exist.

Sources: papers/003, "Considering layerwise importance in the lottery ticket hypothesis"
(Vandersmissen and Oramas, 2023), and Lee et al., "Layer-adaptive sparsity for the magnitude-based
pruning", 2021 (`lamp`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LayerImportance", "l1", "l2", "lamp", "magnitude", "minmax", "softmax"]

LayerImportance = Callable[[Tensor, Tensor], Tensor]


def magnitude(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``w``."""
    return weight * keep


def l1(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``w / sum w'``."""
    return _share(weight * keep)


def l2(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``w^2 / sum w'^2``."""
    return _share(_scaled(weight * keep).square())


def softmax(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``exp w / sum exp w'``."""
    if not bool(keep.any()):
        return torch.zeros_like(weight)
    # torch subtracts the largest first, so that nothing overflows.
    survivors = weight.masked_fill(~keep, -torch.inf)
    return survivors.flatten().softmax(dim=0).reshape(weight.shape)


def minmax(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``(w - min w') / (max w' - min w')``; 1 where all are equal."""
    survivors = weight[keep]
    if not survivors.numel():
        return torch.zeros_like(weight)
    low, high = survivors.min(), survivors.max()
    if bool(low == high):
        return keep.to(weight.dtype)
    return (weight - low) / (high - low) * keep


def lamp(weight: Tensor, keep: Tensor) -> Tensor:
    """Return ``w^2 / sum of w'^2 over w' >= w``, equal weights being each in the other's sum."""
    squares = _scaled(weight * keep).square().flatten()
    ascending = squares.sort().values
    from_each_on = ascending.flip(0).cumsum(0).flip(0)
    denominators = from_each_on[torch.searchsorted(ascending, squares)]
    # 0 / 0 in a layer of zeros.
    return torch.where(squares > 0, squares / denominators, 0.0).reshape(weight.shape)


def _share(values: Tensor) -> Tensor:
    whole = values.sum()
    return values / whole if bool(whole != 0) else values


def _scaled(weight: Tensor) -> Tensor:
    """Return the weight over its largest: a quotient of squares stays, and none underflows."""
    largest = weight.max() if weight.numel() else torch.zeros(())
    return weight / largest if bool(largest != 0) else weight
