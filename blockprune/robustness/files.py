"""Published corrupted and shifted test sets, read from their files; no file can run code.

What comes out is pixels in [0, 1], before any normalisation.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from blockprune.errors import DataError
from blockprune.robustness.corruptions import check_corruption
from blockprune.robustness.record import SEVERITIES

__all__ = ["CorruptedFiles", "load_cifar10_1", "load_cifar10_2", "load_labelled_folder"]

_CIFAR_C = (
    "CIFAR-10-C is https://zenodo.org/record/2535967, CIFAR-100-C "
    "https://zenodo.org/record/3555552; unpack the archive and give the folder that holds "
    "labels.npy."
)
_IMAGENET_C = (
    "ImageNet-C is https://zenodo.org/record/2235448; unpack its archives into one folder, "
    "<corruption>/<severity>/<class>/*.JPEG."
)
_CIFAR10_1 = "The files are in https://github.com/modestyachts/CIFAR-10.1, folder datasets."
_CIFAR10_2 = "The file is in https://github.com/modestyachts/cifar-10.2."

_CIFAR_SHAPE = (32, 32, 3)


class CorruptedFiles:
    """CIFAR-10-C, CIFAR-100-C or ImageNet-C, or a set in the form of one of them.

    CIFAR's form is ``<corruption>.npy``, bytes ``(5 n, 32, 32, 3)`` of which the rows
    ``(s - 1) n`` to ``s n`` have severity `s`, and ``labels.npy`` with a label for each row, or
    for each of the `n` images; `n` is 10,000 as published. ImageNet's form is
    ``<corruption>/<severity>/<class>/*.JPEG``, where a class's label is the place of its name
    among the sorted names.

    Args:
        folder: that holds the files.

    Raises:
        DataError: the folder has neither form.

    Example:
        ``images = CorruptedFiles("CIFAR-10-C").read("fog", 3)``

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", 2019.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"There is no folder {self.folder}. {_CIFAR_C} {_IMAGENET_C}")
        self._in_arrays = (self.folder / "labels.npy").exists()
        if not self._in_arrays and not any(self.folder.glob("*/[1-5]/*")):
            raise DataError(
                f"{self.folder} has no labels.npy, nor <corruption>/<severity>/<class>. "
                f"{_CIFAR_C} {_IMAGENET_C}"
            )

    def read(self, name: str, severity: int) -> Dataset[Any]:
        """Return the images of one corruption and severity, ``(image, label)``, in [0, 1].

        CIFAR's images are ``(3, 32, 32)``, left in the file until they are asked for;
        ImageNet's are as large as their file.

        Raises:
            DataError: there is no such corruption or severity; a file is absent or damaged, or
                has another shape or dtype. The message says where to get it.
        """
        check_corruption(name, severity)
        if not self._in_arrays:
            return load_labelled_folder(self.folder / name / str(severity), advice=_IMAGENET_C)
        pixels = _array(self.folder / f"{name}.npy", _CIFAR_C)
        _check_pixels(pixels, self.folder / f"{name}.npy", _CIFAR_C)
        rows, rest = divmod(len(pixels), len(SEVERITIES))
        if rest or not rows:
            raise DataError(
                f"{self.folder / name}.npy has {len(pixels)} images, which are not five severities "
                f"of as many each (50000 as published). {_CIFAR_C}"
            )
        labels = _array(self.folder / "labels.npy", _CIFAR_C)
        if labels.shape not in ((len(pixels),), (rows,)):
            raise DataError(
                f"{self.folder / 'labels.npy'} has the shape {labels.shape}; {len(pixels)} images "
                f"need ({len(pixels)},) or ({rows},). {_CIFAR_C}"
            )
        own = slice((severity - 1) * rows, severity * rows)
        chosen = labels[own] if len(labels) == len(pixels) else labels
        return _Pixels(pixels[own], _labels(chosen, self.folder / "labels.npy", _CIFAR_C))


def load_cifar10_1(folder: str | Path, version: str = "v6") -> Dataset[Any]:
    """Return CIFAR-10.1, images ``(3, 32, 32)`` in [0, 1] with labels.

    Args:
        folder: that holds ``cifar10.1_<version>_data.npy`` and ``..._labels.npy``.
        version: "v6" (2,000 images, of balanced classes) or "v4" (2,021).

    Raises:
        DataError: a file is absent, damaged or of another shape or dtype.

    Example:
        ``shifted = load_cifar10_1("CIFAR-10.1/datasets")``

    Source: Recht et al., "Do CIFAR-10 classifiers generalize to CIFAR-10?", 2018.
    """
    if version not in ("v4", "v6"):
        raise DataError(f"CIFAR-10.1 has the versions v4 and v6, not {version!r}. {_CIFAR10_1}")
    folder = Path(folder).expanduser()
    path = folder / f"cifar10.1_{version}_data.npy"
    pixels = _array(path, _CIFAR10_1)
    _check_pixels(pixels, path, _CIFAR10_1)
    where = folder / f"cifar10.1_{version}_labels.npy"
    return _paired(pixels, _array(where, _CIFAR10_1), where, _CIFAR10_1)


def load_cifar10_2(folder: str | Path) -> Dataset[Any]:
    """Return the test set of CIFAR-10.2: 2,000 images ``(3, 32, 32)`` in [0, 1] with labels.

    Args:
        folder: that holds ``cifar102_test.npz``.

    Raises:
        DataError: the file is absent, damaged, or lacks ``images`` or ``labels`` in the
            published shapes.

    Example:
        ``shifted = load_cifar10_2("cifar-10.2")``

    Source: Lu et al., "Harder or different? A closer look at distribution shift in dataset
    reproduction", 2020.
    """
    path = Path(folder).expanduser() / "cifar102_test.npz"
    try:
        with np.load(path, allow_pickle=False) as members:
            found = {name: members[name] for name in ("images", "labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as CIFAR-10.2 with images and labels: {error}. {_CIFAR10_2}"
        ) from error
    _check_pixels(found["images"], path, _CIFAR10_2)
    return _paired(found["images"], found["labels"], path, _CIFAR10_2)


def load_labelled_folder(
    folder: str | Path, *, image_size: int | None = None, advice: str = ""
) -> Dataset[Any]:
    """Return the images of a folder of folders, one a class, as pixels in [0, 1] with labels.

    Args:
        folder: that holds ``<class>/<image>``; a class's label is the place of its name among
            the sorted names.
        image_size: resize the shorter side to 8/7 of this and cut out the middle, as ImageNet's
            test images are (256 and 224); None: images are as they come.
        advice: for the error's end, how to get the files.

    Raises:
        DataError: there is no such folder, or no image in it. One that cannot be read is named
            when it is asked for.

    Example:
        ``shifted = load_labelled_folder("imagenet-v2", image_size=224)``
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is in pixels, 1 or more; got {image_size}.")
    resize = (
        []
        if image_size is None
        else [v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size)]
    )
    transform = v2.Compose([*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    try:
        return ImageFolder(Path(folder).expanduser(), transform, loader=_read)  # type: ignore[no-any-return]
    except OSError as error:
        advice = advice or "A labelled folder holds one folder of images for each class."
        raise DataError(f"{folder} has no labelled images: {error} {advice}") from error


def _read(path: str | Path) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:
        raise DataError(f"The image {path} cannot be read: {error}. Restore it.") from error


class _Pixels(Dataset[Any]):
    """Bytes ``(N, H, W, C)``, given out as pixels ``(C, H, W)`` in [0, 1]."""

    def __init__(self, pixels: NDArray[np.uint8], labels: Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(self.pixels[index]))
        return image.permute(2, 0, 1).float() / 255, int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(len(self)))


def _array(path: Path, advice: str) -> NDArray[Any]:
    """Return an array left in its file, which must hold plain numbers."""
    if not path.exists():
        raise DataError(f"There is no {path}. {advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, Warning) as error:
        raise DataError(f"{path} is not an array of numbers: {error}. {advice}") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} holds several arrays, not one. {advice}")
    return found


def _check_pixels(pixels: NDArray[Any], path: Path, advice: str) -> None:
    if pixels.dtype != np.uint8 or pixels.shape[1:] != _CIFAR_SHAPE or pixels.ndim != 4:
        raise DataError(
            f"{path} holds {pixels.dtype} of the shape {pixels.shape}; expected uint8 of "
            f"(images, 32, 32, 3). {advice}"
        )


def _paired(pixels: NDArray[Any], labels: NDArray[Any], path: Path, advice: str) -> Dataset[Any]:
    if labels.shape != (len(pixels),) or not len(pixels):
        raise DataError(
            f"{path} has labels of the shape {labels.shape}; {len(pixels)} images need "
            f"({len(pixels)},), and there must be some. {advice}"
        )
    return _Pixels(pixels, _labels(labels, path, advice))


def _labels(labels: NDArray[Any], path: Path, advice: str) -> Tensor:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path} holds labels as {labels.dtype}; expected integers. {advice}")
    return torch.from_numpy(labels.astype(np.int64))
