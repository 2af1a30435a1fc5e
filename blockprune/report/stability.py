"""How far noise carries tickets of weights: the tables and curves of papers/004.

Sources: papers/004, Figures 3 and 10 (tables of distances and angles), 4 and 11 (curves against the
step rewound to); Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis",
2020.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from blockprune.lottery.record import (
    ConnectivityRecord,
    Distance,
    StabilityRecord,
    TicketCase,
)
from blockprune.lottery.steps import Step
from blockprune.lottery.verdicts import random_twin
from blockprune.report.cases import Cases, Source, moment_of
from blockprune.report.grouping import LevelGroup, percent_left, rewind_places
from blockprune.report.sections import ABSENT, Cell, Part, Section, Table, spread_of
from blockprune.report.svg import Figure, Plot, span_of

__all__ = ["stability_section"]

STABLE: Final = 0.02
"""Instability below which a network counts as stable (Frankle et al., 2020)."""

Samples = Mapping[TicketCase, Sequence[float]]


@dataclass(frozen=True)
class _Measure:
    """One way to say how far apart two weights are."""

    name: str
    axis: str
    read: Callable[[Distance], float]


MEASURES: Final = (
    _Measure("L2 distance", "L2 distance to {}", lambda distance: distance.l2),
    _Measure("Angle, degrees", "angle to {}, degrees", lambda distance: distance.degrees),
)
NOISES: Final[tuple[tuple[str, Callable[[StabilityRecord], Distance]], ...]] = (
    ("data order", lambda record: record.to_order),
    ("pruning", lambda record: record.to_pruning),
)


def stability_section(cases: Cases) -> Section | None:
    """Return distances and connectivity, None for a run that measured neither."""
    record = cases.record
    parts = [*_distance_parts(cases, record.stabilities), *_connectivity_parts(cases)]
    if not parts:
        return None
    text = (
        "To data order: how far apart one masked network ends when it is trained on two orders of "
        "the data. To pruning: how far it ends from the dense network that was trained on the same "
        "order, on the weights of the mask. Less is steadier; the ratio is random to ticket. Mean "
        "± standard deviation over seeds.",
    )
    return Section(
        "stability",
        "Stability",
        "Stability to pruning and to data order",
        text if record.stabilities else (),
        tuple(parts),
    )


# --- distances ------------------------------------------------------------------------------------


def _distance_parts(cases: Cases, records: Sequence[StabilityRecord]) -> list[Part]:
    if not records:
        return []
    tables = tuple(_table(cases, records, measure) for measure in MEASURES)
    parts = [Part(tables=tables)]
    figures = _curves(cases, records)
    if figures:
        title = "Against the step rewound to"
        parts.append(Part(title, ("The dashed lines are random masks.",), figures=figures))
    return parts


def _table(cases: Cases, records: Sequence[StabilityRecord], measure: _Measure) -> Table:
    samples = {noise: _samples(records, read, measure) for noise, read in NOISES}
    known = samples[NOISES[0][0]]
    tickets = [case for case in known if case.kind == "ticket"]
    alone = [case for case in known if case.kind != "ticket" and not _has_ticket(case, tickets)]
    rows = []
    for case in (*tickets, *alone):
        ticket, twin = (case, random_twin(case)) if case in tickets else (None, case)
        left = percent_left(cases, [case])
        cells = [Cell(f"{100 - left:.2f}") if left == left else ABSENT]
        for noise in samples.values():
            cells += _compared(noise.get(ticket, ()) if ticket else (), noise.get(twin, ()))
        cells += [Cell(_accuracy(cases, ticket)), Cell(_accuracy(cases, twin))]
        rows.append((case.label(), tuple(cells)))
    columns = [
        f"to {noise}: {column}" for noise, _ in NOISES for column in ("ticket", "random", "ratio")
    ]
    heads = ("sparsity, %", *columns, "accuracy: ticket, %", "accuracy: random, %")
    return Table(measure.name, "case", heads, tuple(rows))


def _samples(
    records: Iterable[StabilityRecord],
    read: Callable[[StabilityRecord], Distance],
    measure: _Measure,
) -> dict[TicketCase, list[float]]:
    found: dict[TicketCase, list[float]] = {}
    for record in records:
        found.setdefault(record.case, []).append(measure.read(read(record)))
    return found


def _has_ticket(control: TicketCase, tickets: Iterable[TicketCase]) -> bool:
    return any(random_twin(ticket) == control for ticket in tickets)


def _compared(ticket: Sequence[float], control: Sequence[float]) -> list[Cell]:
    ratio = ABSENT
    if ticket and control and statistics.fmean(ticket) > 0:
        ratio = Cell(f"{statistics.fmean(control) / statistics.fmean(ticket):.2f}x")
    return [Cell(spread_of(ticket)), Cell(spread_of(control)), ratio]


def _accuracy(cases: Cases, case: TicketCase | None) -> str:
    networks = cases.networks(case) if case is not None else []
    return spread_of([100 * network.accuracy for network in networks])


def _curves(cases: Cases, records: Sequence[StabilityRecord]) -> tuple[Figure, ...]:
    """Return each measure of each noise, and accuracy, where tickets went back to several steps."""
    charts = []
    for measure in MEASURES:
        for noise, read in NOISES:
            samples = _samples(records, read, measure)
            charts.append(_against_step(cases, measure.axis.format(noise), samples))
    judged = dict.fromkeys(record.case for record in records)
    accuracies = {case: [100 * n.accuracy for n in cases.networks(case)] for case in judged}
    charts.append(_against_step(cases, "test accuracy, %", accuracies))
    return tuple(chart for chart in charts if chart is not None)


def _against_step(
    cases: Cases, title: str, samples: Samples, threshold: float | None = None
) -> Figure | None:
    """Return means with the range of the seeds; of one step there is no curve."""
    lines: dict[TicketCase, list[TicketCase]] = {}
    for case in samples:
        if case.rewound_to is not None and samples[case]:
            lines.setdefault(case.model_copy(update={"rewound_to": None}), []).append(case)
    lines = {line: found for line, found in lines.items() if len(found) > 1}
    members = [case for found in lines.values() for case in found]
    if not members:
        return None
    steps = {case.rewound_to for case in members if case.rewound_to is not None}
    places, axis = rewind_places(cases, steps)
    values = [value for case in members for value in samples[case]]
    plot = Plot(
        f"{title} against the step rewound to",
        x=span_of(places.values()),
        y=span_of([*values, *([0.0, threshold] if threshold is not None else [])]),
        x_title=axis,
        y_title=title,
        whole_x=True,
    )
    if threshold is not None:
        plot.level(threshold, "dense")
    for found in lines.values():
        _draw(plot, cases, found, samples, places)
    legend = tuple(
        dict.fromkeys((cases.css(found[0]), _name(found[0], lines)) for found in lines.values())
    )
    return Figure(title.capitalize() if title[0] != "L" else title, plot.svg(), legend)


def _draw(
    plot: Plot,
    cases: Cases,
    members: Iterable[TicketCase],
    samples: Samples,
    places: Mapping[Step, float],
) -> None:
    found = [(places[case.rewound_to], case) for case in members if case.rewound_to is not None]
    ordered = sorted(found, key=lambda point: point[0])
    css = cases.css(ordered[0][1])
    means = {case: statistics.fmean(samples[case]) for _, case in ordered}
    plot.curve([(x, means[case]) for x, case in ordered], f"line {css}")
    for x, case in ordered:
        mean = means[case]
        if len(samples[case]) > 1:
            plot.upright(x, (min(samples[case]), max(samples[case])), f"line {css}")
        plot.dot(x, mean, f"mark {css}", said=f"{case.label()}: {mean:.4g}")


def _name(case: TicketCase, lines: Iterable[TicketCase]) -> str:
    """Return a name that says what else is not the same in all lines."""
    words = [Source.of(case).name()]
    known = list(lines)
    if len({line.level for line in known}) > 1:
        words.append(f"level {case.level}")
    if len({LevelGroup.of(line) for line in known}) > 1:
        words.append(LevelGroup.of(case.model_copy(update={"rewound_to": None})).title())
    return ", ".join(words)


# --- connectivity ---------------------------------------------------------------------------------


def _connectivity_parts(cases: Cases) -> list[Part]:
    records = cases.record.connectivities
    if not records:
        return []
    found: dict[TicketCase, list[ConnectivityRecord]] = {}
    for record in records:
        found.setdefault(record.case, []).append(record)
    instabilities = {case: [r.instability * 100 for r in seeds] for case, seeds in found.items()}
    rows = tuple(
        (
            case.label(),
            (
                Cell(spread_of(instabilities[case])),
                Cell(f"{sum(r.instability < STABLE for r in seeds)} of {len(seeds)}"),
            ),
        )
        for case, seeds in found.items()
    )
    table = Table("", "case", ("instability, points", "stable seeds"), rows)
    curve = _against_step(cases, "instability, points", instabilities, threshold=100 * STABLE)
    groups: dict[tuple[object, int], dict[TicketCase, list[ConnectivityRecord]]] = {}
    for case, seeds in found.items():
        groups.setdefault((case.rewound_to, case.level), {})[case] = seeds
    draw = partial(_line_chart, cases)
    figures = (*([curve] if curve else []), *map(draw, groups.values()))
    text = (
        "The test error on the line between the weights of one network trained on two orders of "
        "the data. Instability is the highest error on it less the mean of both ends; a network "
        f"with less than {100 * STABLE:g} points is stable. The dashed level is that threshold.",
    )
    return [Part("Linear mode connectivity", text, (table,), figures)]


def _line_chart(cases: Cases, members: Mapping[TicketCase, Sequence[ConnectivityRecord]]) -> Figure:
    first = next(iter(members))
    words = ["dense"] if first.kind == "dense" else [f"level {first.level}"]
    if first.rewound_to is not None:
        words.append(f"rewound to {moment_of(first.rewound_to)}")
    title = f"Error on the line, {', '.join(words)}"
    errors = [100 * error for found in members.values() for r in found for error in r.errors]
    plot = Plot(
        title, x=(0, 1), y=span_of([0, *errors]), x_title="place on the line", y_title="error, %"
    )
    for case, found in members.items():
        for record in found:
            points = [(a, 100 * e) for a, e in zip(record.alphas, record.errors, strict=True)]
            plot.curve(points, f"line {cases.css(case)}", f"{case.label()}, seed {record.seed}")
    legend = tuple(dict.fromkeys((cases.css(case), _name(case, members)) for case in members))
    return Figure(title, plot.svg(), legend)
