"""CIFAR-10, the paper's data set, and CIFAR-100, as torchvision reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockprune.data.files import reading, to_tensor
from blockprune.data.images import ImageData

__all__ = ["load_cifar10", "load_cifar100"]

# Per channel, over the 50,000 training images scaled to [0, 1].
MEAN_10, DEVIATION_10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MEAN_100, DEVIATION_100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def load_cifar10(root: str | Path, *, download: bool = False, augment: bool = True) -> ImageData:
    """Return CIFAR-10: 50,000 training and 10,000 test images of 10 classes.

    The published files are pickles, which can run code when they are read. Each file is
    therefore compared with its published MD5 checksum first, and refused if it differs.

    Args:
        root: the folder that holds, or with ``download`` receives, ``cifar-10-batches-py``.
        download: fetch the 170 MB archive where the files are absent. Nothing is ever
            fetched otherwise.
        augment: crop training images at random after padding by 4 pixels and flip every
            other one, as the paper does.

    Returns:
        :class:`ImageData` with images ``(3, 32, 32)``, normalised per channel.

    Raises:
        DataError: the files are absent or damaged, or the download failed.

    Example:
        ``data = load_cifar10("data", download=True)``

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", 10, MEAN_10, DEVIATION_10, root, download, augment)


def load_cifar100(root: str | Path, *, download: bool = False, augment: bool = True) -> ImageData:
    """Return CIFAR-100: 50,000 training and 10,000 test images, labelled by the 100 fine classes.

    The published files are pickles; see :func:`load_cifar10` for how they are guarded.

    Args:
        root: the folder that holds, or with ``download`` receives, ``cifar-100-python``.
        download: fetch the 170 MB archive where the files are absent. Nothing is ever
            fetched otherwise.
        augment: as for CIFAR-10.

    Returns:
        :class:`ImageData` with images ``(3, 32, 32)``, normalised per channel.

    Raises:
        DataError: the files are absent or damaged, or the download failed.

    Example:
        ``data = load_cifar100("data", download=True)``

    Source: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", 100, MEAN_100, DEVIATION_100, root, download, augment)


def _cifar(
    published: Any,
    name: str,
    num_classes: int,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    root: str | Path,
    download: bool,
    augment: bool,
) -> ImageData:
    from torchvision.transforms import v2

    root = Path(root).expanduser()
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
    advice = (
        "The download did not succeed; try again, or put the files there by hand."
        if download
        else "Pass download=True to fetch them (170 MB), or the folder that holds "
        f"{published.base_folder}."
    )
    files = [file for file, _ in (*published.train_list, *published.test_list)]
    wanted = f"{published.base_folder} with {', '.join(files)} and {published.meta['filename']}"
    with reading(name, root, wanted, advice):
        train = published(
            root,
            train=True,
            transform=to_tensor(mean, deviation, *augmentation),
            download=download,
        )
        test = published(root, train=False, transform=to_tensor(mean, deviation))
    return ImageData(
        name=name,
        train=train,
        test=test,
        num_classes=num_classes,
        image_shape=(3, 32, 32),
        mean=mean,
        deviation=deviation,
    )
