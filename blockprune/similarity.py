"""How alike two sets of features are: centred kernel alignment (CKA)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_cka"]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA: how alike the similarities between samples are, seen by two sets of features.

    With both centred over the samples::

        CKA = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)

    It is 1 where one is a rotation and a scaling of the other, and does not change with either.
    Computed in float64, from whichever of the sample and the feature products are smaller.

    Args:
        x, y: (samples, features), of the same samples; the numbers of features may differ.

    Returns:
        A number in [0, 1]; NaN where one of them is the same for all samples.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(linear_cka(x, 3 * x.flip(1)), 6)
        1.0

    Source: Kornblith et al., "Similarity of neural network representations revisited", 2019.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            "CKA compares two matrices of as many samples, (samples, features); "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    x, y = (_centred(features) for features in (x, y))
    if len(x) <= max(x.shape[1], y.shape[1]):
        k, m = x @ x.T, y @ y.T
        shared, alone = (k * m).sum(), (k.norm() * m.norm())
    else:
        shared, alone = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(shared / alone)


def _centred(features: Tensor) -> Tensor:
    wide = features.detach().to(torch.float64)
    centred = wide - wide.mean(0)
    # What is left of a constant by rounding is no variation.
    noise = torch.finfo(features.dtype).eps * wide.abs().amax(0, keepdim=True)
    return torch.where(centred.abs() <= noise, 0.0, centred)
