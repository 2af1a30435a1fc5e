"""Images of a data set that ``--data`` names, in the form that the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from blockprune.data import balanced_batch, data_options, load_data
from blockprune.errors import DataError
from blockprune.modes import in_mode

__all__ = ["NamedImages", "scoring_batch"]

# GraSP's batch: ten images of each class.
IMAGES_PER_CLASS = 10


class NamedImages:
    """A data set, its images not augmented.

    Args:
        data: a name of `blockprune.data.DATASETS`.
        inputs: example inputs of the model, whose channels and size the images must take. Digits
            are resized; grey images are repeated for a model that reads three channels.
        root: the folder that holds the files of the data set; `digits` needs none.
        seed: of the draw, and of the split of the digits.

    Raises:
        DataError: the data set is absent or damaged, or its images are not what the model reads.
    """

    def __init__(self, data: str, inputs: tuple[Tensor, ...], root: Path, seed: int) -> None:
        shape = tuple(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4:
            raise _misfit(data, "images", inputs)
        options = {"augment": False, "seed": seed}
        if shape[2] == shape[3]:
            options["image_size"] = shape[2]
        known = data_options(data)
        self.data = load_data(
            data, root, **{name: value for name, value in options.items() if name in known}
        )
        channels, *size = self.data.image_shape
        if list(shape[2:]) != size or shape[1] not in {channels, 3}:
            wanted = {"x".join(map(str, (count, *size))) for count in (channels, 3)}
            example = ",".join(map(str, (1, *self.data.image_shape)))
            raise _misfit(
                data, f"{' or '.join(sorted(wanted))} images (try --input-shape {example})", inputs
            )
        self._like, self._channels, self._seed = inputs[0], shape[1], seed

    def balanced(self, each: int) -> tuple[Tensor, Tensor]:
        """Return training images and their labels, as many of each class.

        Raises:
            DataError: there are fewer of a class.
        """
        images, labels = balanced_batch(
            self.data.train, self.data.num_classes, each, seed=self._seed
        )
        return self._read(images), labels.to(self._like.device)

    def shuffled(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of all training images, in another order each time they are read."""
        return _Shuffled(
            DataLoader(self.data.train, batch_size=batch_size, shuffle=True), self._read
        )

    def accuracy(self, model: nn.Module) -> float | None:
        """Return the share of the test images that a model recognises.

        None if its outputs are no scores of the classes.
        """
        right = count = 0
        with torch.no_grad(), in_mode(False, model):
            for images, labels in DataLoader(self.data.test, batch_size=256):
                found = model(self._read(images))
                if not isinstance(found, Tensor) or found.shape[1:] != (self.data.num_classes,):
                    return None
                right += int((found.argmax(dim=1).cpu() == labels).sum())
                count += len(labels)
        return right / count

    def _read(self, images: Tensor) -> Tensor:
        return images.expand(-1, self._channels, -1, -1).contiguous().to(self._like)


@dataclass(frozen=True)
class _Shuffled:
    loader: DataLoader[Any]
    read: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            found = self.read(images)
            yield found, labels.to(found.device)


def scoring_batch(
    data: str, inputs: tuple[Tensor, ...], *, root: Path, seed: int
) -> tuple[Tensor, Tensor] | None:
    """Return ``(images, labels)`` of a data set, ten training images of each class.

    Args:
        data: ``random``, or a name of `blockprune.data.DATASETS`.
        inputs, root, seed: see `NamedImages`.

    Returns:
        None for ``random``: scoring then draws a batch itself, and says so.

    Raises:
        DataError: see `NamedImages`; or the data set has a class of fewer images.
    """
    if data == "random":
        return None
    return NamedImages(data, inputs, root, seed).balanced(IMAGES_PER_CLASS)


def _misfit(data: str, wanted: str, inputs: tuple[Tensor, ...]) -> DataError:
    shapes = ", ".join("x".join(str(n) for n in tensor.shape) for tensor in inputs)
    return DataError(f"--data {data} needs a model of {wanted}; this one reads {shapes}.")
