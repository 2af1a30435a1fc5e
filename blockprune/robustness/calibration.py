"""Whether a network's confidence is deserved, and whether two networks decide alike."""

from __future__ import annotations

import torch
from torch import Tensor

from blockprune.errors import MeasurementError

__all__ = ["BINS", "agreement", "expected_calibration_error"]

BINS = 15
"""Number of bins that is usual."""


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Return the expected calibration error::

        ECE = sum over bins b of |b| / N * |accuracy(b) - confidence(b)|

    over bins of equal width, ``((k - 1) / bins, k / bins]``, of the largest softmax output.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)``, integers.
        bins: number of them, at least 1.

    Returns:
        A number in [0, 1]; 0 where confidence is deserved in every bin.

    Raises:
        MeasurementError: there are no images, the shapes do not fit, or a logit is NaN.

    Example:
        >>> import torch
        >>> from blockprune.robustness.calibration import expected_calibration_error
        >>> sure = torch.tensor([[100.0, 0.0]] * 4)
        >>> expected_calibration_error(sure, torch.tensor([0, 0, 0, 1]))
        0.25

    Source: Guo et al., "On calibration of modern neural networks", 2017, section 2.
    """
    _check(logits)
    if labels.shape != logits.shape[:1] or bins < 1:
        raise MeasurementError(
            f"Calibration needs one label for each of {len(logits)} rows and at least one bin; "
            f"got labels {tuple(labels.shape)} and {bins} bins."
        )
    confidence, decided = logits.detach().double().softmax(dim=1).max(dim=1)
    right = (decided == labels.to(decided.device)).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    # Within a bin |b| * |accuracy - confidence| is the size of the sum of differences.
    gaps.index_add_(0, place, right - confidence)
    return min(1.0, gaps.abs().sum().item() / len(logits))


def agreement(one: Tensor, other: Tensor) -> float:
    """Return the share of rows in which two networks' largest logits are of the same class.

    Raises:
        MeasurementError: there are no rows, the shapes differ, or a logit is NaN.

    Example:
        >>> import torch
        >>> from blockprune.robustness.calibration import agreement
        >>> agreement(torch.eye(2), torch.tensor([[3.0, 1.0], [2.0, 1.0]]))
        0.5
    """
    _check(one)
    _check(other)
    if one.shape != other.shape:
        raise MeasurementError(
            f"Decisions are compared row by row; got logits {tuple(one.shape)} and "
            f"{tuple(other.shape)}."
        )
    return (one.argmax(dim=1) == other.to(one.device).argmax(dim=1)).double().mean().item()


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or 0 in logits.shape:
        raise MeasurementError(f"Logits are (N, classes), both at least 1; got {logits.shape}.")
    if bool(logits.isnan().any()):
        raise MeasurementError("A logit is NaN, so the network decided nothing.")
