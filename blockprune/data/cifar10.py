"""CIFAR-10, the paper's data set, as torchvision reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from blockprune.data.images import ImageData
from blockprune.errors import DataError

__all__ = ["load_cifar10"]

# Per channel, over the 50,000 training images scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2470, 0.2435, 0.2616)


def load_cifar10(root: str | Path, *, download: bool = False, augment: bool = True) -> ImageData:
    """Return CIFAR-10: 50,000 training and 10,000 test images of 10 classes.

    Files are checked against the published checksums before they are read.

    Args:
        root: the folder that holds, or with ``download`` receives, ``cifar-10-batches-py``.
        download: fetch the 170 MB archive where the files are absent. Nothing is ever
            fetched otherwise.
        augment: crop training images at random after padding by 4 pixels and flip every
            other one, as the paper does; draws from torch's global generator.

    Returns:
        :class:`ImageData` with images ``(3, 32, 32)``, normalised per channel.

    Raises:
        DataError: the files are absent or damaged, or the download failed.

    Example:
        ``data = load_cifar10("data", download=True)``

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    # Here, since importing torchvision takes as long as importing torch.
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import v2

    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, DEVIATION),
    ]
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
    try:
        train = CIFAR10(
            root, train=True, transform=v2.Compose([*augmentation, *to_tensor]), download=download
        )
        test = CIFAR10(root, train=False, transform=v2.Compose(to_tensor))
    except (RuntimeError, OSError) as error:
        advice = (
            "The download did not succeed; try again, or put the files there by hand."
            if download
            else "Pass download=True to fetch them (170 MB), or the folder that holds "
            f"{CIFAR10.base_folder}."
        )
        raise DataError(f"CIFAR-10 was not found under {root}: {error} {advice}") from error
    return ImageData(
        name="CIFAR-10", train=train, test=test, num_classes=10, image_shape=(3, 32, 32)
    )
