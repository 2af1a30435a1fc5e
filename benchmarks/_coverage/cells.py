"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["number", "table"]


def number(count: int | None) -> str:
    """Return a count with three digits and a unit; nothing for None."""
    if count is None:
        return ""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:.0f} {unit}"
            )
    return str(count)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    """Return text that stays within its cell; a `<` of an error message is no tag."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("&lt;br>", "<br>")
