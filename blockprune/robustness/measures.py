"""Errors under corruption as the benchmarks average them, and shares with their interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from blockprune.errors import MeasurementError
from blockprune.robustness.record import COMMON_CORRUPTIONS, CorruptionAccuracy, Proportion

__all__ = [
    "ALEXNET_ERRORS",
    "corruption_errors",
    "mean_error",
    "normalised_error",
    "proportion",
    "severity_errors",
]

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error of AlexNet over the severities of ImageNet-C.

Source: https://github.com/hendrycks/robustness, as published with ImageNet-C.
"""


def corruption_errors(found: Iterable[CorruptionAccuracy]) -> dict[str, float]:
    """Return the mean error over the severities of each corruption.

    Example:
        >>> from blockprune.robustness.measures import corruption_errors
        >>> from blockprune.robustness.record import CorruptionAccuracy
        >>> rows = [CorruptionAccuracy(name="fog", severity=s, accuracy=a)
        ...         for s, a in ((1, 0.75), (2, 0.5))]
        >>> corruption_errors(rows)
        {'fog': 0.375}
    """
    return _mean_errors((row.name, row) for row in found)


def severity_errors(found: Iterable[CorruptionAccuracy]) -> dict[str, float]:
    """Return the mean error over the corruptions at each severity, by the severity as text."""
    return _mean_errors((str(row.severity), row) for row in found)


def _mean_errors(keyed: Iterable[tuple[str, CorruptionAccuracy]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, row in keyed:
        groups.setdefault(key, []).append(1 - row.accuracy)
    return {key: fmean(errors) for key, errors in groups.items()}


def mean_error(errors: Mapping[str, float]) -> float | None:
    """Return the mean over the common fifteen corruptions, those that are there.

    None where none of them is. It is the figure of CIFAR-10-C where all fifteen are there with
    all five severities.
    """
    common = [errors[name] for name in COMMON_CORRUPTIONS if name in errors]
    return fmean(common) if common else None


def normalised_error(
    errors: Mapping[str, float], baseline: Mapping[str, float] = ALEXNET_ERRORS
) -> float:
    """Return ImageNet-C's mean corruption error::

        mCE = mean over c of (error_c / baseline_c)

    Args:
        errors: mean error over the severities of each corruption, in [0, 1].
        baseline: the same of the network compared with; its corruptions are the mean's.

    Returns:
        1 for a network as good as the baseline; often published times 100.

    Raises:
        MeasurementError: a corruption of the baseline was not measured, or its error is 0.

    Example:
        >>> from blockprune.robustness.measures import ALEXNET_ERRORS, normalised_error
        >>> normalised_error(ALEXNET_ERRORS)
        1.0

    Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations", 2019, section 4.1.
    """
    absent = [name for name in baseline if name not in errors]
    if absent or not baseline:
        raise MeasurementError(
            "The normalised error is over every corruption of the baseline; not measured: "
            f"{', '.join(absent) or 'the baseline is empty'}."
        )
    if any(error <= 0 for error in baseline.values()):
        raise MeasurementError("The baseline's errors are divided by and must be above 0.")
    return fmean(errors[name] / baseline[name] for name in baseline)


def proportion(hits: int, images: int) -> Proportion:
    """Return ``hits / images`` with its 95 % Wilson interval.

    Raises:
        MeasurementError: there are no images, or more hits than images.

    Example:
        >>> from blockprune.robustness.measures import proportion
        >>> found = proportion(90, 100)
        >>> found.accuracy, round(found.low, 4), round(found.high, 4)
        (0.9, 0.8256, 0.9448)

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if images < 1 or not 0 <= hits <= images:
        raise MeasurementError(f"No share is {hits} of {images} images.")
    # Here, since importing it takes half a second.
    from scipy.stats import binomtest

    interval = binomtest(hits, images).proportion_ci(method="wilson")
    return Proportion(
        images=images,
        accuracy=hits / images,
        low=max(0.0, float(interval.low)),
        high=min(1.0, float(interval.high)),
    )
