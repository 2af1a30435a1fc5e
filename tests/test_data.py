"""Data sets: what is in them, that splits and orders are fixed, and what is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100

from blockprune.data import (
    DATASETS,
    EpochSampler,
    SeededItems,
    balanced_batch,
    load_cifar10,
    load_cifar100,
    load_data,
    load_digits,
    load_imagenet,
    load_mnist,
    load_tiny_imagenet,
    make_loader,
    size_of,
)
from blockprune.errors import DataError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet20


def _labels(dataset: object) -> torch.Tensor:
    assert isinstance(dataset, TensorDataset)
    return dataset.tensors[1]


def _images(dataset: object) -> torch.Tensor:
    assert isinstance(dataset, TensorDataset)
    return dataset.tensors[0]


class TestDigits:
    def test_every_image_is_in_exactly_one_split(self) -> None:
        data = load_digits()
        together = torch.cat([_images(data.train), _images(data.test)]).flatten(1)
        pixels = torch.tensor(sklearn_digits().data, dtype=torch.float32)
        # Undo the normalisation: the darkest and the brightest pixel are 0 and 16.
        together = (together - together.min()) / (together.max() - together.min()) * 16
        ours = sorted(map(tuple, together.round().int().tolist()))
        assert ours == sorted(map(tuple, pixels.int().tolist()))
        assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))

    def test_classes_are_split_in_the_same_shares(self) -> None:
        data = load_digits(test_share=0.3)
        train, test = (_labels(part).bincount(minlength=10) for part in (data.train, data.test))
        shares = test / (train + test)
        assert shares.min() > 0.29
        assert shares.max() < 0.31

    def test_training_images_have_mean_0_and_deviation_1(self) -> None:
        images = _images(load_digits().train)
        assert images.mean().item() == pytest.approx(0, abs=1e-5)
        assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)

    def test_the_seed_fixes_the_split(self) -> None:
        first, again, other = load_digits(seed=3), load_digits(seed=3), load_digits(seed=4)
        assert torch.equal(_images(first.train), _images(again.train))
        assert not torch.equal(_images(first.train), _images(other.train))

    def test_upsampling_keeps_the_picture(self) -> None:
        small, large = load_digits(), load_digits(image_size=32)
        assert large.image_shape == (1, 32, 32)
        back = torch.nn.functional.avg_pool2d(_images(large.test), 4)
        correlation = torch.corrcoef(torch.stack([back.flatten(), _images(small.test).flatten()]))
        assert correlation[0, 1] > 0.95

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"image_size": 7}, "image_size must be at least 8, got 7"),
            ({"test_share": 0.0}, "test_share must lie between 0 and 1, got 0.0"),
            ({"test_share": 1.5}, "test_share must lie between 0 and 1, got 1.5"),
            ({"test_share": 0.001}, "1797 digits cannot be split with test_share=0.001"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, float], message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_digits(**arguments)  # type: ignore[arg-type]


Write = Callable[[str, dict[str, object]], str]


def _cifar_files(folder: Path) -> Write:
    """Return what writes a file as it was published, a pickle, and returns its checksum."""
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> str:
        raw = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw, usedforsecurity=False).hexdigest()

    return write


def _pixels(count: int) -> npt.NDArray[np.uint8]:
    """Images of three channels and 32 x 32 pixels in rows; the first is white."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(count, 3072), dtype=np.uint8)
    pixels[0] = 255
    return pixels


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five training batches and a test batch of 4 images each, in the published format.

    torchvision compares each file with the checksum of the published one; only its list
    of checksums is replaced, so that everything else is the code that a user runs.
    """
    write = _cifar_files(tmp_path / CIFAR10.base_folder)

    def batch(name: str, first_label: int) -> list[str]:
        labels = [(first_label + k) % 10 for k in range(4)]
        content = {"data": _pixels(4), "labels": labels, "batch_label": name, "filenames": ["a"]}
        return [name, write(name, content)]

    train = [batch(f"data_batch_{k}", first_label=2 * k) for k in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", first_label=0)])
    names = {"label_names": [f"class {k}" for k in range(10)]}
    monkeypatch.setitem(CIFAR10.meta, "md5", write("batches.meta", names))
    return tmp_path


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and 4 test images, in the published format, which has two kinds of labels."""
    write = _cifar_files(tmp_path / CIFAR100.base_folder)

    def part(name: str, count: int) -> list[str]:
        fine = [(17 * k) % 100 for k in range(count)]
        coarse = [k % 20 for k in range(count)]
        content = {"data": _pixels(count), "fine_labels": fine, "coarse_labels": coarse}
        return [name, write(name, content | {"batch_label": name, "filenames": ["a"] * count})]

    monkeypatch.setattr(CIFAR100, "train_list", [part("train", 6)])
    monkeypatch.setattr(CIFAR100, "test_list", [part("test", 4)])
    names = {"fine_label_names": [f"class {k}" for k in range(100)]}
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": write("meta", names)})
    return tmp_path


