"""The one order in which a data set is read, and what its items draw, from a seed and an epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from blockprune.errors import DataError
from blockprune.randomness import RngState, set_rng_state

__all__ = ["EpochSampler", "SeededItems", "make_loader", "size_of"]


class EpochSampler(Sampler[int]):
    """The indices ``0 .. size - 1`` in an order that depends on ``(seed, epoch)`` alone.

    An interrupted run that resumes at epoch ``e`` thus sees the batches it would have
    seen, whatever else drew from torch's generators in between.

    Example:
        >>> from blockprune.data import EpochSampler
        >>> sampler = EpochSampler(5, seed=0)
        >>> sampler.set_epoch(3)
        >>> sorted(sampler) == [0, 1, 2, 3, 4] and list(sampler) == list(sampler)
        True
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` (0-based) from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # Large odd multipliers keep (seed, epoch) and (seed + 1, epoch - 1) apart.
        generator.manual_seed((self.seed * 1_000_003 + self.epoch * 7_919) % 2**63)
        yield from torch.randperm(self.size, generator=generator).tolist()


class SeededItems(Dataset[Any]):
    """The items of a data set; what one draws depends on ``(seed, epoch, index)`` alone.

    An augmented image is then the same whether batches are fetched ahead or by worker
    processes, whether the run started at this epoch, at its middle or at the first, and
    whichever of several processes reads it. Seed and epoch are those of an
    :class:`EpochSampler`. The CPU generators of torch, ``random`` and numpy are seeded
    for each item and left as they were.

    Example:
        >>> import torch
        >>> from blockprune.data import EpochSampler, SeededItems
        >>> class Noise:
        ...     def __getitem__(self, index):
        ...         return torch.rand(2)
        >>> items = SeededItems(Noise(), EpochSampler(10, seed=0))
        >>> torch.equal(items[3], items[3]), torch.equal(items[3], items[4])
        (True, False)
    """

    def __init__(self, dataset: Dataset[Any], order: EpochSampler) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return self.order.size

    def __getitem__(self, index: int) -> Any:
        [item] = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the items of a batch: loaders ask for them together."""
        # The generators of CUDA are left alone: to read them waits for the device, and
        # loaders work on the CPU.
        state = RngState(torch.get_rng_state(), [], random.getstate(), np.random.get_state())
        try:
            return [self._drawn(index) for index in indices]
        finally:
            set_rng_state(state)

    def _drawn(self, index: int) -> Any:
        key = f"{self.order.seed} {self.order.epoch} {index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return self.dataset[index]


def size_of(dataset: Dataset[Any]) -> int:
    """Return the number of samples of a map-style data set; `DataError` where there is none."""
    length = getattr(dataset, "__len__", None)
    if length is None:
        raise DataError(
            f"{type(dataset).__name__} has no length; a map-style data set is needed, "
            "one with __len__ and __getitem__."
        )
    count = int(length())
    if count == 0:
        raise DataError("The data set is empty; at least one sample is needed.")
    return count


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, seed: int | None = None, workers: int = 0
) -> DataLoader[Any]:
    """Return a loader over ``dataset``: shuffled by ``(seed, epoch)``, or in order.

    Args:
        dataset: a map-style data set, not empty.
        batch_size: samples a batch; the last batch may be smaller.
        seed: shuffle with an :class:`EpochSampler` of this seed, which is the loader's
            ``sampler``, and fix what the items draw (:class:`SeededItems`); None keeps
            the order, and the items draw from the global generators.
        workers: processes that fetch items; 0: this one. The batches are the same.

    Returns:
        A loader that draws nothing from torch's global generator.

    Raises:
        DataError: the data set is empty or has no length, ``batch_size`` < 1 or
            ``workers`` < 0.

    Example:
        >>> from blockprune.data import load_digits, make_loader
        >>> loader = make_loader(load_digits().train, 128, seed=0)
        >>> loader.sampler.set_epoch(1)
        >>> images, labels = next(iter(loader))
        >>> images.shape
        torch.Size([128, 1, 8, 8])
    """
    count = size_of(dataset)
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")
    if workers < 0:
        raise DataError(f"workers must be at least 0, got {workers}.")
    order = None if seed is None else EpochSampler(count, seed)
    # A loader takes a seed for its workers from a generator at each pass, from torch's
    # global one unless it has its own.
    return DataLoader(
        dataset if order is None else SeededItems(dataset, order),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
