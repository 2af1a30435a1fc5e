"""SIGTERM ends a command as Ctrl-C does: what was done is kept and told of."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

__all__ = ["sigterm_as_interrupt"]

TERMINATED: Final = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended, as shells have it."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGTERM in here; end with 143 where one came.

    A second one ends the process at once. Outside the main thread nothing is changed: only that
    one may handle signals.

    Raises:
        SystemExit: the block ended, in whatever way, after a SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as ended:
        if came:
            raise SystemExit(TERMINATED) from ended
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