class TestCifar10:
    def test_reads_the_published_format(self, cifar_root: Path) -> None:
        data = load_cifar10(cifar_root)
        assert (size_of(data.train), size_of(data.test)) == (20, 4)
        assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
        assert [data.test[k][1] for k in range(4)] == [0, 1, 2, 3]
        white, _ = data.test[0]
        mean = torch.tensor([0.4914, 0.4822, 0.4465])
        expected = (1 - mean) / torch.tensor([0.2470, 0.2435, 0.2616])
        assert white.dtype == torch.float32
        torch.testing.assert_close(white[:, 0, 0], expected)
        assert torch.equal(white, white[:, :1, :1].expand_as(white))

    def test_augmentation_touches_training_images_only(self, cifar_root: Path) -> None:
        data, plain = load_cifar10(cifar_root), load_cifar10(cifar_root, augment=False)
        assert any(not torch.equal(data.train[1][0], data.train[1][0]) for _ in range(20))
        assert all(torch.equal(data.test[1][0], data.test[1][0]) for _ in range(20))
        assert all(torch.equal(plain.train[1][0], plain.train[1][0]) for _ in range(20))

    def test_a_network_takes_a_step(self, cifar_root: Path) -> None:
        model = resnet20()
        before = model.state_dict()["fc.weight"].clone()
        history = train(model, load_cifar10(cifar_root).train, Recipe(epochs=1, batch_size=20))
        assert len(history.epochs) == 1
        assert not torch.equal(before, model.state_dict()["fc.weight"])

    def test_absent_files_are_an_error_that_names_the_way_out(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"was not found under .*Pass download=True") as caught:
            load_cifar10(tmp_path)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "cifar-10-batches-py with data_batch_1, data_batch_2" in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
    def test_a_damaged_file_is_refused_before_it_is_read(self, cifar_root: Path, name: str) -> None:
        file = cifar_root / CIFAR10.base_folder / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match="not found or corrupted"):
            load_cifar10(cifar_root)

    def test_a_pickle_that_runs_code_is_never_read(self, cifar_root: Path) -> None:
        mark = cifar_root / "mark"

        class Trap:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
                return os.mkdir, (str(mark),)

        file = cifar_root / CIFAR10.base_folder / "data_batch_1"
        file.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(DataError, match="corrupted"):
            load_cifar10(cifar_root)
        assert not mark.exists()
        pickle.loads(file.read_bytes())
        assert mark.exists()

    def test_a_failed_download_is_a_data_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(self: CIFAR10) -> None:
            raise OSError("network is unreachable")

        monkeypatch.setattr(CIFAR10, "download", unreachable)
        with pytest.raises(DataError, match=r"network is unreachable.* The download did not"):
            load_cifar10(tmp_path, download=True)


