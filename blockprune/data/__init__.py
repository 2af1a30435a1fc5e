"""Data sets, each split once, read in an order fixed by a seed and an epoch."""

from __future__ import annotations

from blockprune.data.cifar10 import load_cifar10
from blockprune.data.digits import load_digits
from blockprune.data.images import EpochSampler, ImageData, balanced_batch, make_loader, size_of

__all__ = [
    "EpochSampler",
    "ImageData",
    "balanced_batch",
    "load_cifar10",
    "load_digits",
    "make_loader",
    "size_of",
]
