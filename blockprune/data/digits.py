"""Handwritten digits: the real data set that scikit-learn carries, no download needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits as _sklearn_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import TensorDataset

from blockprune.data.images import ImageData
from blockprune.errors import DataError

__all__ = ["load_digits"]

NATIVE_SIZE = 8
"""Height and width of the images as they come, in pixels."""

GREY_LEVELS = 16.0
"""The pixels are whole numbers from 0 to this."""


def load_digits(
    *, image_size: int = NATIVE_SIZE, test_share: float = 0.2, seed: int = 0
) -> ImageData:
    """Return 1,797 grey images of the digits 0 to 9, split by class in the same shares.

    Pixels are scaled to [0, 1], then shifted and scaled to mean 0 and standard deviation
    1 over the training images (test images with the same two numbers).

    Args:
        image_size: height and width in pixels, at least 8; more than the native 8 is
            bilinear interpolation and adds no information.
        test_share: share of the images that go to the test set, inside (0, 1).
        seed: of the split; the same seed gives the same split.

    Returns:
        :class:`ImageData` with images ``(1, image_size, image_size)``.

    Raises:
        DataError: an argument is out of range.

    Example:
        >>> from blockprune.data import load_digits
        >>> data = load_digits()
        >>> len(data.train), len(data.test), data.image_shape
        (1437, 360, (1, 8, 8))

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    if image_size < NATIVE_SIZE:
        raise DataError(f"image_size must be at least {NATIVE_SIZE}, got {image_size}.")
    if not 0 < test_share < 1:
        raise DataError(f"test_share must lie between 0 and 1, got {test_share}.")
    pixels, labels = _sklearn_digits(return_X_y=True)
    try:
        train_rows, test_rows = train_test_split(
            np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise DataError(
            f"{len(labels)} digits cannot be split with test_share={test_share}: {error}"
        ) from error
    scaled = pixels / GREY_LEVELS
    mean, deviation = scaled[train_rows].mean(), scaled[train_rows].std()
    normalised = (scaled - mean) / deviation
    return ImageData(
        name="digits",
        train=_tensors(normalised[train_rows], labels[train_rows], image_size),
        test=_tensors(normalised[test_rows], labels[test_rows], image_size),
        num_classes=10,
        image_shape=(1, image_size, image_size),
        mean=(float(mean),),
        deviation=(float(deviation),),
    )


def _tensors(pixels: NDArray[Any], labels: NDArray[Any], image_size: int) -> TensorDataset:
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, NATIVE_SIZE, NATIVE_SIZE)
    if image_size != NATIVE_SIZE:
        images = functional.interpolate(images, size=image_size, mode="bilinear")
    return TensorDataset(images, torch.tensor(labels, dtype=torch.int64))
