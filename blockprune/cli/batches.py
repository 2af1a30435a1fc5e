"""The batch that ``--data`` names, in the shape that the model reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from blockprune.data import load_cifar10, load_digits
from blockprune.errors import DataError

__all__ = ["scoring_batch"]

# GraSP's batch: ten images of each of ten classes.
IMAGES_PER_CLASS = 10


def scoring_batch(
    data: str, inputs: tuple[Tensor, ...], *, root: Path, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Return ``(images, labels)`` of a data set, ten images a class.

    Args:
        data: ``digits``, ``cifar10`` or ``random``.
        inputs: example inputs of the model, whose channels and size the images must take.
        root: the folder that holds CIFAR-10.
        seed: of the split of the digits.

    Returns:
        None for ``random``: scoring then draws a batch itself, and says so.

    Raises:
        DataError: the data set is absent, or its images are not what the model reads.
    """
    if data == "random":
        return None
    shape = tuple(inputs[0].shape)
    square = len(inputs) == 1 and len(shape) == 4 and shape[2] == shape[3]
    if data == "digits":
        if not square or shape[1] not in (1, 3):
            raise _misfit(data, "square images of 1 or 3 channels", inputs)
        images = load_digits(image_size=shape[2], seed=seed)
    else:
        if not square or shape[1:] != (3, 32, 32):
            raise _misfit(data, "3x32x32 images (try --input-shape 1,3,32,32)", inputs)
        images = load_cifar10(root, augment=False)
    chosen, labels = _first_of_each(images.train, images.num_classes)
    grey = chosen.shape[1] == 1
    batch = chosen.expand(-1, shape[1], -1, -1).contiguous() if grey else chosen
    return batch.to(inputs[0]), labels.to(inputs[0].device)


def _first_of_each(
    dataset: torch.utils.data.Dataset[tuple[Tensor, Tensor | int]], classes: int
) -> tuple[Tensor, Tensor]:
    """Return the first images of every class, in the order of the data set."""
    counts = [0] * classes
    images: list[Tensor] = []
    labels: list[int] = []
    index = 0
    while min(counts) < IMAGES_PER_CLASS:
        image, label = dataset[index]
        index += 1
        if counts[int(label)] < IMAGES_PER_CLASS:
            counts[int(label)] += 1
            images.append(image)
            labels.append(int(label))
    return torch.stack(images), torch.tensor(labels)


def _misfit(data: str, wanted: str, inputs: tuple[Tensor, ...]) -> DataError:
    shapes = ", ".join("x".join(str(n) for n in tensor.shape) for tensor in inputs)
    return DataError(f"--data {data} needs a model of {wanted}; this one reads {shapes}.")
