"""Averages, intervals and calibration against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from blockprune.errors import MeasurementError
from blockprune.robustness.calibration import agreement, expected_calibration_error
from blockprune.robustness.measures import (
    ALEXNET_ERRORS,
    corruption_errors,
    mean_error,
    normalised_error,
    proportion,
    severity_errors,
)
from blockprune.robustness.record import COMMON_CORRUPTIONS, CorruptionAccuracy


def test_errors_by_corruption_and_by_severity() -> None:
    rows = [
        CorruptionAccuracy(name=name, severity=severity, accuracy=accuracy)
        for name, severity, accuracy in (
            ("fog", 1, 0.75),
            ("fog", 2, 0.25),
            ("snow", 1, 0.5),
            ("snow", 2, 0.0),
            ("saturate", 1, 0.0),
        )
    ]
    errors = corruption_errors(rows)
    assert errors == {"fog": 0.5, "snow": 0.75, "saturate": 1.0}
    assert severity_errors(rows) == {"1": pytest.approx(1.75 / 3), "2": 0.875}
    assert mean_error(errors) == 0.625
    assert mean_error({"saturate": 1.0}) is None


def test_the_normalised_error_divides_corruption_by_corruption() -> None:
    assert set(ALEXNET_ERRORS) == set(COMMON_CORRUPTIONS)
    halves = {name: error / 2 for name, error in ALEXNET_ERRORS.items()}
    assert normalised_error(halves) == pytest.approx(0.5)
    assert normalised_error({"fog": 0.1, "snow": 0.3}, {"fog": 0.2, "snow": 0.2}) == pytest.approx(
        1
    )
    with pytest.raises(MeasurementError, match="not measured: fog"):
        normalised_error({}, {"fog": 0.5})
    with pytest.raises(MeasurementError, match="above 0"):
        normalised_error({"fog": 0.5}, {"fog": 0.0})


def test_wilson_interval_solves_its_equation() -> None:
    found = proportion(37, 120)
    for end in (found.low, found.high):
        score = (found.accuracy - end) ** 2 / (end * (1 - end) / 120)
        assert score == pytest.approx(1.959963984540054**2)
    assert proportion(0, 10).low == 0
    assert proportion(10, 10).high == 1
    for hits, images in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(MeasurementError, match="No share"):
            proportion(hits, images)


def test_calibration_by_hand() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 0])
    # Of nine bins (8/9, 1] has 1 of 2 right at 0.9; 0.6 and 0.7 have bins of their own.
    expected = (2 * 0.4 + 0.4 + 0.7) / 4
    found = expected_calibration_error(shares.log(), labels, bins=9)
    assert found == pytest.approx(expected)
    assert expected_calibration_error(shares.log().half(), labels, bins=1) == pytest.approx(
        abs(0.5 - 0.775), abs=1e-3
    )


def test_agreement_ignores_the_labels() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert agreement(one, 10 * one) == 1
    assert agreement(one, -one) == 0
    with pytest.raises(MeasurementError, match="row by row"):
        agreement(one, one[:2])
    with pytest.raises(MeasurementError, match="NaN"):
        agreement(one, one * torch.nan)
    with pytest.raises(MeasurementError, match="one label"):
        expected_calibration_error(one, torch.tensor([0]))
    with pytest.raises(MeasurementError, match="at least 1"):
        agreement(one[:0], one[:0])
