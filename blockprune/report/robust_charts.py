"""Curves of accuracy against severity and against epsilon, dense and tickets together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap

from blockprune.lottery.record import TicketCase
from blockprune.report.cases import DENSE
from blockprune.report.robust_figures import Robust, attack_title
from blockprune.report.svg import Drawing, Figure, Plot, span_of
from blockprune.robustness.record import AttackCurve, Picture, RobustnessResult

__all__ = ["example_pictures", "robust_charts"]

TILE, GAP, HEAD, NAMES = 76, 10, 16, 34
"""Of a picture of an image, what is between two, the line above one, and the names on top."""

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


def example_pictures(robust: Robust) -> tuple[Figure, ...]:
    """Return, for the first seed of the dense network and of each ticket, a few images."""
    return tuple(
        _pictures(case.label(), found[min(found)].pictures)
        for case, found in robust.results.items()
        if case.kind in ("dense", "ticket") and found and found[min(found)].pictures
    )


def _pictures(title: str, pictures: Sequence[Picture]) -> Figure:
    """Return a row for each image and a column for each view of it."""
    columns = max(len(picture.views) for picture in pictures)
    width = GAP + columns * (TILE + GAP)
    drawing = Drawing(
        f"Test images and what {title} sees in them",
        width=width,
        height=NAMES + len(pictures) * (TILE + HEAD + GAP),
    )
    for row, picture in enumerate(pictures):
        top = NAMES + row * (TILE + HEAD + GAP)
        for column, view in enumerate(picture.views):
            left = GAP + column * (TILE + GAP)
            if row == 0:
                for line, words in enumerate(wrap(view.name, 13)[:2]):
                    drawing.text(left, 12 + 12 * line, words, "note")
            is_right = view.decided == picture.label
            drawing.text(
                left,
                top + 11,
                f"{'' if is_right else '✗ '}{view.decided}",
                "" if is_right else "bad",
            )
            place = {"x": left, "y": top + HEAD, "width": TILE, "height": TILE}
            drawing.add_shape(
                "image",
                "pixels",
                {
                    "href": f"data:image/png;base64,{view.png}",
                    **{name: str(value) for name, value in place.items()},
                },
                said=f"image {picture.index} shows {picture.label}, seen as {view.decided}",
            )
    return Figure(title, drawing.svg(), width=width)


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
