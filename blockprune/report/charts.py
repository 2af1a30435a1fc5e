"""Plots of a run: accuracy against depth, accuracy against cost, training curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from blockprune.lottery.record import NetworkRecord, TicketCase, VerdictRecord
from blockprune.report.cases import Cases, Setting, Source, by_source
from blockprune.report.svg import Figure, Plot, span_of

__all__ = ["cost_chart", "curve_charts", "depth_charts"]

Legend = tuple[tuple[str, str], ...]


# --- accuracy against depth -----------------------------------------------------------------------


def depth_charts(cases: Cases) -> tuple[Figure, ...]:
    """Return, for each setting, the difference to dense against the residual blocks left."""
    return tuple(_depth_chart(cases, *group) for group in cases.settings())


def _depth_chart(cases: Cases, setting: Setting, members: Sequence[TicketCase]) -> Figure:
    xi = cases.record.xi_points
    judged = {
        case: verdict
        for case in members
        if (verdict := cases.verdict(case)) and cases.networks(case)
    }
    blocks = {case: _mean(network.blocks for network in cases.networks(case)) for case in judged}
    deepest = max((network.blocks for network in cases.dense), default=0)
    means = [verdict.mean for verdict in judged.values()]
    seeds = [d for verdict in judged.values() for d in verdict.differences.values()]
    plot = Plot(
        f"Accuracy against depth, {setting.title()}",
        x=(min([deepest, *blocks.values()]) - 0.5, max([deepest, *blocks.values()]) + 0.5),
        y=span_of([0, -xi, *means, *seeds]),
        x_title="residual blocks left",
        y_title="difference to dense, points",
        whole_x=True,
        falling_x=True,
    )
    plot.band(-xi, 0, "tolerance")
    plot.level(0, "dense")
    sources = by_source(judged)
    # Side by side, or intervals at the same depth would hide one another.
    apart = min(14.0, 0.7 * abs(plot.x(1) - plot.x(0)) / max(1, len(sources)))
    for place, chosen in enumerate(sources.values()):
        shift = apart * (place - (len(sources) - 1) / 2)
        _draw_line(plot, cases, [(case, blocks[case], judged[case]) for case in chosen], shift)
    legend = tuple((cases.css(found[0]), source.name()) for source, found in sources.items())
    return Figure(setting.title(), plot.svg(), (("grey dense", "dense"), *legend))


def _draw_line(
    plot: Plot,
    cases: Cases,
    points: Sequence[tuple[TicketCase, float, VerdictRecord]],
    shift: float,
) -> None:
    css = cases.css(points[0][0])
    plot.line([(plot.x(x) + shift, plot.y(v.mean)) for _, x, v in points], f"line {css}")
    for case, x, verdict in points:
        if verdict.interval is not None:
            plot.upright(x, verdict.interval, f"line {css}", shift)
        for seed, difference in verdict.differences.items():
            said = f"{case.label()}, seed {seed}: {difference:+.2f}"
            plot.dot(x, difference, f"seed {css}", said=said, radius=2, shift=shift)
        said = f"{case.label()}: {verdict.mean:+.2f} points, {verdict.verdict}"
        plot.dot(x, verdict.mean, f"mark {css}", said=said, shift=shift)


# --- accuracy against cost ------------------------------------------------------------------------


def cost_chart(cases: Cases) -> tuple[Figure, str]:
    """Return accuracy against latency, or MACs where it was not measured; and which it is."""
    trained = [*_dense_case(cases), *cases.tickets, *cases.controls]
    networks = [network for case in trained for network in cases.networks(case)]
    is_timed = bool(networks) and all(network.latency_ms is not None for network in networks)
    batch = cases.record.latency_batch
    unit = f"latency of a batch of {batch}, ms" if is_timed else "million MACs of one sample"

    def cost(network: NetworkRecord) -> float:
        return network.latency_ms or 0.0 if is_timed else network.macs / 1e6

    points = {
        case: (_mean(map(cost, found)), cases.mean_accuracy(case))
        for case in trained
        if (found := cases.networks(case))
    }
    plot = Plot(
        f"Accuracy against {unit}",
        x=span_of(x for x, _ in points.values()),
        y=span_of(y for _, y in points.values()),
        x_title=unit,
        y_title="test accuracy, %",
    )
    plot.curve(_front(points.values()), "front")
    for case, (x, y) in points.items():
        said = f"{case.label()}: {y:.2f} %, {x:.4g} {unit}"
        plot.dot(x, y, f"mark {cases.css(case)}", said=said)
    return Figure(f"Accuracy against {unit}", plot.svg(), _legend(cases, points)), unit


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both, as a line of steps from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front += [(x, front[-1][1])] if front else []
            front.append((x, y))
    return front


# --- training curves ------------------------------------------------------------------------------


def curve_charts(cases: Cases) -> tuple[tuple[str, tuple[Figure, ...]], ...]:
    """Return, for each setting, its title and the curves of each source: accuracy and loss."""
    if not cases.tickets and not cases.controls:
        return (("dense", _curves(cases, "dense", ())),) if cases.dense else ()
    return tuple(
        (
            setting.title(),
            tuple(
                figure
                for source, found in by_source(members).items()
                for figure in _curves(cases, source.name(), found)
            ),
        )
        for setting, members in cases.settings()
    )


def _curves(cases: Cases, name: str, members: Sequence[TicketCase]) -> tuple[Figure, ...]:
    networks = [network for case in members for network in cases.networks(case)]
    is_tested = all(
        epoch.test_accuracy is not None
        for network in (*cases.dense, *networks)
        for epoch in network.epochs
    )
    kind = "test" if is_tested else "training"

    def accuracy(network: NetworkRecord) -> list[tuple[int, float]]:
        return [
            (epoch.epoch, 100 * ((epoch.test_accuracy or 0.0) if is_tested else epoch.accuracy))
            for epoch in network.epochs
        ]

    def loss(network: NetworkRecord) -> list[tuple[int, float]]:
        return [(e.epoch, e.loss) for e in network.epochs]

    return (
        _curve_chart(cases, f"{name}: {kind} accuracy, %", members, accuracy),
        _curve_chart(cases, f"{name}: training loss", members, loss),
    )


def _curve_chart(
    cases: Cases,
    title: str,
    members: Sequence[TicketCase],
    read: Callable[[NetworkRecord], list[tuple[int, float]]],
) -> Figure:
    curves = [("grey dense", "dense", _averaged(map(read, cases.dense)))]
    for place, case in enumerate(members):
        averaged = _averaged(map(read, cases.networks(case)))
        curves.append((f"k{place % 8} ticket", f"p = {case.p}", averaged))
    curves = [curve for curve in curves if curve[2]]
    plot = Plot(
        title,
        x=span_of((x for *_, points in curves for x, _ in points), margin=0.02),
        y=span_of(y for *_, points in curves for _, y in points),
        x_title="epoch",
        y_title=title.rpartition(": ")[2],
        whole_x=True,
    )
    for css, label, points in curves:
        plot.curve(points, f"line {css}", label)
    return Figure(title, plot.svg(), tuple((css, label) for css, label, _ in curves))


def _averaged(curves: Iterable[list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Return the mean over seeds at every epoch that one of them has."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, value in curve:
            found.setdefault(epoch, []).append(value)
    return [(float(epoch), _mean(found[epoch])) for epoch in sorted(found)]


# --- shared ---------------------------------------------------------------------------------------


def _dense_case(cases: Cases) -> tuple[TicketCase, ...]:
    return tuple(dict.fromkeys(network.case for network in cases.dense))


def _legend(cases: Cases, members: Iterable[TicketCase]) -> Legend:
    return tuple(dict.fromkeys((cases.css(case), Source.of(case).name()) for case in members))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
