"""The batch that `--data` names, from small files in the published formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blockprune.cli.batches import scoring_batch
from blockprune.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """MNIST of ten images a class, the n-th all of grey level n, and two classes of photographs."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = np.repeat(np.arange(100, dtype=np.uint8), 28 * 28).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, 100, 28, 28) + images
        )
        labels = bytes(n % 10 for n in range(100))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 100) + labels)
    for part in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for n in range(10):
                Image.new("RGB", (40, 30), (n, 0, 0)).save(folder / f"{n}.JPEG")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_are_repeated_where_three_channels_are_read(root: Path, channels: int) -> None:
    inputs = (torch.rand(2, channels, 28, 28, dtype=torch.float64),)
    batch = scoring_batch("mnist", inputs, root=root, seed=0)
    assert batch is not None
    images, labels = batch
    assert (images.shape, images.dtype) == ((100, channels, 28, 28), torch.float64)
    assert labels.bincount().tolist() == [10] * 10
    # Every image went in once: grey level n is of class n % 10.
    levels = ((images[:, 0, 0, 0] * 0.3081 + 0.1307) * 255).round().int()
    assert sorted(levels.tolist()) == list(range(100))
    assert (levels % 10).equal(labels.int())
    assert all(image.equal(images[:, 0]) for image in images.unbind(1))


def test_photographs_are_cut_to_what_is_read_and_not_augmented(root: Path) -> None:
    inputs = (torch.rand(1, 3, 224, 224),)
    first = scoring_batch("imagenet", inputs, root=root, seed=0)
    other = scoring_batch("imagenet", inputs, root=root, seed=1)
    assert first is not None
    assert other is not None
    assert (first[0].shape, first[1].tolist()) == ((20, 3, 224, 224), [0, 1] * 10)
    # Both draws are of the same ten images of each class.
    assert first[0].sum().item() == pytest.approx(other[0].sum().item(), rel=1e-4)


def test_digits_take_the_size_that_is_read() -> None:
    batch = scoring_batch("digits", (torch.rand(1, 3, 17, 17),), root=Path("absent"), seed=0)
    assert batch is not None
    assert batch[0].shape == (100, 3, 17, 17)


def test_random_is_no_batch() -> None:
    assert scoring_batch("random", (torch.rand(1, 3),), root=Path("absent"), seed=0) is None


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        ("mnist", (1, 1, 32, 32), r"1x28x28 or 3x28x28 images \(try --input-shape 1,1,28,28\)"),
        ("mnist", (1, 2, 28, 28), "this one reads 1x2x28x28"),
        ("mnist", (1, 28), "needs a model of images"),
        ("imagenet", (1, 3, 32, 32), "try --input-shape 1,3,224,224"),
        ("imagenet", (1, 1, 224, 224), "3x224x224 images"),
        ("digits", (1, 3, 8, 9), "1x8x8 or 3x8x8"),
        ("cifar100", (1, 3, 32, 32), "CIFAR-100 was not found"),
        ("tiny-imagenet", (1, 3, 64, 64), "Tiny-ImageNet was not found"),
    ],
)
def test_what_does_not_fit_is_said(
    root: Path, data: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        scoring_batch(data, (torch.rand(shape),), root=root, seed=0)


def test_a_class_of_too_few_images_is_named(root: Path) -> None:
    (root / "imagenet" / "train" / "n01443537" / "0.JPEG").unlink()
    with pytest.raises(DataError, match="class 1 has 9"):
        scoring_batch("imagenet", (torch.rand(1, 3, 224, 224),), root=root, seed=0)
