"""Each model in a process of its own, with limits to its time and its memory.

The children are forked, so that they find every library imported; the parent must not have
computed anything with torch, whose threads a fork does not carry over.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

__all__ = ["Limits", "Task", "run_all"]

POLL_S = 0.2
GIB = 2**30

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a child may use before it is killed."""

    seconds: float = 300
    gigabytes: float = 20


@dataclasses.dataclass(frozen=True)
class Task:
    """What a child does: the fields that say so, and a function that yields a growing row."""

    label: Row
    work: Callable[[], Iterable[Row]]


def run_all(tasks: Iterable[Task], limits: Limits, jobs: int, log: Path) -> Iterator[Row]:
    """Run every task in a child, `jobs` at a time; yield the rows as they are finished.

    A child that fails or is killed leaves the row as it was, with an `error`. What children print
    goes to the file `log`.
    """
    pending = iter(tasks)
    running: list[_Child] = []
    try:
        while True:
            while len(running) < jobs and (task := next(pending, None)) is not None:
                running.append(_Child(task, log))
            if not running:
                return
            wait([child.connection for child in running], timeout=POLL_S)
            for child in list(running):
                if child.step(limits):
                    running.remove(child)
                    yield child.row
    finally:
        for child in running:
            child.stop("the sweep was ended")


class _Child:
    def __init__(self, task: Task, log: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.row: Row = dict(task.label)
        self.started = time.monotonic()
        self.connection, sender = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_work, args=(task, sender, log))
        self.process.start()
        sender.close()

    def step(self, limits: Limits) -> bool:
        """Take in what the child has sent; return whether it has come to an end."""
        try:
            while self.connection.poll():
                self.row.update(self.connection.recv())
        except EOFError:
            self.process.join()
            if self.process.exitcode and "error" not in self.row:
                self.row["error"] = f"the process ended with code {self.process.exitcode}"
            return True
        if time.monotonic() - self.started > limits.seconds:
            return self.stop(f"longer than {limits.seconds:g} s")
        if _resident(self.process.pid) > limits.gigabytes * GIB:
            return self.stop(f"more than {limits.gigabytes:g} GB of memory")
        return False

    def stop(self, why: str) -> bool:
        """Kill the child, and say so in the row."""
        self.process.kill()
        self.process.join()
        self.row["error"] = why
        return True


def _work(task: Task, sender: Connection, log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("a") as file:
        # The descriptors too: libraries in C++ write to them.
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    print(f"--- {task.label}", flush=True)
    try:
        for row in task.work():
            sender.send(row)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["without a message"]
        sender.send({"error": f"{type(error).__name__}: {lines[0]}"})
    sender.close()


def _resident(pid: int | None) -> int:
    """Return how many bytes a process occupies; none once it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
