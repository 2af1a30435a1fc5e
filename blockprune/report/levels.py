"""Tickets of single weights by level: the table of papers/003, curves, verdicts.

Source: papers/003, Table 2: a row for each level, a column for each importance, mean ± standard
deviation over seeds, the best of a row in bold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from blockprune.lottery.record import TicketCase, VerdictRecord
from blockprune.lottery.verdicts import paired_interval
from blockprune.report.cases import DENSE, Cases, Source
from blockprune.report.grouping import LevelGroup, by_group, percent_left
from blockprune.report.sections import ABSENT, Cell, Part, Section, Table, best_of
from blockprune.report.svg import Figure, Plot, span_of

__all__ = ["levels_section"]

ORDER = ("ticket", "random", "scratch")


def levels_section(cases: Cases) -> Section | None:
    """Return accuracy by level, None for a run without tickets of levels."""
    leveled = [case for case in cases.others if case.level]
    tickets = [case for case in leveled if case.kind == "ticket"]
    if not tickets:
        return None
    parts = []
    for group, members in by_group(tickets).items():
        controls = [c for c in leveled if c.kind != "ticket" and _is_beside(c, group, members)]
        parts += _parts(cases, group, [*members, *controls])
    return Section(
        "levels",
        "Levels",
        "Tickets of weights, by level",
        (
            "Sparsity is the share of the weights that can be pruned and are; accuracy is in "
            "percent of the test set, mean ± standard deviation over seeds. Bold: best of its "
            "row, controls included. A random control has as many weights of each layer as the "
            "ticket it is like, a control from scratch its mask on new weights.",
            f"In the curves bars are the {100 * cases.record.confidence:g} % interval of the mean; "
            "one without an end is wider than the frame.",
        ),
        tuple(parts),
    )


def _is_beside(control: TicketCase, group: LevelGroup, tickets: Sequence[TicketCase]) -> bool:
    known = {(case.criterion, case.level) for case in tickets}
    return group.has_control(control) and (control.criterion, control.level) in known


def _parts(cases: Cases, group: LevelGroup, members: Sequence[TicketCase]) -> list[Part]:
    sources: dict[Source, dict[int, TicketCase]] = {}
    for case in sorted(members, key=lambda case: ORDER.index(case.kind)):
        sources.setdefault(Source.of(case), {})[case.level] = case
    parts = [
        Part(
            title=group.title().capitalize(),
            tables=(_table(cases, group, sources),),
            figures=_charts(cases, group, sources),
        )
    ]
    verdicts = _verdicts(cases, members)
    if verdicts.rows:
        parts.append(Part("Verdicts, ticket by ticket", tables=(verdicts,), is_folded=True))
    return parts


# --- the table ------------------------------------------------------------------------------------


def _table(cases: Cases, group: LevelGroup, sources: dict[Source, dict[int, TicketCase]]) -> Table:
    levels = sorted({level for found in sources.values() for level in found})
    dense = _accuracies(cases, _dense_of(cases, group))
    rows = [("dense", (Cell("0.00"), *[Cell(best_of([dense])[0].text)] * len(sources)))]
    for level in levels:
        chosen = [found.get(level) for found in sources.values()]
        left = percent_left(cases, filter(None, chosen))
        sparsity = ABSENT if math.isnan(left) else Cell(f"{100 - left:.2f}")
        samples = [_accuracies(cases, case) if case else [] for case in chosen]
        rows.append((str(level), (sparsity, *best_of(samples))))
    columns = ("sparsity, %", *(source.name() for source in sources))
    return Table("", "level", columns, tuple(rows))


def _dense_of(cases: Cases, group: LevelGroup) -> TicketCase:
    """Return the dense network with the group's weights, where that is another one."""
    own = DENSE.model_copy(update={"weights": group.weights})
    return own if cases.networks(own) else DENSE


def _accuracies(cases: Cases, case: TicketCase) -> list[float]:
    return [100 * network.accuracy for network in cases.networks(case)]