class TestCifar100:
    def test_reads_the_published_format_and_the_fine_labels(self, cifar100_root: Path) -> None:
        data = load_cifar100(cifar100_root)
        assert (size_of(data.train), size_of(data.test)) == (6, 4)
        assert (data.num_classes, data.image_shape) == (100, (3, 32, 32))
        assert [data.train[k][1] for k in range(6)] == [0, 17, 34, 51, 68, 85]
        expected = (1 - torch.tensor([0.5071, 0.4865, 0.4409])) / torch.tensor(
            [0.2673, 0.2564, 0.2762]
        )
        torch.testing.assert_close(data.test[0][0][:, 0, 0], expected)
        assert any(not torch.equal(data.train[1][0], data.train[1][0]) for _ in range(20))

    def test_absent_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"CIFAR-100 was not found .*train, test and meta"):
            load_cifar100(tmp_path)


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """Seven training and 3 test images as idx files: a magic number, the sizes, the bytes."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 7), ("t10k", 3)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = 255
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + labels
        )
    return tmp_path


class TestMnist:
    def test_reads_the_published_format(self, mnist_root: Path) -> None:
        data = load_mnist(mnist_root)
        assert (size_of(data.train), size_of(data.test)) == (7, 3)
        assert (data.name, data.num_classes, data.image_shape) == ("MNIST", 10, (1, 28, 28))
        assert [data.train[k][1] for k in range(7)] == list(range(7))
        image, _ = data.train[2]
        assert image.shape == (1, 28, 28)
        assert image[0, 0, 0].item() == pytest.approx((1 - 0.1307) / 0.3081)
        assert image[0, 5, 5].item() == pytest.approx(-0.1307 / 0.3081)
        assert all(torch.equal(data.train[2][0], image) for _ in range(20))

    def test_absent_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"MNIST was not found .*train-images-idx3-ubyte"):
            load_mnist(tmp_path)

    @pytest.mark.parametrize("kept", [0, 10, 500])
    @pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    def test_a_truncated_file_is_refused(self, mnist_root: Path, file: str, kept: int) -> None:
        path = mnist_root / "MNIST" / "raw" / file
        path.write_bytes(path.read_bytes()[: min(kept, path.stat().st_size - 1)])
        with pytest.raises(DataError, match="or is damaged"):
            load_mnist(mnist_root)

    def test_labels_and_images_go_together(self, mnist_root: Path) -> None:
        folder = mnist_root / "MNIST" / "raw"
        labels = folder / "train-labels-idx1-ubyte"
        labels.write_bytes(struct.pack(">II", 0x801, 2) + bytes([1, 2]))
        with pytest.raises(DataError, match=r"2 labels go with images of shape \(7, 28, 28\)"):
            load_mnist(mnist_root)
        labels.write_bytes(struct.pack(">II", 0x801, 7) + bytes([1, 2, 3, 4, 5, 6, 200]))
        with pytest.raises(DataError, match="a label is 200"):
            load_mnist(mnist_root)


def _jpeg(path: Path, size: tuple[int, int], *, mode: str = "RGB", grey: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey if mode == "L" else (grey,) * 3).save(path, "JPEG")


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """Three classes of two training images, and four validation images, as published."""
    folder = tmp_path / "tiny-imagenet-200"
    names = ["n01443537", "n01629819", "n01641577"]
    for name in names:
        for k in range(2):
            mode = "L" if k else "RGB"  # some of the published ones are grey
            _jpeg(folder / "train" / name / "images" / f"{name}_{k}.JPEG", (64, 64), mode=mode)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t9\t9\n")
    lines = []
    for k, name in enumerate([names[2], names[0], names[0], names[1]]):
        _jpeg(folder / "val" / "images" / f"val_{k}.JPEG", (64, 64))
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(reversed(names)))
    return tmp_path


class TestTinyImageNet:
    def test_reads_the_published_folders(self, tiny_root: Path) -> None:
        data = load_tiny_imagenet(tiny_root)
        assert (size_of(data.train), size_of(data.test)) == (6, 4)
        assert (data.num_classes, data.image_shape) == (3, (3, 64, 64))
        assert [data.train[k][1] for k in range(6)] == [0, 0, 1, 1, 2, 2]
        assert [data.test[k][1] for k in range(4)] == [2, 0, 0, 1]
        white, _ = data.test[0]
        expected = (1 - torch.tensor([0.4802, 0.4481, 0.3975])) / torch.tensor(
            [0.2770, 0.2691, 0.2821]
        )
        torch.testing.assert_close(white[:, 9, 9], expected)
        assert data.train[1][0].shape == (3, 64, 64)

    def test_the_folder_itself_will_do(self, tiny_root: Path) -> None:
        assert size_of(load_tiny_imagenet(tiny_root / "tiny-imagenet-200").train) == 6

    def test_training_images_are_padded_by_8_and_cropped(self, tiny_root: Path) -> None:
        data, plain = load_tiny_imagenet(tiny_root), load_tiny_imagenet(tiny_root, augment=False)
        white = plain.train[0][0]
        assert torch.equal(plain.train[0][0], white)
        # Padding is black, the images are white: rows and columns lost to the crop.
        lost = [int((data.train[0][0][0] != white[0, 0, 0]).all(1).sum()) for _ in range(60)]
        assert 5 <= max(lost) <= 8
        assert torch.equal(data.test[0][0], data.test[0][0])

    def test_absent_files_are_named_and_how_to_get_them(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"there is no .*tiny-imagenet-200/train.* Fetch http"):
            load_tiny_imagenet(tmp_path)

    def test_a_part_that_is_missing_is_named(self, tiny_root: Path) -> None:
        annotations = tiny_root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
        lines = annotations.read_text()
        annotations.unlink()
        with pytest.raises(DataError, match=r"there is no .*val_annotations.txt"):
            load_tiny_imagenet(tiny_root)
        for damaged, message in (
            ("", "val_annotations.txt is empty"),
            (lines + "val_9", "line 5 of val/val_annotations.txt names no class of train: 'val_9'"),
            (lines + "val_9.JPEG\tn01443537\t0", "1 of val/images are missing, val_9.JPEG"),
        ):
            annotations.write_text(damaged)
            with pytest.raises(DataError, match=message):
                load_tiny_imagenet(tiny_root)

    def test_images_of_another_size_are_refused(self, tiny_root: Path) -> None:
        _jpeg(tiny_root / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG", (64, 48))
        with pytest.raises(DataError, match=r"val_0.JPEG has 64x48 pixels, not 64x64"):
            load_tiny_imagenet(tiny_root)

    def test_a_damaged_image_is_named_when_it_is_read(self, tiny_root: Path) -> None:
        data = load_tiny_imagenet(tiny_root)
        file = tiny_root / "tiny-imagenet-200" / "train" / "n01629819" / "images"
        path = file / "n01629819_0.JPEG"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=r"The image .*n01629819_0.JPEG cannot be read"):
            data.train[2]

    def test_a_damaged_first_image_is_named_at_once(self, tiny_root: Path) -> None:
        path = tiny_root / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG"
        path.write_bytes(b"no image")
        with pytest.raises(DataError) as caught:
            load_tiny_imagenet(tiny_root)
        assert str(caught.value).startswith(f"The image {path} cannot be read")
        # The data set is there: nobody need fetch it.
        assert "was not found" not in str(caught.value)


@pytest.fixture
def imagenet_root(tmp_path: Path) -> Path:
    """Two classes, with images of several sizes."""
    for part, count in (("train", 3), ("val", 1)):
        for name in ("n01440764", "n01443537"):
            for k in range(count):
                _jpeg(tmp_path / part / name / f"{name}_{k}.JPEG", (300, 400 - 40 * k))
    return tmp_path


class TestImageNet:
    def test_reads_folders_of_classes(self, imagenet_root: Path) -> None:
        data = load_imagenet(imagenet_root)
        assert (size_of(data.train), size_of(data.test)) == (6, 2)
        assert (data.num_classes, data.image_shape) == (2, (3, 224, 224))
        assert [data.train[k][1] for k in range(6)] == [0, 0, 0, 1, 1, 1]
        expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        for image, _ in (data.train[1], data.test[1]):
            assert image.shape == (3, 224, 224)
            torch.testing.assert_close(image[:, 99, 99], expected)

    def test_test_images_are_the_centre_of_256_pixels(self, imagenet_root: Path) -> None:
        # White in the middle of the longer side; the shorter side of 300 becomes 256.
        picture = Image.new("RGB", (300, 600))
        picture.paste((255, 255, 255), (0, 180, 300, 420))
        picture.save(imagenet_root / "val" / "n01440764" / "n01440764_0.JPEG")
        image, _ = load_imagenet(imagenet_root).test[0]
        white = image[0, :, 100] > 0
        # 240 of 600 rows in 512 after the resize: 205, of which the crop shows all.
        assert int(white.sum()) == pytest.approx(240 * 256 / 300, abs=4)
        assert int(white[:112].sum()) == pytest.approx(int(white[112:].sum()), abs=4)

    def test_without_augmentation_training_images_are_as_test_images(
        self, imagenet_root: Path
    ) -> None:
        plain = load_imagenet(imagenet_root, augment=False)
        image = plain.train[2][0]
        assert torch.equal(plain.train[2][0], image)
        assert image.shape == (3, 224, 224)

    def test_one_folder_may_hold_it_beside_others(self, imagenet_root: Path) -> None:
        folder = imagenet_root / "imagenet"
        folder.mkdir()
        for part in ("train", "val"):
            (imagenet_root / part).rename(folder / part)
        assert load_imagenet(imagenet_root).num_classes == 2

    def test_absent_and_unsorted_files(self, imagenet_root: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"there is no .*imagenet/train.*image-net.org"):
            load_imagenet(tmp_path / "elsewhere")
        for file in (imagenet_root / "val").rglob("*.JPEG"):
            file.rename(imagenet_root / "val" / file.name)
        for folder in (imagenet_root / "val").glob("n*7"):
            folder.rmdir()
        with pytest.raises(DataError, match=r"no valid file for the classes n01440764"):
            load_imagenet(imagenet_root)
        (imagenet_root / "val" / "n01440764").rmdir()
        with pytest.raises(DataError, match=r"find any class folder in .*sort the validation"):
            load_imagenet(imagenet_root)

    def test_both_parts_have_the_same_classes(self, imagenet_root: Path) -> None:
        _jpeg(imagenet_root / "val" / "n00000001" / "a.JPEG", (300, 300))
        with pytest.raises(DataError, match="only one of train and val has the class n00000001"):
            load_imagenet(imagenet_root)


class TestLoadData:
    def test_every_name_loads(
        self,
        cifar_root: Path,
        cifar100_root: Path,
        mnist_root: Path,
        tiny_root: Path,
        tmp_path: Path,
    ) -> None:
        for part in ("train", "val"):
            _jpeg(tmp_path / "imagenet" / part / "n01440764" / "a.JPEG", (256, 256))
        found = {name: load_data(name, tmp_path) for name in DATASETS}
        assert [data.name for data in found.values()] == [
            "digits", "MNIST", "CIFAR-10", "CIFAR-100", "Tiny-ImageNet", "ImageNet",
        ]  # fmt: skip
        for data in found.values():
            for part in (data.train, data.test):
                image, label = part[0]
                assert tuple(image.shape) == data.image_shape
                assert image.dtype == torch.float32
                assert 0 <= int(label) < data.num_classes

    def test_options_go_to_the_loader(self, cifar_root: Path) -> None:
        plain = load_data("cifar10", cifar_root, augment=False)
        assert all(torch.equal(plain.train[1][0], plain.train[1][0]) for _ in range(20))
        assert load_data("digits", image_size=12).image_shape == (1, 12, 12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "CIFAR-10"}, r"no data set 'CIFAR-10'. Did you mean cifar10.*Known: digits"),
            ({"name": "cifar10"}, r"'cifar10' is read from files: pass root=, .* download=True"),
            ({"name": "imagenet"}, r"pass root=, the folder that holds them.*load_imagenet"),
            ({"name": "digits", "imgsize": 9}, r"no option 'imgsize'. Did you mean image_size\?"),
            ({"name": "imagenet", "download": True}, "no option 'download'.*Its options: augment"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_data(**arguments)


class Drawn(Dataset[Any]):
    """Items that draw from every generator."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return (index, torch.rand(()).item(), random.random(), float(np.random.rand()))


