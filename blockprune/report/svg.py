"""Drawings as inline SVG: shapes, a frame with axes, and nothing that a style sheet can say.

Colours and fonts are CSS classes, so that a drawing follows the page from light to dark. All text
is escaped here, since names of blocks and criteria come from a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

__all__ = ["Drawing", "Figure", "Plot", "number", "span_of"]

WIDTH, HEIGHT = 360, 236
"""Of a plot. A phone shows it at that size, so its text stays readable."""

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40

MOST_DECADES = 3
"""That have ticks between powers of ten."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A drawing with what is said about it.

    Attributes:
        title: above it.
        drawing: the SVG element.
        legend: CSS classes and label of each kind of mark.
        width: of the drawing, where it is wider than a plot and scrolls on a narrow screen.
    """

    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()
    width: int = WIDTH


@dataclass
class Drawing:
    """SVG elements in the order in which they are added.

    Attributes:
        label: what a screen reader says in its place.
        width, height: in units of its text's size.
    """

    label: str
    width: int = WIDTH
    height: int = HEIGHT
    _parts: list[Markup] = field(default_factory=list)

    def add(self, tag: str, css: str, *, said: str = "", text: str = "", **place: float) -> None:
        """Add an element.

        Args:
            tag: its SVG name.
            css: its classes.
            said: when it is pointed at.
            text: inside it.
            place: its geometry.
        """
        self.add_shape(tag, css, {name: number(value) for name, value in place.items()}, said, text)

    def add_shape(
        self, tag: str, css: str, attributes: dict[str, str], said: str = "", text: str = ""
    ) -> None:
        """Add an element with attributes that are not numbers."""
        written = Markup("").join(
            Markup(' {}="{}"').format(name, value) for name, value in attributes.items()
        )
        content = (Markup("<title>{}</title>").format(said) if said else Markup("")) + escape(text)
        self._parts.append(
            Markup('<{tag} class="{css}"{written}>{content}</{tag}>').format(
                tag=Markup(tag), css=css, written=written, content=content
            )
        )

    def text(self, x: float, y: float, text: str, css: str = "", turned: float = 0) -> None:
        """Write ``text`` at a place, turned by so many degrees around it."""
        attributes = {"x": number(x), "y": number(y)}
        if turned:
            attributes["transform"] = f"rotate({number(turned)} {number(x)} {number(y)})"
        self.add_shape("text", css, attributes, text=text)

    def line(self, points: Iterable[tuple[float, float]], css: str, said: str = "") -> None:
        """Join places by straight lines."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.add_shape("polyline", css, {"points": path}, said)

    def svg(self) -> Markup:
        """Return the element."""
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            self.width, self.height, self.label, Markup("").join(self._parts)
        )


