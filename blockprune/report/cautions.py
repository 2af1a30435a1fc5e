"""What a reader must know before believing a figure of a run, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from blockprune.lottery.record import RunRecord
from blockprune.report.cases import Cases

__all__ = ["cautions", "listed"]

FEW_SEEDS = 5
WIDE = 2
"""Tolerances that dense networks may lie apart without a word."""

MOST_NAMES = 8
"""That one sentence lists."""


def listed(names: Sequence[str]) -> str:
    """Return names apart by semicolons, of many the first and how many more.

    Example:
        >>> from blockprune.report.cautions import listed
        >>> listed(["a", "b"]), listed(["a"] * 9)[-10:]
        ('a; b', 'and 1 more')
    """
    more = len(names) - MOST_NAMES
    return "; ".join([*names[:MOST_NAMES], *([f"and {more} more"] if more > 0 else [])])


def cautions(record: RunRecord) -> tuple[str, ...]:
    """Return the limits of a run that follow from its own figures."""
    cases = Cases(record)
    return tuple(
        sentence
        for sentence in (
            _on_seeds(cases),
            _on_the_dense_networks(cases),
            _on_absent_networks(cases),
            _on_equal_seeds(record),
            _on_the_test_set(record),
            _on_many_cases(record),
            _on_unmeasured(record),
        )
        if sentence
    )


def _on_seeds(cases: Cases) -> str:
    seeds = len(cases.seeds)
    if seeds < 2:
        return (
            f"The dense network was trained with {seeds or 'no'} seed{'' if seeds == 1 else 's'}: "
            "no interval can be given, and no case is decided."
        )
    if seeds < FEW_SEEDS:
        return (
            f"All rests on {seeds} seeds. Intervals of so few are wide and their width is itself "
            'uncertain: read "ties" as "not decided", and differences smaller than an interval as '
            "none."
        )
    return ""


def _on_the_dense_networks(cases: Cases) -> str:
    accuracies = [100 * network.accuracy for network in cases.dense]
    apart = max(accuracies, default=0.0) - min(accuracies, default=0.0)
    if apart <= WIDE * max(cases.record.xi_points, 1.0):
        return ""
    return (
        f"The dense networks of different seeds lie {apart:.2f} points apart: their training is "
        "not settled, and a ticket that beats a weak one may be no better than a good one."
    )


def _on_absent_networks(cases: Cases) -> str:
    short = [
        f"{verdict.case.label()} ({len(verdict.differences)} of {len(cases.seeds)})"
        for verdict in cases.record.verdicts
        if len(verdict.differences) < len(cases.seeds)
    ]
    if not short:
        return ""
    return f"Not every seed could be compared with its dense network: {listed(short)}."


def _on_equal_seeds(record: RunRecord) -> str:
    flat = [
        verdict.case.label()
        for verdict in record.verdicts
        if verdict.interval is not None and verdict.interval[0] == verdict.interval[1]
    ]
    if not flat:
        return ""
    return (
        "An interval without width does not mean certainty: of few seeds on a test set of few "
        f"images, all differences happened to be the same ({listed(flat)})."
    )


def _on_the_test_set(record: RunRecord) -> str:
    images = record.data.get("test_images")
    if not isinstance(images, int) or images < 1:
        return ""
    step = 100 / images
    return (
        f"The test set has {images:,} images, so one image is {step:.2f} points and no accuracy "
        "lies in between."
    )


def _on_many_cases(record: RunRecord) -> str:
    judged = [verdict for verdict in record.verdicts if verdict.interval is not None]
    if len(judged) < 2:
        return ""
    return (
        f"{len(judged)} cases are judged, each with an interval of {100 * record.confidence:g} % "
        "confidence of its own: with so many, some fall on the wrong side by chance alone."
    )


def _on_unmeasured(record: RunRecord) -> str:
    cases = Cases(record)
    shown = (
        *cases.dense,
        *(n for c in (*cases.tickets, *cases.controls) for n in cases.networks(c)),
    )
    if cases.has_blocks and any(network.latency_ms is None for network in shown):
        return "Latency was not measured for every network; the cost shown is in MACs."
    return ""
