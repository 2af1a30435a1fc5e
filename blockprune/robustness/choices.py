"""From what is asked for to what is measured: data sets and files found, one call made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.utils.data import Dataset

from blockprune.data import ImageData
from blockprune.errors import DataError
from blockprune.robustness.files import (
    CorruptedFiles,
    load_cifar10_1,
    load_cifar10_2,
    load_labelled_folder,
)
from blockprune.robustness.measuring import Progress, robustness_of
from blockprune.robustness.normalising import pixels_of
from blockprune.robustness.record import Normalisation, RobustnessChoice

__all__ = ["check_files", "measured"]

PUBLISHED: Final[dict[str, Callable[[Path], Dataset[Any]]]] = {
    "cifar10.1": load_cifar10_1,
    "cifar10.1-v4": partial(load_cifar10_1, version="v4"),
    "cifar10.2": load_cifar10_2,
}
"""Other test sets that are read in a form of their own."""


def measured(
    choice: RobustnessChoice,
    model: nn.Module,
    data: ImageData,
    *,
    dense: nn.Module | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    on_event: Progress | None = None,
) -> dict[str, Any]:
    """Return the robustness of a model as JSON values; see `robustness_of`.

    Args:
        choice: what is measured.
        model: trained on `data`.
        data: its test images are corrupted and attacked as pixels, and normalised afterwards.
        dense: the network that it was pruned from.
        data_dir: the folder that holds those of the choice.
        seed: of corruptions, attacks and the choice of images.
        on_event: called after each part.

    Raises:
        DataError: files are absent or do not fit.
        MissingExtraError: attacks were asked for and the extra is not installed.

    Example:
        >>> from blockprune.data import load_digits
        >>> from blockprune.models import lenet300
        >>> from blockprune.robustness import RobustnessChoice, measured
        >>> choice = RobustnessChoice(corruptions="fog", severities=[1])
        >>> found = measured(choice, lenet300(image_size=8), load_digits(test_share=0.1))
        >>> found["clean"]["images"], found["corruptions"][0]["name"]
        (180, 'fog')
    """
    size = data.image_shape[-1]
    return robustness_of(
        model,
        pixels_of(data.test, Normalisation(mean=data.mean, deviation=data.deviation)),
        normalisation=Normalisation(mean=data.mean, deviation=data.deviation),
        dense=dense,
        corruptions=choice.corruptions,
        severities=choice.severities,
        files=_files(choice, data_dir),
        shifts=_shifts(choice, data_dir, size),
        attacks=choice.attacks,
        samples=choice.samples,
        seed=seed,
        on_event=on_event,
    )


def check_files(choice: RobustnessChoice, data_dir: str | Path | None, image_size: int) -> None:
    """Open every file that a choice names.

    Raises:
        DataError: one is absent, or not what it should be.
    """
    files = _files(choice, data_dir)
    if files is not None:
        for name in choice.corruptions:
            for severity in choice.severities:
                files.read(name, severity)
    _shifts(choice, data_dir, image_size)


def _files(choice: RobustnessChoice, data_dir: str | Path | None) -> CorruptedFiles | None:
    if choice.corruption_files is None:
        return None
    return CorruptedFiles(_inside(data_dir, choice.corruption_files, "corruption_files"))


def _shifts(
    choice: RobustnessChoice, data_dir: str | Path | None, image_size: int
) -> dict[str, Dataset[Any]]:
    found = {}
    for name, folder in choice.shifts.items():
        place = _inside(data_dir, folder, f"the shift {name}")
        published = PUBLISHED.get(name.lower())
        found[name] = (
            load_labelled_folder(place, image_size=image_size)
            if published is None
            else published(place)
        )
    return found


def _inside(data_dir: str | Path | None, folder: str, what: str) -> Path:
    if data_dir is None:
        raise DataError(
            f"{what} is read from the folder {folder!r} of the data: say where that is (data_dir, "
            "on the command line --data-dir)."
        )
    return Path(data_dir) / folder
