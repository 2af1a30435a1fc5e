"""What the commands print: tables that read at 80 columns, and JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "INTERRUPTED",
    "count",
    "plural",
    "print_detail",
    "print_json",
    "print_line",
    "print_table",
    "print_wrapped",
    "shape_text",
    "working",
    "wrap_name",
]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it: 128 + SIGINT."""

GAP = 2
NARROWEST_NAME = 20


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a value as indented JSON to stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_line(text: str) -> None:
    """Print one line of text to stdout, as it is."""
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(text)


def print_wrapped(text: str, *, label: str = "", indent: int = 0) -> None:
    """Print text wrapped to the width there is, the lines of it below one another.

    Args:
        text: what to print.
        label: stands before the first line.
        indent: blanks before the label.
    """
    first = " " * indent + (f"{label}  " if label else "")
    lines = textwrap.fill(
        text,
        Console().width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    )
    print_line(lines)


def print_detail(text: str) -> None:
    """Print a sentence below what it is about: indented, wrapped to the width there is."""
    print_wrapped(text, indent=4)


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[str] = ()
) -> None:
    """Print rows under headers.

    The first column holds names and takes the width that the others leave; names that are
    longer are broken at their dots. The columns named in ``numeric`` are aligned right and
    never broken.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        if header in numeric:
            table.add_column(header, justify="right", no_wrap=True)
        else:
            table.add_column(header, overflow="fold")
    columns = list(zip(headers, *rows, strict=True))
    taken = sum(max(map(len, column)) + GAP for column in columns[1:])
    for name, *others in rows:
        wrapped = wrap_name(name, max(NARROWEST_NAME, console.width - taken))
        table.add_row(wrapped, *others)
    console.print(table)


def wrap_name(name: str, width: int) -> str:
    """Break a dotted name into lines of at most ``width`` characters, at its dots.

    Example:
        >>> wrap_name("encoder.layers.0.attention", 16).splitlines()
        ['encoder.layers.', '0.attention']
    """
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def count(number: int) -> str:
    """Write a whole number with its thousands apart."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 block``, ``2 blocks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shape_text(shape: Sequence[int] | None) -> str:
    """Write a shape as ``1x64x56x56``; a shape that is not known as a dash."""
    if shape is None:
        return "-"
    return "x".join(str(size) for size in shape) or "scalar"


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show a spinner on stderr while something takes long, if somebody is watching."""
    console = Console(stderr=True)
    if not (console.is_terminal and sys.stdout.isatty()):
        yield
        return
    # As text: a name in it may look like markup.
    with console.status(Text(message)):
        yield
