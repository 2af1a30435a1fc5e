"""Data sets: what is in them, that splits and orders are fixed, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import IterableDataset, TensorDataset
from torchvision.datasets import CIFAR10

from blockprune.data import (
    EpochSampler,
    balanced_batch,
    load_cifar10,
    load_digits,
    make_loader,
    size_of,
)
from blockprune.errors import DataError


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


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five training batches and a test batch of 4 images each, in the published format.

    torchvision compares each file with the checksum of the published one; only its list
    of checksums is replaced, so that everything else is the code that a user runs.
    """
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        raw = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw, usedforsecurity=False).hexdigest()

    def batch(name: str, first_label: int) -> list[str]:
        pixels = generator.integers(0, 256, size=(4, 3072), dtype=np.uint8)
        pixels[0] = 255
        labels = [(first_label + k) % 10 for k in range(4)]
        content = {"data": pixels, "labels": labels, "batch_label": name, "filenames": ["a.png"]}
        return [name, write(name, content)]

    train = [batch(f"data_batch_{k}", first_label=k) for k in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", first_label=0)])
    names = {"label_names": [f"class {k}" for k in range(10)]}
    monkeypatch.setitem(CIFAR10.meta, "md5", write("batches.meta", names))
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

    def test_absent_files_are_an_error_that_names_the_way_out(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"was not found under .*download=True"):
            load_cifar10(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_file_is_refused_before_it_is_read(self, cifar_root: Path) -> None:
        file = cifar_root / CIFAR10.base_folder / "data_batch_3"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match="not found or corrupted"):
            load_cifar10(cifar_root)

    def test_a_failed_download_is_a_data_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(self: CIFAR10) -> None:
            raise OSError("network is unreachable")

        monkeypatch.setattr(CIFAR10, "download", unreachable)
        with pytest.raises(DataError, match="network is unreachable The download did not"):
            load_cifar10(tmp_path, download=True)


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
