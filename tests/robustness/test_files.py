"""Readers of the published files, on small files of the real formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blockprune.errors import DataError
from blockprune.robustness import CorruptedFiles
from blockprune.robustness.files import load_cifar10_1, load_cifar10_2, load_labelled_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(10, dtype=np.uint8)


@pytest.fixture
def cifar(tmp_path):
    np.save(tmp_path / "fog.npy", PIXELS)
    np.save(tmp_path / "labels.npy", LABELS)
    return tmp_path


def test_severity_s_is_the_sth_fifth(cifar) -> None:
    found = CorruptedFiles(cifar).read("fog", 3)
    assert len(found) == 2
    image, label = found[1]
    assert label == 5
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(PIXELS[5]).permute(2, 0, 1))
    assert image.max() <= 1


def test_labels_for_one_severity_serve_all(cifar) -> None:
    np.save(cifar / "labels.npy", LABELS[:2])
    assert [label for _, label in CorruptedFiles(cifar).read("fog", 5)] == [0, 1]


@pytest.mark.parametrize(
    ("file", "array", "match"),
    [
        ("fog", PIXELS[:9], "five severities"),
        ("fog", PIXELS[:, :16], "uint8"),
        ("fog", PIXELS.astype(np.float32), "float32"),
        ("labels", LABELS[:7], "shape"),
        ("labels", LABELS.astype(np.float32), "integers"),
        ("labels", np.array([{}] * 10), "not an array of numbers"),
    ],
)
def test_malformed_arrays(cifar, file, array, match) -> None:
    np.save(cifar / f"{file}.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=match) as raised:
        CorruptedFiles(cifar).read("fog", 1)
    assert "zenodo.org/record/2535967" in str(raised.value)


def test_absent_and_truncated_files(cifar) -> None:
    with pytest.raises(DataError, match=r"no .*snow\.npy.*zenodo"):
        CorruptedFiles(cifar).read("snow", 1)
    whole = (cifar / "fog.npy").read_bytes()
    (cifar / "fog.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not an array"):
        CorruptedFiles(cifar).read("fog", 1)
    (cifar / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"no labels\.npy"):
        CorruptedFiles(cifar)
    with pytest.raises(DataError, match="no folder"):
        CorruptedFiles(cifar / "elsewhere")


def test_an_archive_under_the_name_of_an_array(cifar) -> None:
    # np.save would write an array; an archive of several opens just as well.
    with (cifar / "fog.npy").open("wb") as file:
        np.savez(file, one=PIXELS, other=PIXELS)
    with pytest.raises(DataError, match=r"fog\.npy holds several arrays, not one.*zenodo"):
        CorruptedFiles(cifar).read("fog", 1)


def test_imagenet_c_folders(tmp_path) -> None:
    for place, name in enumerate(("n01", "n02")):
        folder = tmp_path / "fog" / "2" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 10), (place * 255, 0, 0)).save(folder / "a.JPEG")
    found = CorruptedFiles(tmp_path).read("fog", 2)
    assert [label for _, label in found] == [0, 1]
    assert found[0][0].shape == (3, 10, 12)
    assert found[1][0][0].mean() == pytest.approx(1, abs=0.02)
    with pytest.raises(DataError, match="2235448"):
        CorruptedFiles(tmp_path).read("fog", 3)
    (tmp_path / "fog" / "2" / "n01" / "a.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read"):
        found[0]


def test_labelled_folder_is_resized(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("L", (40, 64), 128).save(tmp_path / "one" / "a.png")
    image, label = load_labelled_folder(tmp_path, image_size=28)[0]
    assert (image.shape, label) == ((3, 28, 28), 0)
    with pytest.raises(DataError, match="no labelled images"):
        load_labelled_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="image_size"):
        load_labelled_folder(tmp_path, image_size=0)


def test_cifar10_1(tmp_path) -> None:
    np.save(tmp_path / "cifar10.1_v6_data.npy", PIXELS)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", LABELS.astype(np.int32))
    assert [label for _, label in load_cifar10_1(tmp_path)] == list(range(10))
    with pytest.raises(DataError, match="modestyachts"):
        load_cifar10_1(tmp_path, "v4")
    with pytest.raises(DataError, match="v4 and v6"):
        load_cifar10_1(tmp_path, "v5")
    np.save(tmp_path / "cifar10.1_v6_labels.npy", LABELS[:3])
    with pytest.raises(DataError, match="labels of the shape"):
        load_cifar10_1(tmp_path)


def test_cifar10_2(tmp_path) -> None:
    path = tmp_path / "cifar102_test.npz"
    # The published file has members that are pickles, which are never opened.
    np.savez(path, images=PIXELS, labels=LABELS.astype(np.int64), keywords=np.array([{}]))
    assert len(load_cifar10_2(tmp_path)) == 10
    np.savez(path, images=PIXELS)
    with pytest.raises(DataError, match=r"labels.*cifar-10\.2"):
        load_cifar10_2(tmp_path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="cannot be read"):
        load_cifar10_2(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_cifar10_2(tmp_path)
