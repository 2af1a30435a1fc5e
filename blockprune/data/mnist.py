"""MNIST, as torchvision reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockprune.data.files import reading, to_tensor
from blockprune.data.images import ImageData

__all__ = ["load_mnist"]

# Over the 60,000 training images scaled to [0, 1].
MEAN, DEVIATION = (0.1307,), (0.3081,)
SHAPE = (28, 28)
CLASSES = 10


def load_mnist(root: str | Path, *, download: bool = False) -> ImageData:
    """Return MNIST: 60,000 training and 10,000 test images of the digits 0 to 9, not augmented.

    Args:
        root: the folder that holds, or with ``download`` receives, ``MNIST/raw`` with the
            four unpacked ``idx-ubyte`` files.
        download: fetch the 12 MB of archives where the files are absent; each is compared
            with its published checksum. Nothing is ever fetched otherwise.

    Returns:
        :class:`ImageData` with images ``(1, 28, 28)``, normalised.

    Raises:
        DataError: the files are absent or damaged, or the download failed.

    Example:
        ``data = load_mnist("data", download=True)``

    Source: Y. LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """
    from torchvision.datasets import MNIST

    root = Path(root).expanduser()
    advice = (
        "The download did not succeed; try again, or put the files there by hand."
        if download
        else "Pass download=True to fetch them (12 MB), or unpack the published .gz files there."
    )
    files = [Path(archive).stem for archive, _ in MNIST.resources]
    with reading("MNIST", root, f"MNIST/raw with {', '.join(files)}", advice):
        transform = to_tensor(MEAN, DEVIATION)
        train = MNIST(root, train=True, transform=transform, download=download)
        test = MNIST(root, train=False, transform=transform)
        for part in (train, test):
            _check(part)
    return ImageData(
        name="MNIST",
        train=train,
        test=test,
        num_classes=CLASSES,
        image_shape=(1, *SHAPE),
        mean=MEAN,
        deviation=DEVIATION,
    )


def _check(part: Any) -> None:
    """Compare the two files of a part; torchvision takes each as it is."""
    images, labels = tuple(part.data.shape), len(part.targets)
    if images != (labels, *SHAPE):
        raise ValueError(f"{labels} labels go with images of shape {images}")
    if labels and int(part.targets.max()) >= CLASSES:
        raise ValueError(f"a label is {int(part.targets.max())}")
