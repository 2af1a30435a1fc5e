"""From a spec to the cases of a run: every ticket, and the controls beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from blockprune.lottery.record import TicketCase, Weights
from blockprune.lottery.spec import Spec, SpecError, step_at
from blockprune.lottery.steps import Step
from blockprune.lottery.verdicts import random_twin

__all__ = ["Moments", "cases_of"]

DENSE = TicketCase(kind="dense")
START = Step()


@dataclass(frozen=True)
class Moments:
    """The moments of one training, in steps.

    Attributes:
        epochs: of the training.
        per_epoch: batches of an epoch.
    """

    epochs: int
    per_epoch: int

    @property
    def end(self) -> Step:
        """The moment at which nothing is left to train."""
        return Step(epoch=self.epochs)

    def at(self, moment: str | Step) -> Step:
        """Return the step that a moment of a spec is."""
        return step_at(moment, self.epochs, self.per_epoch)


def cases_of(spec: Spec, ps: Sequence[int], moments: Moments) -> tuple[TicketCase, ...]:
    """Return what a run trains, for each seed: dense, tickets, random blocks, tickets from scratch.

    Args:
        spec: of the run.
        ps: numbers of blocks to remove.
        moments: of the dense training.

    Raises:
        SpecError: a moment leaves nothing to train.
    """
    tickets = [*_tickets(spec, ps, moments), *_early_birds(spec, ps)]
    controls = [random_twin(ticket) for ticket in tickets] if spec.controls.random else []
    if spec.controls.scratch:
        controls += [_from_scratch(ticket) for ticket in tickets]
    return tuple(dict.fromkeys((DENSE, *tickets, *controls)))


def _tickets(spec: Spec, ps: Sequence[int], moments: Moments) -> Iterator[TicketCase]:
    chosen = product(spec.criteria, spec.schedule, spec.scored_at, ps, spec.weights)
    for criterion, schedule, scored_at, p, weights in chosen:
        scored = moments.at(scored_at)
        for rewound in _starts(spec, weights, scored, moments):
            yield TicketCase(
                kind="ticket",
                criterion=criterion,
                p=p,
                scored_at=scored,
                weights=weights,
                rewound_to=rewound,
                schedule=schedule,
            )


def _starts(spec: Spec, weights: Weights, scored: Step, moments: Moments) -> list[Step | None]:
    if weights in ("reinit", "finetune"):
        return [None]
    found = []
    for moment in spec.rewound_to:
        step = scored if moment == "scored_at" else moments.at(moment)
        if step == moments.end:
            raise SpecError(
                f"rewound_to = {str(moment)!r} is the end of the training, {step}, and leaves "
                "nothing to train: name an earlier moment."
            )
        found.append(step)
    return [*found]


def _early_birds(spec: Spec, ps: Sequence[int]) -> Iterator[TicketCase]:
    if spec.early_bird is None:
        return
    for p in ps:
        yield TicketCase(
            kind="ticket",
            criterion=spec.early_bird.criterion,
            p=p,
            weights="rewind",
            early_bird=True,
        )


def _from_scratch(ticket: TicketCase) -> TicketCase:
    """Return the control that has a ticket's blocks, and none of its weights."""
    return ticket.model_copy(update={"kind": "scratch", "weights": "reinit", "rewound_to": None})
