"""Which networks of a run belong together: a case's seeds, its control, its setting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blockprune.lottery.record import NetworkRecord, RunRecord, TicketCase, VerdictRecord
from blockprune.lottery.steps import Step
from blockprune.lottery.verdicts import random_twin

__all__ = ["DENSE", "INITIALISATION", "Cases", "Setting", "Source", "by_source", "moment_of"]

INITIALISATION = Step()
DENSE = TicketCase(kind="dense")


@dataclass(frozen=True)
class Setting:
    """What tickets that are compared with one another share: all but criterion and size."""

    scored_at: Step | None
    weights: str | None
    rewound_to: Step | None
    schedule: str
    early_bird: bool

    @classmethod
    def of(cls, case: TicketCase) -> Setting:
        """Return the setting of a case."""
        return cls(case.scored_at, case.weights, case.rewound_to, case.schedule, case.early_bird)

    def title(self) -> str:
        """Return the setting in a few words."""
        words = []
        if self.scored_at is not None:
            words.append(f"scored at {moment_of(self.scored_at)}")
        if self.early_bird:
            words.append("early birds")
        if self.rewound_to is not None and self.rewound_to != self.scored_at:
            words.append(f"rewound to {moment_of(self.rewound_to)}")
        if self.weights not in (None, "rewind"):
            words.append(str(self.weights))
        if self.schedule != "one-shot":
            words.append(self.schedule)
        return ", ".join(words) or "controls"


@dataclass(frozen=True)
class Source:
    """Where the choice of what goes came from: a criterion, or a control."""

    kind: str
    criterion: str | None

    @classmethod
    def of(cls, case: TicketCase) -> Source:
        """Return the source of a case."""
        has_criterion = case.kind in ("ticket", "scratch") or case.structure != "blocks"
        return cls(case.kind, case.criterion if has_criterion else None)

    def name(self) -> str:
        """Return what it is called in legends."""
        if self.kind == "ticket":
            return str(self.criterion)
        if self.kind == "scratch" and self.criterion is not None:
            return f"{self.criterion}, from scratch"
        if self.kind == "random" and self.criterion is not None:
            return f"random like {self.criterion}"
        return {"dense": "dense", "random": "random", "scratch": "from scratch"}[self.kind]


class Cases:
    """The cases of a run, in the order in which the record has them.

    Attributes:
        record: the run.
        seeds: of the dense networks.
        dense: the dense networks.
        epochs: that the longest dense training took; 0 without one.
        tickets: cases of blocks found by a criterion.
        controls: of blocks, random and from scratch.
        kinds: cases of any structure found by a criterion.
        others: cases of filters and weights, with their controls.
        has_blocks: whether blocks are what the run is about, or nothing else is.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._networks: dict[TicketCase, list[NetworkRecord]] = {}
        for network in record.networks:
            self._networks.setdefault(network.case, []).append(network)
        self._verdicts = {verdict.case: verdict for verdict in record.verdicts}
        self.dense = self.networks(DENSE)
        self.seeds = tuple(dict.fromkeys(network.seed for network in self.dense))
        self.epochs = max((len(network.epochs) for network in self.dense), default=0)
        known = dict.fromkeys((*self._networks, *self._verdicts))
        of_blocks = [case for case in known if case.structure == "blocks"]
        self.tickets = tuple(case for case in of_blocks if case.kind == "ticket")
        self.controls = tuple(case for case in of_blocks if case.kind in ("random", "scratch"))
        self.kinds = tuple(case for case in known if case.kind == "ticket")
        self.others = tuple(case for case in known if case.structure != "blocks")
        self.has_blocks = bool(self.tickets or self.controls or not self.others)
        criteria = dict.fromkeys(
            case.criterion for case in known if case.kind in ("ticket", "scratch")
        )
        self._places = {name: place for place, name in enumerate(filter(None, criteria))}

    def networks(self, case: TicketCase) -> list[NetworkRecord]:
        """Return the trained networks of a case, one a seed."""
        return self._networks.get(case, [])

    def verdict(self, case: TicketCase) -> VerdictRecord | None:
        """Return what was judged of a case; None where none of its networks was trained."""
        return self._verdicts.get(case)

    def random_of(self, case: TicketCase) -> VerdictRecord | None:
        """Return the verdict on as much removed at random, trained like ``case``."""
        return self.verdict(random_twin(case))

    def mean_accuracy(self, case: TicketCase) -> float:
        """Return the mean over seeds, in percent."""
        networks = self.networks(case)
        return 100 * sum(network.accuracy for network in networks) / len(networks)

    def css(self, case: TicketCase) -> str:
        """Return the classes of a case's marks: its colour, and its line."""
        source = Source.of(case)
        colour = "grey" if source.criterion is None else f"k{self._places[source.criterion] % 8}"
        return f"{colour} {case.kind}"

    def settings(self) -> Iterator[tuple[Setting, tuple[TicketCase, ...]]]:
        """Yield each setting of tickets with its cases, the controls that belong to it behind.

        Without tickets, all controls are one setting.
        """
        by_setting: dict[Setting, list[TicketCase]] = {}
        for case in self.tickets:
            by_setting.setdefault(Setting.of(case), []).append(case)
        for setting, tickets in by_setting.items():
            chosen = {_choice(case) for case in tickets}
            twins = {random_twin(case) for case in tickets}
            controls = [
                control
                for control in self.controls
                if control in twins or (control.kind == "scratch" and _choice(control) in chosen)
            ]
            yield setting, (*tickets, *controls)
        if not by_setting and self.controls:
            yield Setting.of(TicketCase(kind="random")), self.controls


def by_source(cases: Iterable[TicketCase]) -> dict[Source, list[TicketCase]]:
    """Return the cases of each source, those with the fewest blocks removed first."""
    found: dict[Source, list[TicketCase]] = {}
    for case in sorted(cases, key=lambda case: case.p):
        found.setdefault(Source.of(case), []).append(case)
    return found


def _choice(case: TicketCase) -> tuple[object, ...]:
    """Return what decides on the blocks that go."""
    return (case.criterion, case.p, case.scored_at, case.schedule, case.early_bird)


def moment_of(step: Step) -> str:
    """Return a moment in words."""
    return "initialisation" if step == INITIALISATION else str(step)
