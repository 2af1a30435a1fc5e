"""Data sets, each split once, read in an order fixed by a seed and an epoch."""

from __future__ import annotations

from blockprune.data.cifar import load_cifar10, load_cifar100
from blockprune.data.digits import load_digits
from blockprune.data.folders import load_imagenet, load_tiny_imagenet
from blockprune.data.images import ImageData, balanced_batch
from blockprune.data.loading import DATASETS, data_options, load_data
from blockprune.data.mnist import load_mnist
from blockprune.data.order import EpochSampler, SeededItems, make_loader, size_of

__all__ = [
    "DATASETS",
    "EpochSampler",
    "ImageData",
    "SeededItems",
    "balanced_batch",
    "data_options",
    "load_cifar10",
    "load_cifar100",
    "load_data",
    "load_digits",
    "load_imagenet",
    "load_mnist",
    "load_tiny_imagenet",
    "make_loader",
    "size_of",
]
