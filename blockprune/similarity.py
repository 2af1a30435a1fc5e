"""How alike two sets of features are: centred kernel alignment (CKA)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from blockprune.errors import MeasurementError

__all__ = ["MinibatchCKA", "linear_cka", "minibatch_cka"]

FEWEST_SAMPLES = 4
"""Below these the unbiased estimate divides by zero."""


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

    Raises:
        MeasurementError: not two matrices of as many samples.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(linear_cka(x, 3 * x.flip(1)), 6)
        1.0

    Source: Kornblith et al., "Similarity of neural network representations revisited", 2019.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise MeasurementError(
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


def minibatch_cka(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Linear CKA from minibatches, unbiased; see `MinibatchCKA`.

    Args:
        batches: pairs (x, y) of (samples, features), of the same samples.

    Returns:
        A number up to 1, about 0 for independent features.

    Raises:
        MeasurementError: no batch, one of fewer than 4 samples, or not two matrices.

    Example:
        >>> import torch
        >>> x = torch.arange(20.0).reshape(10, 2) ** 2
        >>> round(minibatch_cka([(x[:5], 3 * x[:5]), (x[5:], 3 * x[5:])]), 6)
        1.0
    """
    meter = MinibatchCKA()
    for x, y in batches:
        meter.update([x], [y])
    return float(meter.values())


class MinibatchCKA:
    """Linear CKA between every one of several features and every one of several others.

    With K = XX' and L = YY', their diagonals set to zero, of a batch of n samples::

        HSIC(K, L) = [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 * 1'KL1 / (n-2)] / (n (n-3))
        CKA        = mean HSIC(K, L) / sqrt(mean HSIC(K, K) * mean HSIC(L, L))

    where the means are over the batches. Each HSIC is unbiased, so that the result does not depend
    on the size of the batches as `linear_cka` does, which finds likeness in what is independent.
    Memory is that of one batch. Computed in float64.

    Example:
        >>> import torch
        >>> from blockprune.similarity import MinibatchCKA
        >>> x = torch.arange(20.0).reshape(10, 2) ** 2
        >>> meter = MinibatchCKA()
        >>> meter.update([x[:5], x[:5] @ torch.ones(2, 3)], [x[:5]])
        >>> meter.update([x[5:], x[5:] @ torch.ones(2, 3)], [x[5:]])
        >>> meter.values().shape
        torch.Size([2, 1])

    Source: Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", 2021.
    """

    def __init__(self) -> None:
        self._shared: Tensor | None = None
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Look at one batch.

        Args:
            xs: (samples, features) each, of the same samples; as many at every call.
            ys: likewise, of the same samples.

        Raises:
            MeasurementError: not matrices of as many samples, fewer than 4 of them, or not as many
                features as before.
        """
        _check(xs, ys)
        first, second = _aligned(xs), _aligned(ys)
        found = (first @ second.T, first.square().sum(1), second.square().sum(1))
        if self._shared is None or self._first is None or self._second is None:
            self._shared, self._first, self._second = found
            return
        if self._shared.shape != found[0].shape:
            raise MeasurementError(
                f"This batch has {len(xs)} and {len(ys)} features, those before "
                f"{self._shared.shape[0]} and {self._shared.shape[1]}: give the same at every call."
            )
        self._shared += found[0]
        self._first += found[1]
        self._second += found[2]

    def values(self) -> Tensor:
        """Return the CKA of each of `xs` (a row) with each of `ys` (a column).

        NaN where one of them is the same for all samples of every batch.

        Raises:
            MeasurementError: no batch was seen.
        """
        if self._shared is None or self._first is None or self._second is None:
            raise MeasurementError("There is no CKA of no samples: give at least one batch of 4.")
        return self._shared / (self._first[:, None] * self._second).sqrt()


def _check(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
    shapes = [tuple(features.shape) for features in (*xs, *ys)]
    if not xs or not ys:
        raise MeasurementError(f"CKA compares features; got {len(xs)} and {len(ys)} of them.")
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise MeasurementError(
            "CKA compares matrices of as many samples, (samples, features); "
            f"got shapes {', '.join(map(str, dict.fromkeys(shapes)))}."
        )
    if shapes[0][0] < FEWEST_SAMPLES:
        raise MeasurementError(
            f"Unbiased CKA needs batches of at least {FEWEST_SAMPLES} samples; this one has "
            f"{shapes[0][0]}. Use larger batches, and drop a last one that is smaller."
        )


def _aligned(several: Sequence[Tensor]) -> Tensor:
    """Return one row for each, such that HSIC(K, L) is the product of their rows.

    Off the diagonal, with the rows of K summing to k, U = K - (k_i + k_j) / (n-2)
    + 1'K1 / ((n-1)(n-2)); on it, U = 0. Then sum(U * V) / (n (n-3)) is the HSIC of the class
    above, and the square of K's own is a sum of squares.
    """
    return torch.stack([_double_centred(_centred(features)) for features in several])


def _double_centred(x: Tensor) -> Tensor:
    n = len(x)
    gram = (x @ x.T).fill_diagonal_(0)
    sums = gram.sum(0)
    gram -= (sums[:, None] + sums) / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0).flatten() / math.sqrt(n * (n - 3))


def _centred(features: Tensor) -> Tensor:
    wide = features.detach().to(torch.float64)
    centred = wide - wide.mean(0)
    # What is left of a constant by rounding is no variation.
    noise = torch.finfo(features.dtype).eps * wide.abs().amax(0, keepdim=True)
    return torch.where(centred.abs() <= noise, 0.0, centred)