def _epoch(loader: DataLoader[Any], epoch: int) -> list[list[float]]:
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return [row for batch in loader for row in torch.stack(list(batch), dim=1).tolist()]


class TestDraws:
    def test_depend_on_seed_epoch_and_index_alone(self) -> None:
        first = _epoch(make_loader(Drawn(), 4, seed=1), 2)
        torch.rand(5)
        random.random()
        other_batches = make_loader(Drawn(), 7, seed=1)
        _epoch(other_batches, 0)
        assert _epoch(other_batches, 2) == first
        draws = {tuple(row[1:]) for row in first}
        assert len(draws) == 20
        assert draws.isdisjoint(tuple(row[1:]) for row in _epoch(other_batches, 1))
        assert draws.isdisjoint(
            tuple(row[1:]) for row in _epoch(make_loader(Drawn(), 4, seed=2), 2)
        )

    # The workers are forked, which Python tells of where there are threads, and torch has some.
    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
    def test_are_the_same_in_worker_processes(self) -> None:
        alone, helped = (make_loader(Drawn(), 4, seed=1, workers=n) for n in (0, 2))
        for epoch in (0, 1):
            assert _epoch(alone, epoch) == _epoch(helped, epoch)

    def test_leave_the_generators_as_they_were(self) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        _epoch(make_loader(Drawn(), 4, seed=1), 0)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert np.array_equal(before[2], after[2])

    def test_a_failing_item_leaves_them_too(self) -> None:
        before = torch.get_rng_state()
        with pytest.raises(IndexError):
            SeededItems(TensorDataset(torch.zeros(2)), EpochSampler(2, 0))[5]
        assert torch.equal(before, torch.get_rng_state())

    def test_a_balanced_batch_of_augmented_images_is_fixed_by_its_seed(
        self, cifar_root: Path
    ) -> None:
        train = load_cifar10(cifar_root).train
        first, again, other = (balanced_batch(train, 10, 1, seed=seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestOrder:
    def test_depends_on_seed_and_epoch_alone(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            sampler = EpochSampler(50, seed)
            sampler.set_epoch(epoch)
            torch.rand(seed + epoch + 1)
            return list(sampler)

        orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
        assert all(sorted(found) == list(range(50)) for found in orders.values())
        assert len({tuple(found) for found in orders.values()}) == 9
        assert all(order(*key) == found for key, found in orders.items())

    def test_a_pass_draws_nothing_from_the_global_generator(self) -> None:
        dataset = TensorDataset(torch.arange(10))
        before = torch.get_rng_state()
        for seed in (None, 1):
            rows = torch.cat([batch for (batch,) in make_loader(dataset, 4, seed=seed)])
            assert sorted(rows.tolist()) == list(range(10))
        assert torch.equal(before, torch.get_rng_state())

    def test_without_a_seed_the_order_is_kept(self) -> None:
        loader = make_loader(TensorDataset(torch.arange(5)), 2)
        assert [batch.tolist() for (batch,) in loader] == [[0, 1], [2, 3], [4]]

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_a_batch_holds_at_least_one_sample(self, batch_size: int) -> None:
        with pytest.raises(DataError, match=f"batch_size must be at least 1, got {batch_size}"):
            make_loader(TensorDataset(torch.arange(5)), batch_size)
        with pytest.raises(DataError, match="workers must be at least 0, got -1"):
            make_loader(TensorDataset(torch.arange(5)), 1, workers=-1)

    def test_no_samples_and_no_length_are_refused(self) -> None:
        class Stream(IterableDataset[int]):
            def __iter__(self) -> Iterator[int]:
                return iter(range(3))

        with pytest.raises(DataError, match="empty"):
            size_of(TensorDataset(torch.empty(0)))
        with pytest.raises(DataError, match="Stream has no length"):
            size_of(Stream())


class TestBalancedBatch:
    def test_both_halves_hold_every_class_alike(self) -> None:
        data = load_digits()
        images, labels = balanced_batch(data.train, 10, per_class=4, seed=1)
        assert images.shape == (40, 1, 8, 8)
        assert labels[:20].bincount().tolist() == labels[20:].bincount().tolist() == [2] * 10
        rows = {image.numpy().tobytes(): int(label) for image, label in data.train}
        assert [rows[image.numpy().tobytes()] for image in images] == labels.tolist()

    def test_the_seed_fixes_the_draw(self) -> None:
        train = load_digits().train
        draws = [balanced_batch(train, 10, 2, seed=seed)[0] for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_a_class_that_is_too_small_is_named(self) -> None:
        dataset = TensorDataset(torch.rand(5, 3), torch.tensor([0, 0, 1, 0, 0]))
        with pytest.raises(DataError, match="2 samples a class were asked for; class 1 has 1"):
            balanced_batch(dataset, 2, per_class=2)
        with pytest.raises(DataError, match="per_class must be at least 1, got 0"):
            balanced_batch(dataset, 2, per_class=0)
