"""Tiny-ImageNet and ImageNet: folders of JPEG files, as they are published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from blockprune.data.files import folder_of, read_image, reading, to_tensor
from blockprune.data.images import ImageData

__all__ = ["load_imagenet", "load_tiny_imagenet"]

# Per channel, over the training images scaled to [0, 1].
TINY_MEAN, TINY_DEVIATION = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TINY_SIZE = 64
CROP_SIZE = 224
RESIZED = 256
"""The shorter side of a test image before its centre is cut out, in pixels."""


def load_tiny_imagenet(root: str | Path, *, augment: bool = True) -> ImageData:
    """Return Tiny-ImageNet: 100,000 training and 10,000 validation images of 200 classes.

    The validation images are the test set: the published test images have no labels.
    A class's label is the place of its WordNet name among the sorted names.

    Args:
        root: the folder that holds ``tiny-imagenet-200``, or that folder itself:
            ``train/<name>/images/*.JPEG``, ``val/images/*.JPEG`` and
            ``val/val_annotations.txt``.
        augment: crop training images at random after padding by 8 pixels and flip every
            other one.

    Returns:
        :class:`ImageData` with images ``(3, 64, 64)``, normalised per channel.

    Raises:
        DataError: files are absent or damaged. An image that cannot be read is named when
            it is asked for.

    Example:
        ``data = load_tiny_imagenet("data")``

    Source: Y. Le and X. Yang, "Tiny ImageNet visual recognition challenge", 2015.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = Path(root).expanduser()
    crop = [v2.RandomCrop(TINY_SIZE, padding=8), v2.RandomHorizontalFlip()] if augment else []
    wanted = "tiny-imagenet-200 with train/<class>/images, val/images and val/val_annotations.txt"
    advice = (
        "Fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip (240 MB) and unpack it there; "
        "it has no published checksum, so it is never fetched for you."
    )
    with reading("Tiny-ImageNet", root, wanted, advice):
        parts = ("train", "val/images", "val/val_annotations.txt")
        folder = folder_of(root, "tiny-imagenet-200", parts)
        train = ImageFolder(
            folder / "train", to_tensor(TINY_MEAN, TINY_DEVIATION, *crop), loader=read_image
        )
        test = _Listed(
            _annotated(folder / "val", train.class_to_idx), to_tensor(TINY_MEAN, TINY_DEVIATION)
        )
        for path, _ in (train.samples[0], test.samples[0]):
            size = read_image(path).size
            if size != (TINY_SIZE, TINY_SIZE):
                raise ValueError(f"{path} has {size[0]}x{size[1]} pixels, not 64x64")
    return ImageData(
        name="Tiny-ImageNet",
        train=train,
        test=test,
        num_classes=len(train.classes),
        image_shape=(3, TINY_SIZE, TINY_SIZE),
        mean=TINY_MEAN,
        deviation=TINY_DEVIATION,
    )


def load_imagenet(root: str | Path, *, augment: bool = True) -> ImageData:
    """Return ImageNet, or any images in its form: a folder of JPEG files for each class.

    The validation images are the test set; they are resized to 256 pixels on the shorter
    side and cut to the central 224 x 224.

    Args:
        root: the folder that holds ``train/<class>/`` and ``val/<class>/``, or one that
            holds it as ``imagenet``. A class's label is the place of its name among the
            sorted names; for ImageNet those are the WordNet names.
        augment: cut a part of 8 % to 100 % of the area out of training images, resize it
            to 224 x 224 and flip every other one. False: as test images.

    Returns:
        :class:`ImageData` with images ``(3, 224, 224)``, normalised per channel.

    Raises:
        DataError: files are absent, or the two parts have different classes. An image
            that cannot be read is named when it is asked for.

    Example:
        ``data = load_imagenet("/data/imagenet")``

    Source: O. Russakovsky et al., "ImageNet large scale visual recognition challenge", 2015.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    root = Path(root).expanduser()
    centre = [v2.Resize(RESIZED), v2.CenterCrop(CROP_SIZE)]
    cut = [v2.RandomResizedCrop(CROP_SIZE), v2.RandomHorizontalFlip()] if augment else centre
    advice = (
        "ImageNet is given out at https://image-net.org after registration. Unpack each class of "
        "the training archive into train/<class>, and sort the validation images into "
        "val/<class> by the published labels."
    )
    with reading("ImageNet", root, "train/<class>/*.JPEG and val/<class>/*.JPEG", advice):
        folder = folder_of(root, "imagenet", ("train", "val"))
        train = ImageFolder(folder / "train", to_tensor(MEAN, DEVIATION, *cut), loader=read_image)
        test = ImageFolder(folder / "val", to_tensor(MEAN, DEVIATION, *centre), loader=read_image)
        # A label is the place of a class among its folders, so these must be the same.
        lone = sorted(set(train.classes) ^ set(test.classes))
        if lone:
            raise ValueError(f"only one of train and val has the class {lone[0]}")
    return ImageData(
        name="ImageNet",
        train=train,
        test=test,
        num_classes=len(train.classes),
        image_shape=(3, CROP_SIZE, CROP_SIZE),
        mean=MEAN,
        deviation=DEVIATION,
    )


class _Listed(Dataset[Any]):
    """Images whose labels stand in a list, and not in the folder."""

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Any) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def _annotated(val: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Return the images of ``val_annotations.txt``: file, class and box, between tabs."""
    samples = []
    text = (val / "val_annotations.txt").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in labels:
            raise ValueError(
                f"line {number} of val/val_annotations.txt names no class of train: {line!r}"
            )
        samples.append((val / "images" / fields[0], labels[fields[1]]))
    present = {file.name for file in (val / "images").iterdir()}
    absent = [path.name for path, _ in samples if path.name not in present]
    if absent:
        raise ValueError(f"{len(absent)} of val/images are missing, {absent[0]} the first")
    if not samples:
        raise ValueError("val/val_annotations.txt is empty")
    return samples
