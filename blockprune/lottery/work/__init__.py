"""What each kind of stage does. `perform` runs in whatever process an executor has.

A stage is told everything by its inputs, and reads what earlier stages left in the store. It sees
no other stage of its time, so any number of them can run at once, in any order.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blockprune.costs import UncountedWarning
from blockprune.criteria import NoDataWarning, ZeroScoresWarning
from blockprune.errors import ApproximationWarning
from blockprune.lottery.stages import StageStore
from blockprune.lottery.work import choosing, comparing, judging, training
from blockprune.lottery.work.bench import Bench, Job, Made, Setting, fresh_seed, order_seed
from blockprune.lottery.work.choosing import check_criteria, criterion_named
from blockprune.randomness import preserved_rng

__all__ = [
    "WORK",
    "Bench",
    "Job",
    "Setting",
    "check_criteria",
    "criterion_named",
    "fresh_seed",
    "order_seed",
    "perform",
]

OWN_WARNINGS = (ApproximationWarning, NoDataWarning, UncountedWarning, ZeroScoresWarning)
"""What a reader of the results must know."""

_ONE_AT_A_TIME = threading.Lock()
"""Generators and the number of threads belong to the process, so its stages take turns."""

WORK: dict[str, Callable[[Bench, Mapping[str, Any], Path], Made]] = {
    "dense": training.dense,
    "ticket": training.ticket,
    "score": choosing.score,
    "plan": choosing.plan,
    "iterative": choosing.iterative,
    "early-bird": choosing.early_bird,
    "filters": choosing.filters,
    "mask": choosing.mask,
    "evaluation": judging.evaluation,
    "latency": judging.latency,
    "similarity": judging.similarity,
    "robustness": judging.robustness,
    "overlaps": comparing.overlaps,
    "connections": comparing.connections,
    "survival": comparing.survival,
    "stability": comparing.stability,
    "line": comparing.line,
}
"""What a kind of stage does: given a bench, its inputs and a folder to leave tensors in."""


def perform(job: Job) -> str | None:
    """Do the work of a stage and write its output; return the error in words, None if none.

    An error is a value, so that an executor retries what was lost and not what went wrong.
    """
    store = StageStore(Path(job.store))
    inputs = job.stage.inputs
    try:
        with _ONE_AT_A_TIME, preserved_rng(), _threads(int(inputs["setting"]["threads"])):
            bench = Bench(job, store, Setting.of(inputs["setting"], job.data_dir))

            def make(folder: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
                with _own_warnings() as said:
                    found, times = WORK[job.stage.kind](bench, inputs, folder)
                return found, times, tuple(dict.fromkeys((*bench.notes, *said)))

            store.write(job.stage, make)
    # Whatever it is, the other stages go on, and the run says what could not be done.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _own_warnings() -> Iterator[list[str]]:
    """Give a list of what this package warns of; other warnings go where they would."""
    said: list[str] = []
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, OWN_WARNINGS):
                said.append(str(message))
            else:
                shown(message, category, *place, **more)

        for category in OWN_WARNINGS:
            warnings.simplefilter("always", category)
        warnings.showwarning = show
        yield said
