"""The families of matrices that a gap is fitted with, and how strongly.

`P0` is the weight as it is, with its bias as the last row. Each method minimises

    sum over rows  m |[Z 1] P - R|^2  +  ridge * mean(diag G) * |P - P0|^2

over another family of P:

    refit   any P
    map     P = P0 T with T square (and a bias): ReplaceMe, NeurIPS 2025
    scale   P = a P0 with one number a: Prune&Comp
    moments as refit; then each output is scaled and shifted to the mean and the variance of R

What cannot be predicted from Z, a least-squares fit leaves at its mean. Its outputs vary less than
those they stand for, and the layers behind were trained on values that do not. `moments` gives up
some of the fit for that.

Where neither the operation nor the normalisation behind it has a bias, the last row stays zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from blockprune.errors import RecoveryError
from blockprune.recovery.gram import Gram

__all__ = ["FAMILIES", "RIDGES", "Fit", "Fitted", "fitted"]

RIDGES: Final = (*(10.0**k for k in range(-6, 3)), math.inf)
"""What is tried where none is asked for; infinity leaves the weight as it is."""

_UNCHOSEN: Final = 1e-2
"""Where there are too few samples to choose one."""

_ROUNDING: Final = 1e-10
"""What share of a mean square is no more than rounding."""

Fit = Callable[[Gram, Tensor, Tensor, float, bool], Tensor]


def refit(gram: Gram, start: Tensor, scales: Tensor, ridge: float, has_bias: bool) -> Tensor:
    """Return the best P of all."""
    if not has_bias:
        free = _solved(
            gram.products[:, :-1, :-1], gram.targets[:, :-1], start[:, :-1], ridge, gram.rows
        )
        return torch.cat([free, start[:, -1:]], dim=1)
    return _solved(gram.products, gram.targets, start, ridge, gram.rows)


def map_(gram: Gram, start: Tensor, scales: Tensor, ridge: float, has_bias: bool) -> Tensor:
    """Return the best P = P0 T."""
    outputs = start.shape[-1]
    # [Z 1] K = [Z P0 1]
    ones = torch.zeros_like(start[..., :1])
    ones[:, -1] = 1
    own = torch.cat([start, ones], dim=-1)
    own[:, -1, :-1] = 0
    mapped = Gram(own.mT @ gram.products @ own, own.mT @ gram.targets, gram.squares, gram.rows)
    identity = torch.eye(outputs, dtype=start.dtype, device=start.device)
    first = torch.cat([identity.expand(len(start), -1, -1), start[:, -1:]], dim=1)
    return own @ refit(mapped, first, scales, ridge, has_bias)


def scale(gram: Gram, start: Tensor, scales: Tensor, ridge: float, has_bias: bool) -> Tensor:
    """Return the best P = a P0; `scales` are what each output counts."""
    counts = scales.unsqueeze(1)
    length = ((gram.products @ start) * start * counts).sum()
    along = (gram.targets * start * counts).sum()
    if ridge == math.inf or not length > 0:
        return start
    return start * ((along + ridge * length) / (length + ridge * length))


def moments(gram: Gram, start: Tensor, scales: Tensor, ridge: float, has_bias: bool) -> Tensor:
    """Return the best P of all, with outputs that vary as much as what they are fitted to."""
    found = refit(gram, start, scales, ridge, has_bias)
    count = gram.products[:, -1:, -1:]
    mean, wanted_mean = gram.products[:, -1:] @ found / count, gram.targets[:, -1:] / count
    if not has_bias:
        mean, wanted_mean = torch.zeros_like(mean), torch.zeros_like(mean)
    square = ((gram.products @ found) * found).sum(dim=1, keepdim=True) / count
    variance = square - mean**2
    wanted = (gram.squares.unsqueeze(1) / count - wanted_mean**2).clamp_min(0)
    # One that does not vary, as far as digits go, cannot be made to.
    varies = variance > _ROUNDING * square
    factor = torch.where(varies, wanted / variance, 1).sqrt()
    shift = torch.zeros_like(found)
    shift[:, -1:] = wanted_mean - factor * mean
    return factor * found + shift


FAMILIES: Final[dict[str, Fit]] = {"refit": refit, "map": map_, "scale": scale, "moments": moments}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What was found for one operation.

    Attributes:
        matrix: P.
        ridge: what it was found with.
        gain: by how much the squared error of the stream is less than with P0.
        gram: the sums over all that was read.
    """

    matrix: Tensor
    ridge: float
    gain: float
    gram: Gram


def fitted(
    family: Fit,
    gram: Gram,
    held_out: Gram,
    start: Tensor,
    scales: Tensor,
    *,
    has_bias: bool,
    ridge: float | None,
) -> Fitted:
    """Fit a matrix of a family, with the ridge that does best on what is held out if None is given.

    Args:
        family: one of `FAMILIES`.
        gram, held_out: sums over two parts of the data; the result is fitted to both.
        start: P0.
        scales: what the square of each output counts in the stream; 0 leaves it as it is.
        has_bias: whether the last row may change.
        ridge: see the module.

    Raises:
        RecoveryError: there are too few rows for ridge 0.
    """

    def found(sums: Gram, ridge: float) -> Tensor:
        matrix = family(sums, start, scales, ridge, has_bias)
        return torch.where(scales.unsqueeze(1) > 0, matrix, start)

    def missing(sums: Gram, matrix: Tensor) -> float:
        return float((sums.errors(matrix) * scales).sum())

    if ridge is None:
        ridge = _UNCHOSEN
        if held_out.rows:
            ridge = _best_ridge(lambda r: missing(held_out, found(gram, r)))
    everything = gram + held_out
    matrix = found(everything, ridge)
    gain = missing(everything, start) - missing(everything, matrix)
    return Fitted(matrix, ridge, gain, everything)


def _best_ridge(error: Callable[[float], float]) -> float:
    errors: dict[float, float] = {}
    for ridge in RIDGES:
        try:
            errors[ridge] = error(ridge)
        except RecoveryError:
            continue  # Too few rows for so small a ridge.
    return min(errors, key=errors.__getitem__)


def _solved(products: Tensor, targets: Tensor, start: Tensor, ridge: float, rows: int) -> Tensor:
    """Return the P that solves the normal equations (G + r I) P = B + r P0."""
    if ridge == math.inf:
        return start
    size = products.shape[-1]
    if ridge == 0 and rows < size:
        raise RecoveryError(
            f"{rows} samples and positions do not determine {size} numbers for each output, as "
            "ridge=0 asks for. Pass more samples, or a larger ridge."
        )
    strength = ridge * products.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    eye = torch.eye(size, dtype=products.dtype, device=products.device)
    factor, failed = torch.linalg.cholesky_ex(products + strength * eye)
    if not bool(failed.any()):
        return torch.cholesky_solve(targets + strength * start, factor)
    # Inputs that are always zero (a ReLU that never fires) keep their weight.
    inverse: Tensor = torch.linalg.pinv(products + strength * eye, hermitian=True)
    return start + inverse @ (targets - products @ start)
