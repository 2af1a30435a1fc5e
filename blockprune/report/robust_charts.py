"""Curves of accuracy against severity and against epsilon, dense and tickets together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping

from blockprune.lottery.record import TicketCase
from blockprune.report.cases import DENSE
from blockprune.report.robust_figures import Robust, attack_title
from blockprune.report.svg import Figure, Plot, span_of
from blockprune.robustness.record import AttackCurve, RobustnessResult

__all__ = ["robust_charts"]

Curve = Mapping[float, float]
"""Accuracy in percent by place."""

PIXELS = 255


def robust_charts(robust: Robust) -> tuple[Figure, ...]:
    """Return accuracy against severity and, for each attack, white-box and transferred, epsilon."""
    charts = [_chart(robust, "Corruptions", "severity", _by_severity)]
    attacks = {attack_title(a): a for result in robust.all() for a in result.attacks}
    for title, attack in attacks.items():
        is_pixels = attack.choice.norm == "Linf"
        axis = f"epsilon, of {PIXELS}" if is_pixels else "epsilon, L2"
        charts.append(_chart(robust, title, axis, _by_epsilon(title, is_transferred=False)))
        made_on_dense = _by_epsilon(title, is_transferred=True)
        charts.append(_chart(robust, f"{title}, made on dense", axis, made_on_dense))
    return tuple(chart for chart in charts if chart is not None)


def _by_severity(result: RobustnessResult) -> Curve:
    harder = {float(k): 100 * (1 - error) for k, error in result.severity_errors.items()}
    return {0.0: 100 * result.clean.accuracy, **harder} if harder else {}


def _by_epsilon(title: str, *, is_transferred: bool) -> Callable[[RobustnessResult], Curve]:
    def read(result: RobustnessResult) -> Curve:
        for attack in result.attacks:
            if attack_title(attack) == title:
                return _curve(attack, is_transferred=is_transferred)
        return {}

    return read


def _curve(attack: AttackCurve, *, is_transferred: bool) -> Curve:
    accuracies = attack.transferred if is_transferred else attack.accuracies
    scale = PIXELS if attack.choice.norm == "Linf" else 1
    places = (scale * epsilon for epsilon in attack.choice.epsilons)
    return {x: 100 * y for x, y in zip(places, accuracies or (), strict=False)}


def _chart(
    robust: Robust, title: str, axis: str, read: Callable[[RobustnessResult], Curve]
) -> Figure | None:
    curves = {case: _averaged(map(read, found.values())) for case, found in robust.results.items()}
    curves = {case: curve for case, curve in curves.items() if curve}
    if not curves:
        return None
    plot = Plot(
        f"Accuracy against {axis}, {title}",
        x=span_of((x for curve in curves.values() for x in curve), margin=0.04),
        y=span_of(y for curve in curves.values() for y in curve.values()),
        x_title=axis,
        y_title="accuracy, %",
        whole_x=axis == "severity",
    )
    legend = []
    for case, curve in curves.items():
        css = _css(robust, case)
        plot.curve(sorted(curve.items()), f"line {css}")
        for x, y in curve.items():
            said = f"{case.label()}: {y:.2f} % at {axis} {x:.4g}"
            plot.dot(x, y, f"mark {css}", said=said, radius=2.5)
        legend.append((css, case.label()))
    return Figure(title, plot.svg(), tuple(legend))


def _averaged(curves: Iterable[Curve]) -> Curve:
    found: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve.items():
            found.setdefault(x, []).append(y)
    return {x: statistics.fmean(values) for x, values in sorted(found.items())}


def _css(robust: Robust, case: TicketCase) -> str:
    if case == DENSE:
        return "grey dense"
    return f"k{robust.others.index(case) % 8} {case.kind}"
