"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockprune.data.cifar import load_cifar10, load_cifar100
from blockprune.data.digits import load_digits
from blockprune.data.folders import load_imagenet, load_tiny_imagenet
from blockprune.data.images import ImageData
from blockprune.data.mnist import load_mnist
from blockprune.errors import DataError, close_names

__all__ = ["DATASETS", "data_options", "load_data"]

DATASETS: dict[str, Callable[..., ImageData]] = {
    # Ships with scikit-learn.
    "digits": load_digits,
    # Fetched where asked to.
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    # Folders of images, put there by hand.
    "tiny-imagenet": load_tiny_imagenet,
    "imagenet": load_imagenet,
}


def data_options(name: str) -> tuple[str, ...]:
    """Return the options that the loader of a data set takes; none where there is no such set.

    Example:
        >>> from blockprune.data import data_options
        >>> data_options("cifar10")
        ('download', 'augment')
    """
    loader = DATASETS.get(name)
    parameters = () if loader is None else inspect.signature(loader).parameters
    return tuple(parameter for parameter in parameters if parameter != "root")


def load_data(name: str, root: str | Path | None = None, **options: Any) -> ImageData:
    """Return the data set of that name.

    Args:
        name: of :data:`DATASETS`.
        root: the folder that holds the files; one folder can hold those of all data sets.
            Not looked at for ``"digits"``, which needs no file.
        options: of that loader: ``download=``, ``augment=``, ``image_size=``...

    Raises:
        DataError: there is no such data set or option (close names are given); ``root`` is
            needed; or the loader found no files, or damaged ones.

    Example:
        >>> from blockprune.data import load_data
        >>> load_data("digits", image_size=16).image_shape
        (1, 16, 16)
    """
    loader = DATASETS.get(name)
    if loader is None:
        raise DataError(
            f"There is no data set {name!r}.{close_names(name.lower(), DATASETS)} "
            f"Known: {', '.join(DATASETS)}."
        )
    known = data_options(name)
    for option in options:
        if option not in known:
            raise DataError(
                f"The data set {name!r} has no option {option!r}.{close_names(option, known)} "
                f"Its options: {', '.join(known)}."
            )
    if loader is load_digits:
        return loader(**options)
    if root is None:
        fetched = ", or with download=True receives," if "download" in known else ""
        raise DataError(
            f"The data set {name!r} is read from files: pass root=, the folder that "
            f"holds{fetched} them. What they are called: blockprune.data.{loader.__name__}."
        )
    return loader(root, **options)
