"""One bar over a long piece of work, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["Bar"]


class Bar:
    """Shows how far a piece of work is while the block runs.

    Args:
        columns: what stands between the description and the time, of `rich.progress`.
        only_on_terminals: print nothing into a file.
    """

    def __init__(self, *columns: ProgressColumn, only_on_terminals: bool = False) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            *columns,
            TimeElapsedColumn(),
            console=console,
            disable=only_on_terminals and not console.is_terminal,
        )
        self._task = self._progress.add_task("Starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, **changes: Any) -> None:
        """Change what is shown, as ``rich.progress.Progress.update`` does."""
        self._progress.update(self._task, **changes)

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(line, markup=False)
