"""Where stages run: in this process, in several, or on a cluster.

Anything with the `submit` of `concurrent.futures.Executor` will do. What a worker needs is in the
arguments and in files, so a stage that was lost with its worker is simply sent again.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from blockprune.errors import MissingExtraError
from blockprune.lottery.stages import RunError

__all__ = ["InProcess", "Processes", "Submits", "opened"]

TRIES = 2
"""How often a task may take down a worker while no other task runs, before it is given up."""

CONNECT_SECONDS = 30


class Submits(Protocol):
    """What a run asks of an executor."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Run a function of a module with plain arguments, some time, somewhere."""


class InProcess:
    """Runs each task where it is submitted, at once.

    Example:
        >>> from blockprune.lottery.executors import InProcess
        >>> InProcess().submit(sum, [1, 2]).result()
        3
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Run the function now; Ctrl-C passes through, other errors are the future's."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class _Task:
    """What is to be done, and how often it has taken a worker down with no other task about."""

    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    is_suspect: bool = False
    losses: int = 0


class Processes:
    """Worker processes, of which a lost one costs what was being done.

    A pool of processes does not outlive one of them, and does not say whose task took it down. So
    no more is handed to it than is being worked on, and after a loss those tasks are sent again
    one at a time: the guilty one is then alone, and is given up after a few tries.

    Workers end when this process does, however it ends.

    Args:
        jobs: how many workers, at least 1.

    Raises:
        RunError: `jobs` is less.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise RunError(f"jobs must be at least 1, got {jobs}.")
        self._jobs = jobs
        self._lock = threading.RLock()
        self._waiting: deque[_Task] = deque()
        self._suspects: deque[_Task] = deque()
        self._running: list[_Task] = []
        self._is_closed = False
        # Workers hold one end of the pipe; the other closes with this process.
        context = multiprocessing.get_context("spawn")
        self._ear, self._lifeline = context.Pipe(duplex=False)
        self._pool = self._new_pool()

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Run the function in a worker."""
        task = _Task(Future(), fn, args)
        with self._lock:
            self._waiting.append(task)
            self._hand_out()
        return task.future

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        with self._lock:
            self._is_closed = True
            is_busy = bool(self._running)
        if is_busy:
            self._lifeline.close()
        # Not under the lock, which the pool's own thread may want before it ends.
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()
        self._ear.close()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(self._ear,),
        )

    def _hand_out(self) -> None:
        """Send what may run now to the pool."""
        while not self._is_closed and (task := self._next()) is not None:
            self._running.append(task)
            try:
                inner = self._pool.submit(task.fn, *task.args)
            except BrokenProcessPool:
                # Nobody's fault: a worker died that had nothing to do.
                self._running.remove(task)
                self._waiting.appendleft(task)
                self._pool = self._new_pool()
            else:
                inner.add_done_callback(partial(self._done, task, self._pool))

    def _next(self) -> _Task | None:
        if self._suspects:
            return None if self._running else self._suspects.popleft()
        is_free = len(self._running) < self._jobs
        if not is_free or any(task.is_suspect for task in self._running):
            return None
        return self._waiting.popleft() if self._waiting else None

    def _done(self, task: _Task, pool: ProcessPoolExecutor, inner: Future[Any]) -> None:
        with self._lock:
            self._running.remove(task)
            if self._is_closed:
                task.future.cancel()
                return
            error = inner.exception()
            if isinstance(error, BrokenProcessPool):
                if pool is self._pool:
                    self._pool = self._new_pool()
                error = self._after_loss(task)
            if error is not None:
                task.future.set_exception(error)
            elif task not in self._suspects:
                task.future.set_result(inner.result())
            self._hand_out()

    def _after_loss(self, task: _Task) -> RunError | None:
        """Let a task try again, or return why not."""
        task.losses += task.is_suspect
        if task.losses < TRIES:
            task.is_suspect = True
            self._suspects.append(task)
            return None
        return RunError(
            f"Its worker ended {TRIES + 1} times without a word: killed, or out of memory."
        )


def _begin_worker(ear: Connection) -> None:
    """Make a worker end with the process that it works for, and say nothing of a Ctrl-C."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

    def listen() -> None:
        # Nothing is ever sent: what is heard is the end of the line.
        ear.poll(None)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()


@contextmanager
def opened(executor: str | Submits, jobs: int = 1) -> Iterator[Submits]:
    """Give an executor for a while.

    Args:
        executor: "local": this process, or with several `jobs` worker processes.
            "dask://HOST:PORT": the workers of that scheduler, which must have this package, and see
            the run's folder and the data under the same paths. Or an executor, which stays open.
        jobs: worker processes of "local".

    Raises:
        RunError: an unknown executor, or no scheduler answers.
        MissingExtraError: dask is not installed.
    """
    if not isinstance(executor, str):
        yield executor
    elif executor == "local" and jobs == 1:
        yield InProcess()
    elif executor == "local":
        processes = Processes(jobs)
        try:
            yield processes
        finally:
            processes.close()
    elif executor.startswith("dask://"):
        with _dask(executor) as cluster:
            yield cluster
    else:
        raise RunError(f"There is no executor {executor!r}: give local, or dask://HOST:PORT.")


@contextmanager
def _dask(address: str) -> Iterator[Submits]:
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise MissingExtraError(
            "dask:// needs dask, which is not installed: pip install 'blockprune[cluster]'"
        ) from error
    try:
        client = distributed.Client(
            address.replace("dask://", "tcp://", 1), timeout=CONNECT_SECONDS
        )
    except (OSError, ValueError) as error:
        raise RunError(f"No dask scheduler answers at {address}: {error}") from error
    try:
        # Equal arguments are no reason to give an old result: what counts are the files. Tasks of
        # a worker that dies are sent to another by the scheduler.
        yield client.get_executor(pure=False)
    finally:
        client.close()