# --- curves ---------------------------------------------------------------------------------------


def _charts(
    cases: Cases, group: LevelGroup, sources: dict[Source, dict[int, TicketCase]]
) -> tuple[Figure, ...]:
    """Return all importances in one chart, and each with its controls in one of its own."""
    tickets = {source: found for source, found in sources.items() if source.kind == "ticket"}
    charts = [_chart(cases, group, "All importances", tickets)] if len(tickets) > 1 else []
    for ticket in tickets:
        beside = {s: found for s, found in sources.items() if s.criterion == ticket.criterion}
        if len(beside) > 1 or len(tickets) == 1:
            charts.append(_chart(cases, group, ticket.name(), beside))
    return tuple(chart for chart in charts if chart is not None)


def _chart(
    cases: Cases, group: LevelGroup, title: str, sources: dict[Source, dict[int, TicketCase]]
) -> Figure | None:
    points = {
        source: [
            (left, case)
            for _, case in sorted(found.items())
            if not math.isnan(left := percent_left(cases, [case])) and left > 0
        ]
        for source, found in sources.items()
    }
    everything = [point for found in points.values() for point in found]
    if not everything:
        return None
    dense = _accuracies(cases, _dense_of(cases, group))
    means = {case: statistics.fmean(_accuracies(cases, case)) for _, case in everything}
    seeds = [value for case in means for value in _accuracies(cases, case)]
    plot = Plot(
        f"Accuracy against weights left, {title}, {group.title()}",
        x=(0.9 * min(left for left, _ in everything), 110),
        y=span_of([*dense, *seeds]),
        x_title="weights left, %",
        y_title="test accuracy, %",
        falling_x=True,
        log_x=True,
    )
    if dense:
        plot.level(statistics.fmean(dense), "dense")
    # Side by side, or intervals at the same level would hide one another.
    for place, found in enumerate(points.values()):
        _draw(plot, cases, found, means, 3.0 * (place - (len(points) - 1) / 2))
    legend = [(cases.css(found[0][1]), source.name()) for source, found in points.items() if found]
    return Figure(title, plot.svg(), (("grey dense", "dense"), *legend))


def _draw(
    plot: Plot,
    cases: Cases,
    points: Iterable[tuple[float, TicketCase]],
    means: dict[TicketCase, float],
    shift: float,
) -> None:
    found = list(points)
    if not found:
        return
    css = cases.css(found[0][1])
    plot.line([(plot.x(x) + shift, plot.y(means[case])) for x, case in found], f"line {css}")
    for left, case in found:
        interval = paired_interval(_accuracies(cases, case), cases.record.confidence)
        if interval is not None:
            plot.upright(left, interval, f"line {css}", shift)
        said = f"{case.label()}: {means[case]:.2f} %, {left:.2f} % of the weights left"
        plot.dot(left, means[case], f"mark {css}", said=said, radius=3, shift=shift)


# --- verdicts -------------------------------------------------------------------------------------


def _verdicts(cases: Cases, members: Iterable[TicketCase]) -> Table:
    rows = []
    for case in members:
        verdict = cases.verdict(case)
        if verdict is not None:
            name = f"{Source.of(case).name()}, level {case.level}"
            rows.append((name, (*difference_cells(verdict), _against_random(verdict))))
    columns = ("verdict", "difference to dense, points", "difference to random, points")
    return Table("", "case", columns, tuple(rows))


def difference_cells(verdict: VerdictRecord) -> tuple[Cell, Cell]:
    """Return what was decided, and the mean difference with its interval."""
    seeds = len(verdict.differences)
    said = f"{_written(verdict.interval)}, {seeds} seed{'' if seeds == 1 else 's'}"
    return Cell(verdict.verdict), Cell(f"{verdict.mean:+.2f}", (said,))


def _against_random(verdict: VerdictRecord) -> Cell:
    if verdict.against_random is None:
        return ABSENT
    return Cell(f"{verdict.against_random:+.2f}", (_written(verdict.against_random_interval),))


def _written(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"