class Plot(Drawing):
    """A frame with axes; places are given in the units of the data, on a logarithmic axis too."""

    def __init__(
        self,
        label: str,
        *,
        x: Span,
        y: Span,
        x_title: str,
        y_title: str,
        whole_x: bool = False,
        falling_x: bool = False,
        log_x: bool = False,
    ) -> None:
        super().__init__(label)
        self._x, self._y = _opened(x), _opened(y)
        self._falling_x, self._log_x = falling_x, log_x
        self.add(
            "rect",
            "frame",
            x=LEFT,
            y=TOP,
            width=WIDTH - LEFT - RIGHT,
            height=HEIGHT - TOP - BOTTOM,
        )
        for tick in _ticks(y, 5):
            self.add("line", "grid", x1=LEFT, x2=WIDTH - RIGHT, y1=self.y(tick), y2=self.y(tick))
            self.text(LEFT - 6, self.y(tick) + 4, _written(tick), "tick end")
        for tick in _decades(x) if log_x else _ticks(x, 6, whole=whole_x):
            self.add("line", "grid", x1=self.x(tick), x2=self.x(tick), y1=TOP, y2=HEIGHT - BOTTOM)
            self.text(self.x(tick), HEIGHT - BOTTOM + 15, _written(tick), "tick middle")
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, "title middle")
        self.text(12, (TOP + HEIGHT - BOTTOM) / 2, y_title, "title middle", turned=-90)

    def x(self, value: float) -> float:
        """Return where ``value`` lies from left to right."""
        low, high, place = map(math.log, (*self._x, value)) if self._log_x else (*self._x, value)
        share = (place - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * (1 - share if self._falling_x else share)

    def y(self, value: float) -> float:
        """Return where ``value`` lies from top to bottom."""
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def curve(self, points: Sequence[tuple[float, float]], css: str, said: str = "") -> None:
        """Join points by straight lines."""
        self.line([(self.x(x), self.y(y)) for x, y in points], css, said)

    def dot(
        self, x: float, y: float, css: str, *, said: str = "", radius: float = 3.5, shift: float = 0
    ) -> None:
        """Draw a dot, ``shift`` units of text to the right of its place."""
        self.add("circle", css, cx=self.x(x) + shift, cy=self.y(y), r=radius, said=said)

    def upright(self, x: float, span: Span, css: str, shift: float = 0) -> None:
        """Draw an interval; an end that lies outside of the frame has no cap."""
        low, high = (min(max(end, self._y[0]), self._y[1]) for end in span)
        place = self.x(x) + shift
        self.add("line", css, x1=place, x2=place, y1=self.y(low), y2=self.y(high))
        for end, drawn in zip(span, (low, high), strict=True):
            if end == drawn:
                self.add("line", css, x1=place - 4, x2=place + 4, y1=self.y(end), y2=self.y(end))

    def level(self, value: float, css: str) -> None:
        """Draw a horizontal line through the frame."""
        self.curve([(self._x[0], value), (self._x[1], value)], css)

    def band(self, low: float, high: float, css: str) -> None:
        """Shade what lies between two levels."""
        self.add(
            "rect",
            css,
            x=LEFT,
            y=self.y(high),
            width=WIDTH - LEFT - RIGHT,
            height=self.y(low) - self.y(high),
        )


def span_of(values: Iterable[float], margin: float = 0.08) -> Span:
    """Return the least and the greatest finite value with a margin, never the same twice.

    Example:
        >>> from blockprune.report.svg import span_of
        >>> span_of([0.0, 10.0], margin=0.1), span_of([3.0])
        ((-1.0, 11.0), (2.5, 3.5))
    """
    found = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(found), max(found)
    if low == high:
        return (low - 0.5, high + 0.5)
    return (low - margin * (high - low), high + margin * (high - low))


def number(value: float) -> str:
    """Return a coordinate to a tenth of a unit.

    Example:
        >>> from blockprune.report.svg import number
        >>> number(3), number(2.25), number(-0.01)
        ('3', '2.2', '0')
    """
    # Adding zero makes a negative zero positive.
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def _ticks(span: Span, most: int, *, whole: bool = False) -> list[float]:
    found = MaxNLocator(nbins=most, integer=whole, min_n_ticks=1).tick_values(*span)
    inside = (float(tick) for tick in found)
    return [tick for tick in inside if span[0] <= tick <= span[1] and (not whole or tick % 1 == 0)]


def _decades(span: Span) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a positive span; of a long one, powers alone."""
    first, last = math.floor(math.log10(span[0])), math.ceil(math.log10(span[1]))
    digits = (1, 2, 5) if last - first <= MOST_DECADES else (1,)
    found = (digit * 10.0**power for power in range(first, last + 1) for digit in digits)
    return [tick for tick in found if span[0] <= tick <= span[1]]


def _written(tick: float) -> str:
    rounded = round(tick, 10) + 0.0
    if abs(rounded) >= 1e4:
        return next(
            f"{rounded / size:.4g}{name}"
            for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k"))
            if abs(rounded) >= size
        )
    return f"{rounded:.4g}"


def _opened(span: Span) -> Span:
    """Return a span whose ends differ, as those of huge numbers may not once rounded."""
    low, high = span
    return span if high > low else (low, low + max(abs(low) * 1e-6, 1.0))
