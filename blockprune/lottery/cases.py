"""From a spec to the cases of a run: every ticket, and the controls beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from blockprune.lottery.moments import step_at
from blockprune.lottery.record import TicketCase, Weights
from blockprune.lottery.spec import Levels, Spec, SpecError
from blockprune.lottery.steps import Step
from blockprune.lottery.verdicts import random_twin

__all__ = [
    "DENSE",
    "START",
    "Moments",
    "below",
    "blocks_of",
    "cases_of",
    "has_controls",
    "trunk_of",
]

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
    """Return what a run trains, for each seed: dense, tickets, random controls, and from scratch.

    Args:
        spec: of the run.
        ps: numbers of blocks to remove.
        moments: of the dense training.

    Raises:
        SpecError: a moment leaves nothing to train.
    """
    of_blocks = [*_tickets(spec, ps, moments)]
    tickets = [
        *(of_blocks if "blocks" in spec.structures else ()),
        *_early_birds(spec, ps),
        *_matched(spec, of_blocks),
        *_levels(spec, moments),
    ]
    judged = [ticket for ticket in tickets if has_controls(spec, ticket)]
    controls = []
    if spec.controls.random:
        of_random = dict.fromkeys(case for ticket in judged for case in _way_to(ticket))
        controls += [random_twin(ticket) for ticket in tickets if ticket in of_random]
    if spec.controls.scratch:
        controls += [_from_scratch(ticket) for ticket in judged]
    return tuple(dict.fromkeys((DENSE, *tickets, *controls)))


def has_controls(spec: Spec, ticket: TicketCase) -> bool:
    """Return whether controls run beside a ticket."""
    if ticket.weights == "partial-reinit":
        return False
    at = spec.levels.controls_at if spec.levels is not None else ()
    return not ticket.level or not at or ticket.level in at


def trunk_of(case: TicketCase) -> TicketCase:
    """Return the whole network whose training a ticket goes back to.

    It is the dense one, but for tickets of a partial re-initialisation: these have one of weights
    that are new, but for the connections that the tickets of a scope and a rewind share.
    """
    if case.weights != "partial-reinit":
        return DENSE
    return TicketCase(
        kind="dense", weights=case.weights, rewound_to=case.rewound_to, scope=case.scope
    )


def below(case: TicketCase) -> TicketCase:
    """Return the network whose trained weights decide on the mask of a level."""
    if case.level == 1 or case.schedule == "one-shot":
        return trunk_of(case)
    return case.model_copy(update={"level": case.level - 1})


def blocks_of(case: TicketCase) -> TicketCase:
    """Return the ticket of blocks that one of filters or weights lacks as much as."""
    return case.model_copy(update={"kind": "ticket", "structure": "blocks", "matched": None})


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


def _matched(spec: Spec, of_blocks: Sequence[TicketCase]) -> Iterator[TicketCase]:
    """Yield the tickets of other structures that lack as much as those of blocks."""
    others = [structure for structure in spec.structures if structure != "blocks"]
    for structure, matched, ticket in product(others, spec.matched_by, of_blocks):
        is_asked = not spec.matched_p or ticket.p in spec.matched_p
        # Masks do not take filters away.
        if is_asked and (structure, matched) != ("weights", "filters"):
            yield ticket.model_copy(update={"structure": structure, "matched": matched})


def _levels(spec: Spec, moments: Moments) -> Iterator[TicketCase]:
    levels = spec.levels
    if levels is None:
        return
    policies: list[Weights] = [*spec.weights]
    if levels.partial_reinit:
        policies.append("partial-reinit")
    chosen = product(policies, levels.importances, levels.schedule, levels.scope)
    for weights, importance, schedule, scope in chosen:
        if weights == "partial-reinit" and schedule != "iterative":
            continue
        # Without a moment to be scored at, "scored_at" is the end, which leaves nothing to train.
        for rewound in _starts(spec, weights, moments.end, moments):
            for level in _trained(levels, schedule):
                yield TicketCase(
                    kind="ticket",
                    structure="weights",
                    criterion=importance,
                    level=level,
                    weights=weights,
                    rewound_to=rewound,
                    schedule=schedule,
                    scope=scope,
                )


def _trained(levels: Levels, schedule: str) -> Sequence[int]:
    every = range(1, levels.count + 1)
    return levels.trained if schedule == "one-shot" and levels.trained else every


def _way_to(ticket: TicketCase) -> list[TicketCase]:
    """Return a ticket behind those that its random control needs the controls of.

    Without a rewind of the weights, a level goes on from the trained control below it.
    """
    if ticket.weights not in ("learning-rate", "finetune") or ticket.schedule != "iterative":
        return [ticket]
    return [ticket.model_copy(update={"level": k}) for k in range(1, ticket.level)] + [ticket]


def _from_scratch(ticket: TicketCase) -> TicketCase:
    """Return the control that has a ticket's shape, and none of its weights.

    The mask of a level hangs on the moment that the levels before it were rewound to.
    """
    rewound = ticket.rewound_to if ticket.level else None
    return ticket.model_copy(update={"kind": "scratch", "weights": "reinit", "rewound_to": rewound})
