"""What the loaders of data sets in files share: transforms, and errors that show the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blockprune.errors import DataError

__all__ = ["folder_of", "read_image", "reading", "to_tensor"]


def to_tensor(mean: Sequence[float], deviation: Sequence[float], *before: Any) -> Any:
    """Return the transform: ``before``, in order, then pixels in [0, 1], then normalised."""
    # Here, since importing torchvision takes as long as importing torch.
    from torchvision.transforms import v2

    return v2.Compose(
        [
            *before,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, deviation),
        ]
    )


@contextmanager
def reading(name: str, root: Path, wanted: str, advice: str) -> Iterator[None]:
    """Read the files of a data set in here; whatever goes wrong becomes one error.

    Args:
        name: of the data set.
        root: where it was looked for.
        wanted: what was looked for there.
        advice: how to get it.

    Raises:
        DataError: anything was raised in here; all four are in the message.
    """
    try:
        yield
    except DataError:
        raise
    # torchvision tells of damaged files by whatever its parsers run into.
    except Exception as error:
        found = str(error).rstrip(". ") or type(error).__name__
        raise DataError(
            f"{name} was not found under {root}, or is damaged: {found}. "
            f"Looked for {wanted}. {advice}"
        ) from error


def folder_of(root: Path, name: str, parts: Iterable[str]) -> Path:
    """Return ``root / name``, or ``root`` itself where that is what holds the ``parts``.

    Raises:
        FileNotFoundError: neither holds all of them; a part that is missing is named.
    """
    parts = tuple(parts)
    folder = next((f for f in (root / name, root) if (f / parts[0]).exists()), root / name)
    for part in parts:
        if not (folder / part).exists():
            raise FileNotFoundError(f"there is no {folder / part}")
    return folder


def read_image(path: str | Path) -> Any:
    """Return an image file as PIL reads it, in three channels.

    Raises:
        DataError: the file is absent, truncated or no image.
    """
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:
        raise DataError(
            f"The image {path} cannot be read: {error}. Restore it from the published archive."
        ) from error
