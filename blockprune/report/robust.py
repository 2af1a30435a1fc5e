"""Robustness of tickets beside that of the dense network.

Source: papers/000, Table 5: points of a ticket above or below the dense network on corrupted
images and on another test set.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Final

from blockprune.lottery.record import TicketCase
from blockprune.lottery.verdicts import paired_interval
from blockprune.report.cases import Cases
from blockprune.report.robust_charts import example_pictures, robust_charts
from blockprune.report.robust_figures import Measure, Robust, measures_of
from blockprune.report.sections import ABSENT, Cell, Part, Section, Table, best_of, spread_of
from blockprune.robustness.record import COMMON_CORRUPTIONS

__all__ = ["robustness_section"]

SIDES: Final = {
    "above": "above dense",
    "below": "below dense",
    "open": "not told apart",
    "unknown": "one seed",
}

NORMS: Final = "epsilon is the largest change of a pixel, of deepfool the length in L2"


def robustness_section(cases: Cases) -> Section | None:
    """Return how networks stand up, None for a run that did not look."""
    robust = Robust.of(cases)
    results = robust.all()
    if not results:
        return None
    measures = measures_of(results)
    parts = [_answer(cases, robust, measures)]
    parts.append(Part(text=_flags(robust), tables=_tables(cases, robust, measures)))
    figures = robust_charts(robust)
    if figures:
        parts.append(Part("Against severity and epsilon", (_on_curves(),), figures=figures))
    pictures = example_pictures(robust)
    if pictures:
        said = (
            "Test images of the first seed that the network is right on, and what it sees in them: "
            "clean, under the corruption that costs it most, and under each attack at its largest "
            "epsilon. The number is the class it decides on, ✗ a wrong one."
        )
        parts.append(Part("Examples", (said,), figures=pictures))
    corruptions = _by_corruption(robust)
    if corruptions.rows:
        parts.append(Part("Each corruption", tables=(corruptions,), is_folded=True))
    return Section(
        "robustness",
        "Robustness",
        "Robustness: corruptions, other test sets, attacks",
        (),
        tuple(parts),
    )


# --- the answer -----------------------------------------------------------------------------------


def _answer(cases: Cases, robust: Robust, measures: list[Measure]) -> Part:
    """Say whether tickets are more robust, by intervals paired over seeds."""
    tickets = [case for case in robust.others if case.kind == "ticket"]
    if not robust.dense or not tickets:
        return Part(text=("Not compared: the dense network, or a ticket, was not looked at.",))
    confidence = cases.record.confidence
    by_measure: dict[str, Counter[str]] = {}
    for measure in measures:
        for case in tickets if measure.is_harder else ():
            differences = robust.differences(case, measure)
            if differences:
                side = _side(paired_interval(differences, confidence))
                by_measure.setdefault(measure.name, Counter())[side] += 1
    total = sum(by_measure.values(), Counter[str]())
    if not total:
        return Part(text=("Not compared: no seed has both on harder images than the clean ones.",))
    rows = tuple(
        (name, tuple(Cell(str(found[side])) for side in SIDES))
        for name, found in by_measure.items()
    )
    note = (
        f"Above and below: the whole {100 * confidence:g} % interval of the difference to dense, "
        "paired over seeds, lies there. Of many intervals some fall on one side by chance alone, "
        "and a ticket better on clean images is better on most others."
    )
    table = Table("Tickets against dense", "accuracy", tuple(SIDES.values()), rows, (note,))
    return Part(text=(_in_short(total),), tables=(table,))


def _side(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "unknown"
    return "above" if interval[0] > 0 else "below" if interval[1] < 0 else "open"


def _in_short(total: Counter[str]) -> str:
    if total["unknown"] == total.total():
        return "Whether tickets are more robust than the dense network cannot be told by one seed."
    if total["above"] and total["below"]:
        return (
            "Some tickets are more robust than the dense network by some measure, some are less "
            "so: there is no one answer."
        )
    if total["above"]:
        return "Tickets are more robust than the dense network where the seeds tell them apart."
    if total["below"]:
        return "Tickets are less robust than the dense network where the seeds tell them apart."
    return "Nothing tells tickets and the dense network apart in robustness here."


def _flags(robust: Robust) -> tuple[str, ...]:
    """Name the networks whose attacks may be too weak to believe."""
    found: dict[str, list[str]] = {}
    for case, results in robust.results.items():
        for seed, result in results.items():
            for flag in result.flags:
                found.setdefault(flag, []).append(f"{case.label()}, seed {seed}")
    return tuple(f"Do not trust the attacks on {'; '.join(n)}: {flag}" for flag, n in found.items())


# --- tables ---------------------------------------------------------------------------------------


def _tables(cases: Cases, robust: Robust, measures: list[Measure]) -> tuple[Table, ...]:
    absolute = _absolute(robust, measures)
    if not robust.dense or not robust.others:
        return (absolute,)
    confidence = cases.record.confidence
    rows = tuple(
        (
            case.label(),
            tuple(_difference(robust.differences(case, m), confidence) for m in measures),
        )
        for case in robust.others
    )
    compared = Table(
        "Table 5: points above or below the dense network",
        "ticket",
        tuple(measure.name for measure in measures),
        rows,
        (
            "In the paper's form: (+) and (-) are points above and below the dense network of the "
            "same seed, mean over seeds with its interval. Corruptions: mean over corruptions and "
            "severities. An attack: mean over its epsilons above 0.",
        ),
    )
    return compared, absolute


def _difference(differences: list[float], confidence: float) -> Cell:
    if not differences:
        return ABSENT
    mean = round(statistics.fmean(differences), 2)
    interval = paired_interval(differences, confidence)
    said = "no interval" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return Cell(f"({'-' if mean < 0 else '+'}) {abs(mean):.2f}", (said,))


def _absolute(robust: Robust, measures: list[Measure]) -> Table:
    calibration = Measure("ECE", lambda result: result.ece)
    agreement = Measure("agreement", lambda result: result.agreement)
    rows = tuple(
        (
            case.label(),
            tuple(
                Cell(spread_of(robust.values(case, measure)))
                for measure in (*measures, calibration, agreement)
            ),
        )
        for case in robust.results
    )
    heads = (*(f"{m.name}, %" for m in measures), "ECE, %", "decides like dense, %")
    note = (
        "Mean ± standard deviation over seeds. ECE is the expected calibration error on clean "
        "images, 0 at best."
    )
    return Table("Accuracy, calibration and agreement", "network", heads, rows, (note,))


def _on_curves() -> str:
    return f"Means over seeds; severity 0 is clean; {NORMS}."


def _by_corruption(robust: Robust) -> Table:
    names = dict.fromkeys(name for result in robust.all() for name in result.corruption_errors)
    heads = tuple(case.label() for case in robust.results)
    rows = tuple((_written(name), _corrupted(robust, name)) for name in names)
    extra = [name for name in names if name not in COMMON_CORRUPTIONS]
    notes = ["Accuracy in percent, mean over severities. Bold: best of its row."]
    if extra:
        notes.append(f"Not among the fifteen of the mean: {', '.join(map(_written, extra))}.")
    return Table("", "corruption", heads, rows, tuple(notes))


def _corrupted(robust: Robust, name: str) -> tuple[Cell, ...]:
    def samples(case: TicketCase) -> list[float]:
        found = (result.corruption_errors.get(name) for result in robust.results[case].values())
        return [100 * (1 - error) for error in found if error is not None]

    return best_of([samples(case) for case in robust.results])


def _written(name: str) -> str:
    return name.replace("_", " ")
