"""What a data set is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blockprune.data.order import EpochSampler, SeededItems, size_of
from blockprune.errors import DataError

__all__ = ["ImageData", "balanced_batch"]


@dataclass(frozen=True)
class ImageData:
    """A classification data set, split once and for all.

    Attributes:
        name: what reports call it.
        train: map-style data set of ``(image, label)``; images are float tensors.
        test: the same, for evaluation only.
        num_classes: labels run from 0 to ``num_classes - 1``.
        image_shape: ``(channels, height, width)`` of one image.
        mean: what images have been normalised by: ``(pixel - mean) / deviation`` of pixels in
            [0, 1], a number for each channel, or one for all.
        deviation: likewise.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)


def balanced_batch(
    dataset: Dataset[Any], num_classes: int, per_class: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ``per_class`` samples of every class, drawn by ``seed``, as one batch.

    The classes take turns (0, 1, 2, ..., 0, 1, 2, ...), so that halves are balanced too.
    An augmented sample is what epoch 0 of training with that seed sees of it.

    Args:
        dataset: map-style, of ``(image, label)``, labels from 0 to ``num_classes - 1``.
        num_classes: number of classes.
        per_class: samples of each, at least 1.
        seed: of the draw, and of what the samples draw themselves.

    Returns:
        Images ``(num_classes * per_class, ...)`` and int64 labels.

    Raises:
        DataError: ``per_class`` < 1, or a class has fewer samples.

    Example:
        >>> from blockprune.data import balanced_batch, load_digits
        >>> images, labels = balanced_batch(load_digits().train, 10, per_class=2)
        >>> images.shape, labels[:10].tolist()
        (torch.Size([20, 1, 8, 8]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if per_class < 1:
        raise DataError(f"per_class must be at least 1, got {per_class}.")
    drawn: dict[int, list[Any]] = {label: [] for label in range(num_classes)}
    order = EpochSampler(size_of(dataset), seed)
    items = SeededItems(dataset, order)
    for index in order:
        image, label = items[index]
        row = drawn.get(int(label))
        if row is not None and len(row) < per_class:
            row.append(image)
        if all(len(images) == per_class for images in drawn.values()):
            break
    scarce = [label for label, images in drawn.items() if len(images) < per_class]
    if scarce:
        raise DataError(
            f"{per_class} samples a class were asked for; class {scarce[0]} has "
            f"{len(drawn[scarce[0]])}."
        )
    images = torch.stack([drawn[label][k] for k in range(per_class) for label in drawn])
    return images, torch.arange(num_classes).repeat(per_class)
