"""A section of the page as values: text, tables and figures, without a word of HTML."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from blockprune.report.svg import Figure

__all__ = ["ABSENT", "Cell", "Part", "Section", "Table", "best_of", "spread_of"]


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: of it.
        small: lines below.
        is_best: whether it is the best of its row.
    """

    text: str
    small: tuple[str, ...] = ()
    is_best: bool = False


ABSENT = Cell("-")
"""What a run does not have."""


@dataclass(frozen=True)
class Table:
    """Rows with a name each.

    Attributes:
        title: above it.
        corner: what the rows are.
        columns: heads of the cells.
        rows: name and cells.
        notes: what must be known to read it.
        is_prose: whether cells hold sentences, which break into lines.
    """

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()
    is_prose: bool = False


@dataclass(frozen=True)
class Part:
    """Text, tables and figures, in this order.

    Attributes:
        title: above them; none where empty.
        text: paragraphs.
        tables: below.
        figures: below these.
        is_folded: whether a reader has to open it.
    """

    title: str = ""
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: that links lead to.
        short: what such a link says.
        title: above it.
        text: paragraphs that open it.
        parts: what follows.
    """

    name: str
    short: str
    title: str
    text: tuple[str, ...]
    parts: tuple[Part, ...]


def spread_of(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation (n - 1 in the denominator); of one value, the value.

    Example:
        >>> from blockprune.report.sections import spread_of
        >>> spread_of([1.0, 2.0, 3.0]), spread_of([0.5], digits=1), spread_of([])
        ('2.00 ± 1.00', '0.5', '-')
    """
    if not values:
        return ABSENT.text
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def best_of(samples: Sequence[Sequence[float]], digits: int = 2) -> tuple[Cell, ...]:
    """Return a row of means over seeds, the highest marked; equal as written is equal.

    Example:
        >>> from blockprune.report.sections import best_of
        >>> [(cell.text, cell.is_best) for cell in best_of([[1.0, 2.0], [1.501], []])]
        [('1.50 ± 0.71', True), ('1.50', True), ('-', False)]
    """
    means = [round(statistics.fmean(sample), digits) if sample else None for sample in samples]
    found = [mean for mean in means if mean is not None]
    is_choice = len(found) > 1
    return tuple(
        Cell(spread_of(sample, digits), is_best=is_choice and mean == max(found))
        for sample, mean in zip(samples, means, strict=True)
    )
