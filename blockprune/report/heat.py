"""Maps of shares: a grid of cells, the darker the more, with names beside and below it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from blockprune.report.svg import WIDTH, Drawing, Figure

__all__ = [
    "MAP_CELL",
    "depth_of",
    "draw_heat",
    "longest",
    "share_map",
    "shortened",
    "write_below",
]

MAP_CELL = 19
LONGEST_NAME = 15
LETTER = 5.8
"""Width of one of a name's letters."""

NAME_ANGLE = -60


def share_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    unit: str,
) -> Figure:
    """Return a map of shares in percent.

    Args:
        title: above it.
        rows: names from top to bottom.
        columns: names from left to right.
        values: share in [0, 1] of a row and a column; a cell without one stays empty.
        unit: what the shares are of, said when a cell is pointed at.
    """
    left, foot = 14 + round(longest(rows)), 4 + MAP_CELL * len(rows)
    width = max(WIDTH, left + MAP_CELL * len(columns) + 6)
    drawing = Drawing(title, width, foot + depth_of(columns))
    for place, row in enumerate(rows):
        y = 4 + MAP_CELL * place
        drawing.text(left - 5, y + 13, shortened(row), "tick end")
        for number, column in enumerate(columns):
            value = values.get((row, column), math.nan)
            said = f"{row}, {column}: {100 * value:.4g} % {unit}"
            draw_heat(drawing, left + MAP_CELL * number, y, value, said)
    for number, column in enumerate(columns):
        write_below(drawing, left + MAP_CELL * (number + 0.5), foot, column, "tick end")
    return Figure(title, drawing.svg(), width=width)


# --- parts of a map -------------------------------------------------------------------------------


def write_below(drawing: Drawing, x: float, foot: float, name: str, css: str) -> None:
    """Write a column's name below it, turned."""
    drawing.text(x + 4, foot + 10, shortened(name), css, turned=NAME_ANGLE)


def depth_of(names: Iterable[str]) -> int:
    """Return the height that turned names take."""
    return 16 + round(longest(names) * abs(math.sin(math.radians(NAME_ANGLE))))


def longest(names: Iterable[str]) -> float:
    """Return the width that the longest name takes."""
    return LETTER * max((len(shortened(name)) for name in names), default=0)


def shortened(name: str) -> str:
    """Return the end of a name that is too long."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def draw_heat(drawing: Drawing, x: float, y: float, value: float, said: str) -> None:
    """Draw one value in [0, 1], in hundredths; one that is not finite leaves its cell empty."""
    place = {"x": f"{x}", "y": f"{y}", "width": f"{MAP_CELL - 1}", "height": f"{MAP_CELL - 1}"}
    if not math.isfinite(value):
        drawing.add_shape("rect", "cell", place, said)
        return
    shade = {"fill-opacity": f"{min(max(value, 0.0), 1.0):.2f}"}
    drawing.add_shape("rect", "heat", place | shade, said)
    css = "value deep middle" if value > 0.55 else "value middle"
    # Little is not nothing.
    written = "<1" if 0 < value < 0.005 else f"{round(100 * value)}"
    drawing.text(x + MAP_CELL / 2, y + 12.5, written, css)
