"""The batch that ``--data`` names, in the shape that the model reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from blockprune.data import balanced_batch, data_options, load_data
from blockprune.errors import DataError

__all__ = ["scoring_batch"]

# GraSP's batch: ten images of each class.
IMAGES_PER_CLASS = 10


def scoring_batch(
    data: str,
    inputs: tuple[Tensor, ...],
    *,
    root: Path,
    seed: int,
    images_in_all: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return ``(images, labels)`` of a data set, as many training images a class, not augmented.

    Args:
        data: ``random``, or a name of `blockprune.data.DATASETS`.
        inputs: example inputs of the model, whose channels and size the images must take. Digits
            are resized; grey images are repeated for a model that reads three channels.
        root: the folder that holds the files of the data set; `digits` needs none.
        seed: of the draw, and of the split of the digits.
        images_in_all: about how many; None: ten of each class.

    Returns:
        None for ``random``: scoring then draws a batch itself, and says so.

    Raises:
        DataError: the data set is absent or damaged, has a class of fewer images, or its images are
            not what the model reads.
    """
    if data == "random":
        return None
    shape = tuple(inputs[0].shape)
    if len(inputs) != 1 or len(shape) != 4:
        raise _misfit(data, "images", inputs)
    options = {"augment": False, "seed": seed}
    if shape[2] == shape[3]:
        options["image_size"] = shape[2]
    known = data_options(data)
    images = load_data(
        data, root, **{name: value for name, value in options.items() if name in known}
    )
    channels, *size = images.image_shape
    if list(shape[2:]) != size or shape[1] not in {channels, 3}:
        wanted = {"x".join(map(str, (count, *size))) for count in (channels, 3)}
        example = ",".join(map(str, (1, *images.image_shape)))
        raise _misfit(
            data, f"{' or '.join(sorted(wanted))} images (try --input-shape {example})", inputs
        )
    each = IMAGES_PER_CLASS
    if images_in_all is not None:
        each = max(1, images_in_all // images.num_classes)
    batch, labels = balanced_batch(images.train, images.num_classes, each, seed=seed)
    chosen = batch.expand(-1, shape[1], -1, -1).contiguous()
    return chosen.to(inputs[0]), labels.to(inputs[0].device)


def _misfit(data: str, wanted: str, inputs: tuple[Tensor, ...]) -> DataError:
    shapes = ", ".join("x".join(str(n) for n in tensor.shape) for tensor in inputs)
    return DataError(f"--data {data} needs a model of {wanted}; this one reads {shapes}.")
