"""Everything that robustness of one network is, measured in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blockprune.errors import DataError
from blockprune.robustness.attacking import EXAMPLES, AttackWork, UnderAttack
from blockprune.robustness.attacks import check_attacks
from blockprune.robustness.calibration import agreement, expected_calibration_error
from blockprune.robustness.corruptions import check_corruption, corrupt
from blockprune.robustness.files import CorruptedFiles
from blockprune.robustness.measures import (
    corruption_errors,
    mean_error,
    proportion,
    severity_errors,
)
from blockprune.robustness.normalising import Normalised, PixelData, logits_of
from blockprune.robustness.pictures import pictures_of
from blockprune.robustness.record import (
    COMMON_CORRUPTIONS,
    SEVERITIES,
    AttackChoice,
    CorruptionAccuracy,
    Normalisation,
    RobustnessResult,
    ShiftAccuracy,
)

__all__ = ["Progress", "robustness_of"]

Progress = Callable[[int, int, str], None]
"""Called with the parts done, the parts there are, and what the last one was."""


def robustness_of(
    model: nn.Module,
    data: PixelData,
    *,
    normalisation: Normalisation,
    dense: nn.Module | None = None,
    corruptions: Sequence[str] = COMMON_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    files: CorruptedFiles | None = None,
    shifts: Mapping[str, Dataset[Any]] | None = None,
    attacks: Sequence[AttackChoice] = (),
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    on_event: Progress | None = None,
) -> dict[str, Any]:
    """Return accuracy under corruptions, on other test sets and under attack, and calibration.

    The network runs in evaluation mode; its weights, gradients and modes and the generators are
    as before afterwards.

    Args:
        model: maps normalised images to logits ``(N, classes)``.
        data: the test images as pixels, with labels.
        normalisation: what the model expects.
        dense: the network that it was pruned from: attacks are transferred from it, and decisions
            compared with it.
        corruptions: names; empty for none.
        severities: of each.
        files: read the corruptions from these rather than make them.
        shifts: other test sets by name, of ``(image, label)``, images as pixels in [0, 1].
        attacks: with their settings; empty for none.
        samples: number of images attacked, drawn by the seed; None for all.
        seed: of corruptions, attacks and the choice of images.
        batch_size: images at once.
        on_event: called after each part.

    Returns:
        A `RobustnessResult` as JSON values; ``RobustnessResult.model_validate`` reads it.

    Raises:
        DataError: there are no images, a corruption is unknown, or a file does not fit.
        MeasurementError: the model returned no logits, or NaN.
        MissingExtraError: attacks were asked for and the extra is not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.robustness import Normalisation, PixelData, robustness_of
        >>> data = PixelData(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = robustness_of(model, data, normalisation=Normalisation(),
        ...                       corruptions=["fog"], severities=[1, 5])
        >>> sorted(found["severity_errors"])
        ['1', '5']
    """
    if not len(data):
        raise DataError("There are no test images to measure robustness on.")
    for name in corruptions:
        for severity in severities:
            check_corruption(name, severity)
    if attacks:
        check_attacks()
    work = _Work(
        Normalised(model, normalisation),
        None if dense is None else Normalised(dense, normalisation),
        data,
        seed,
        batch_size,
        _Steps(
            1 + len(corruptions) * len(severities) + len(shifts or ()) + _parts(attacks), on_event
        ),
    )
    logits = logits_of(work.model, data.images, batch_size=batch_size)
    clean = proportion(work.hits(logits, data.labels), len(data))
    alike = None if work.dense is None else agreement(logits, work.logits(work.dense, data.images))
    work.steps.done("clean")
    rows = tuple(work.corrupted(corruptions, severities, files))
    shifted = tuple(work.shifted(shifts or {}))
    under_attack = work.attacked(attacks, samples) if attacks else UnderAttack()
    errors = corruption_errors(rows)
    examples = under_attack.examples or _first_right(logits, data.labels)
    pictures = pictures_of(
        work.model,
        data,
        examples,
        # Those in files are of other images, or in another order.
        corruptions=rows if files is None else (),
        attacks=attacks,
        seed=seed,
    )
    return RobustnessResult(
        seed=seed,
        clean=clean,
        corrupted_by=None if not rows else "made" if files is None else "files",
        corruptions=rows,
        corruption_errors=errors,
        severity_errors=severity_errors(rows),
        mean_error=mean_error(errors),
        shifts=shifted,
        attacked=under_attack.images,
        attacks=under_attack.curves,
        zero_gradients=under_attack.zero_gradients,
        flags=under_attack.flags,
        ece=expected_calibration_error(logits, data.labels),
        agreement=alike,
        examples=examples,
        pictures=pictures,
    ).model_dump(mode="json")


def _parts(attacks: Sequence[AttackChoice]) -> int:
    """Return how many parts attacks are: the gradients, and each of them."""
    return len(attacks) + 1 if attacks else 0


def _first_right(logits: Tensor, labels: Tensor) -> tuple[int, ...]:
    right = logits.argmax(dim=1).cpu() == labels.cpu()
    return tuple(right.nonzero().flatten()[:EXAMPLES].tolist())


class _Steps:
    """Counts the parts done and tells of each."""

    def __init__(self, total: int, on_event: Progress | None) -> None:
        self._total = total
        self._done = 0
        self._on_event = on_event

    def done(self, what: str) -> None:
        self._done += 1
        if self._on_event is not None:
            self._on_event(self._done, self._total, what)


@dataclass(frozen=True)
class _Work:
    """The networks and the images that every part is measured on."""

    model: Normalised
    dense: Normalised | None
    data: PixelData
    seed: int
    batch_size: int
    steps: _Steps

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        return logits_of(model, images, batch_size=self.batch_size)

    @staticmethod
    def hits(logits: Tensor, labels: Tensor) -> int:
        return int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())

    def corrupted(
        self, names: Sequence[str], severities: Sequence[int], files: CorruptedFiles | None
    ) -> Iterator[CorruptionAccuracy]:
        for name in names:
            for severity in severities:
                if files is None:
                    made = corrupt(self.data.images, name, severity, seed=self.seed)
                    hits, images = (
                        self.hits(self.logits(self.model, made), self.data.labels),
                        len(made),
                    )
                else:
                    hits, images = self.counted(files.read(name, severity))
                yield CorruptionAccuracy(name=name, severity=severity, accuracy=hits / images)
                self.steps.done(f"{name} {severity}")

    def shifted(self, shifts: Mapping[str, Dataset[Any]]) -> Iterator[ShiftAccuracy]:
        for name, dataset in shifts.items():
            yield ShiftAccuracy(name=name, found=proportion(*self.counted(dataset)))
            self.steps.done(name)

    def counted(self, dataset: Dataset[Any]) -> tuple[int, int]:
        """Return hits and images of a data set that may not fit in memory."""
        hits = images = 0
        for batch, labels in DataLoader(dataset, batch_size=self.batch_size):
            part = PixelData(batch, labels)
            hits += self.hits(self.logits(self.model, part.images), part.labels)
            images += len(part)
        return hits, images

    def attacked(self, attacks: Sequence[AttackChoice], samples: int | None) -> UnderAttack:
        return AttackWork(
            self.model, self.dense, self.data, self.seed, self.batch_size, self.steps.done
        ).run(attacks, samples)
