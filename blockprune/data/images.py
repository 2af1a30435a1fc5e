"""What a data set is here, and the one order in which it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from blockprune.errors import DataError

__all__ = ["EpochSampler", "ImageData", "balanced_batch", "make_loader", "size_of"]


@dataclass(frozen=True)
class ImageData:
    """A classification data set, split once and for all.

    Attributes:
        name: what reports call it.
        train: map-style data set of ``(image, label)``; images are float tensors.
        test: the same, for evaluation only.
        num_classes: labels run from 0 to ``num_classes - 1``.
        image_shape: ``(channels, height, width)`` of one image.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    image_shape: tuple[int, int, int]


class EpochSampler(Sampler[int]):
    """The indices ``0 .. size - 1`` in an order that depends on ``(seed, epoch)`` alone.

    An interrupted run that resumes at epoch ``e`` thus sees the batches it would have
    seen, whatever else drew from torch's generators in between.

    Example:
        >>> from blockprune.data import EpochSampler
        >>> sampler = EpochSampler(5, seed=0)
        >>> sampler.set_epoch(3)
        >>> sorted(sampler) == [0, 1, 2, 3, 4] and list(sampler) == list(sampler)
        True
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` (0-based) from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Large odd multipliers keep (seed, epoch) and (seed + 1, epoch - 1) apart.
        generator.manual_seed((self.seed * 1_000_003 + self.epoch * 7_919) % 2**63)
        yield from torch.randperm(self.size, generator=generator).tolist()


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of samples of a map-style data set; `DataError` where there is none."""
    length = getattr(dataset, "__len__", None)
    if length is None:
        raise DataError(
            f"{type(dataset).__name__} has no length; a map-style data set is needed, "
            "one with __len__ and __getitem__."
        )
    count = int(length())
    if count == 0:
        raise DataError("The data set is empty; at least one sample is needed.")
    return count


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, seed: int | None = None
) -> DataLoader[Any]:
    """Return a loader over ``dataset``: shuffled by ``(seed, epoch)``, or in order.

    Args:
        dataset: a map-style data set, not empty.
        batch_size: samples a batch; the last batch may be smaller.
        seed: shuffle with an :class:`EpochSampler` of this seed; None keeps the order.

    Returns:
        A loader that draws nothing from torch's global generator.

    Raises:
        DataError: the data set is empty or has no length, or ``batch_size`` < 1.
    """
    count = size_of(dataset)
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")
    # A loader takes a seed for its workers from a generator at each pass, from torch's
    # global one unless it has its own.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=None if seed is None else EpochSampler(count, seed),
        generator=torch.Generator().manual_seed(0),
    )


def balanced_batch(
    dataset: Dataset[Any], num_classes: int, per_class: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ``per_class`` samples of every class, drawn by ``seed``, as one batch.

    The classes take turns (0, 1, 2, ..., 0, 1, 2, ...), so that halves are balanced too.

    Args:
        dataset: map-style, of ``(image, label)``, labels from 0 to ``num_classes - 1``.
        num_classes: number of classes.
        per_class: samples of each, at least 1.
        seed: of the draw.

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
    for index in EpochSampler(size_of(dataset), seed):
        image, label = dataset[index]
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
