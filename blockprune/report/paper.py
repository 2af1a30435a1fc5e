"""Tables 1, 2 and 3 of the paper, filled with what a run found.

Source: Jordao et al., "When layers play the lottery, all tickets win at initialization", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from blockprune.lottery.record import RunRecord, TicketCase, VerdictRecord
from blockprune.lottery.steps import Step
from blockprune.report.cases import INITIALISATION, Cases

__all__ = ["Cell", "PaperTable", "SetUp", "paper_tables", "set_up_of"]

Row = TypeVar("Row")

MACS: Final = 69_124_736
"""Of the paper's ResNet32, for one image of 3x32x32."""

MERGES: Final = 15
EPOCHS: Final = 200

TABLE_1: Final[Mapping[str, tuple[float, ...]]] = {
    "hrank": (-0.01, 0.21, 0.10, 0.12),
    "expectabs": (0.33, 0.13, -0.48, -0.62),
    "pls": (0.06, 0.31, 0.10, 0.10),
    "random": (0.38, 0.15, 0.26, -0.07),
    "kl": (0.74, 0.46, -0.03, -0.17),
}
TABLE_1_EPOCHS: Final = (0, 25, 50, 75)
TABLE_2: Final[Mapping[str, tuple[float, ...]]] = {
    "snip": (0.08, 0.00, -0.50, -0.53, -1.00),
    "grasp": (0.40, 0.72, 0.34, 0.41, 0.12),
}
TABLE_3_FILTERS: Final[Mapping[str, float]] = {"snip": -0.79, "grasp": -0.11}

FILTERS_NOTE: Final = (
    "The ticket of filters lacks as many filters as that of one block beside it (the one of its "
    "criterion)."
)
NO_FILTERS_NOTE: Final = (
    "This run prunes no filters: the first row is empty, and the comparison that the paper's Table "
    "3 makes is not made here."
)


@dataclass(frozen=True)
class SetUp:
    """Whether a run is the paper's own experiment.

    Attributes:
        is_the_papers: whether figures may stand beside the published ones.
        sentence: that says so, and why not.
    """

    is_the_papers: bool
    sentence: str


@dataclass(frozen=True)
class Cell:
    """One entry: a mean over seeds, and what was published.

    Attributes:
        case: that it is about; None where the run has none.
        verdict: on it.
        published: points of the paper's entry, where the set-up is the same.
        place: 1 and 2 for the best two of a row, where the paper marks them; else 0.
    """

    case: TicketCase | None = None
    verdict: VerdictRecord | None = None
    published: float | None = None
    place: int = 0


@dataclass(frozen=True)
class PaperTable:
    """A table in the paper's form.

    Attributes:
        number: of the table in the paper.
        title: what this one is about.
        corner: what its rows are.
        columns: their heads.
        rows: name and cells.
        notes: what must be known to read it.
    """

    number: int
    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()


def set_up_of(record: RunRecord) -> SetUp:
    """Say whether a run is the paper's experiment: CIFAR-10, its ResNet32, 200 epochs."""
    cases = Cases(record)
    data = str(record.data.get("name", "unknown data"))
    macs = {network.macs for network in cases.dense}
    differences = []
    if data.lower().replace("-", "") != "cifar10":
        differences.append(f"the data are {data}, and accuracies on it say nothing about CIFAR-10")
    if macs != {MACS} or len(record.blocks) != MERGES:
        differences.append(
            f"the network has {len(record.blocks)} residual blocks and "
            f"{' or '.join(f'{count:,}' for count in sorted(macs)) or 'unknown'} MACs, the paper's "
            f"ResNet32 {MERGES} and {MACS:,}"
        )
    if cases.epochs != EPOCHS:
        differences.append(f"the dense network is trained for {cases.epochs} epochs, not {EPOCHS}")
    if differences:
        return SetUp(
            False,
            "The published figures are not shown beside ours, since they cannot be compared: "
            f"{'; '.join(differences)}. Only the form of the tables is the paper's.",
        )
    return SetUp(
        True,
        "The set-up is the paper's: ResNet32 on CIFAR-10, 200 epochs. Its figures stand below "
        "ours. They are single numbers, for which the paper gives neither seeds nor intervals, and "
        "it does not say how it trains: a difference within our interval is none.",
    )


def paper_tables(record: RunRecord) -> tuple[PaperTable, ...]:
    """Return Tables 1, 2 and 3; one that the run cannot fill has no rows and a note that says so.

    There is one Table 1 for each number of blocks and policy, since the paper does not say which
    number its own is for.
    """
    cases = Cases(record)
    compared = set_up_of(record).is_the_papers
    return (*_tables_1(cases, compared), *_tables_2(cases, compared), _table_3(cases, compared))


# --- Table 1 --------------------------------------------------------------------------------------


def _tables_1(cases: Cases, compared: bool) -> list[PaperTable]:
    groups: dict[tuple[int, str, Step, str], list[TicketCase]] = {}
    for case in cases.tickets:
        if case.scored_at and case.scored_at != INITIALISATION and case.rewound_to is not None:
            key = (case.p, case.weights or "rewind", case.scored_at, case.schedule)
            groups.setdefault(key, []).append(case)
    if not groups:
        absent = "Not part of this run: no ticket was scored after training and rewound."
        return [PaperTable(1, "criteria by the epoch rewound to", "", (), (), (absent,))]
    return [_table_1(cases, key, found, compared) for key, found in sorted(groups.items(), key=str)]


def _table_1(
    cases: Cases,
    key: tuple[int, str, Step, str],
    tickets: Sequence[TicketCase],
    compared: bool,
) -> PaperTable:
    p, weights, scored_at, schedule = key
    moments = sorted(
        {case.rewound_to for case in tickets if case.rewound_to is not None},
        key=lambda step: (step.epoch, step.iteration),
    )
    rows: dict[str, dict[Step | None, Cell]] = {}
    for case in tickets:
        row = rows.setdefault(str(case.criterion), {})
        row[case.rewound_to] = Cell(case, cases.verdict(case))
        if control := cases.random_of(case):
            rows.setdefault("random", {})[case.rewound_to] = Cell(control.case, control)
    filled = tuple(
        (name, _ranked([_with_table_1(row.get(m, Cell()), name, m, compared) for m in moments]))
        for name, row in _random_last(rows)
    )
    words = [f"p = {p}", weights, f"scored at {scored_at}"]
    notes = ["Bold: best of its row, underlined: second best, as in the paper."]
    if compared:
        notes.append(
            "The paper does not say how many blocks its Table 1 removes; its columns are epochs 0, "
            "25, 50 and 75, and it trains with learning-rate rewinding."
        )
    return PaperTable(
        1,
        ", ".join([*words, *([schedule] if schedule != "one-shot" else [])]),
        "criterion",
        tuple(_moment_head(moment, cases.epochs) for moment in moments),
        filled,
        tuple(notes),
    )


def _with_table_1(cell: Cell, name: str, moment: Step, compared: bool) -> Cell:
    known = dict(zip(TABLE_1_EPOCHS, TABLE_1.get(name, ()), strict=False))
    is_shown = compared and moment.iteration == 0
    return replace(cell, published=known.get(moment.epoch) if is_shown else None)


def _ranked(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    means = sorted({cell.verdict.mean for cell in cells if cell.verdict}, reverse=True)
    if len(means) < 2:
        return tuple(cells)
    places = dict(zip(means[:2], (1, 2), strict=True))
    return tuple(
        replace(cell, place=places.get(cell.verdict.mean, 0)) if cell.verdict else cell
        for cell in cells
    )


def _moment_head(moment: Step, epochs: int) -> str:
    share = f" ({100 * moment.epoch / epochs:.0f} %)" if epochs and not moment.iteration else ""
    return f"{moment}{share}"


# --- Tables 2 and 3 -------------------------------------------------------------------------------


def _tables_2(cases: Cases, compared: bool) -> list[PaperTable]:
    groups: dict[str, list[TicketCase]] = {}
    for case in _found_untrained(cases):
        groups.setdefault(case.schedule, []).append(case)
    if not groups:
        absent = "Not part of this run: no ticket was scored at initialisation."
        return [PaperTable(2, "tickets found at initialisation", "", (), (), (absent,))]
    return [_table_2(cases, schedule, found, compared) for schedule, found in groups.items()]


def _table_2(
    cases: Cases, schedule: str, tickets: Sequence[TicketCase], compared: bool
) -> PaperTable:
    columns: dict[str, dict[int, Cell]] = {}
    for case in tickets:
        published = dict(enumerate(TABLE_2.get(str(case.criterion), ()), start=1))
        columns.setdefault(str(case.criterion), {})[case.p] = Cell(
            case, cases.verdict(case), published.get(case.p) if compared else None
        )
        if control := cases.random_of(case):
            columns.setdefault("random", {})[case.p] = Cell(control.case, control)
    ordered = _random_last(columns)
    rows = tuple(
        (str(p), tuple(column.get(p, Cell()) for _, column in ordered))
        for p in sorted({case.p for case in tickets})
    )
    title = "tickets found at initialisation"
    return PaperTable(
        2,
        title if schedule == "one-shot" else f"{title}, {schedule}",
        "p",
        tuple(name for name, _ in ordered),
        rows,
    )


def _table_3(cases: Cases, compared: bool) -> PaperTable:
    found = {
        str(case.criterion): case
        for case in _found_untrained(cases)
        if case.p == 1 and case.schedule == "one-shot"
    }
    title = "layer against filter pruning, one block removed"
    if not found:
        absent = "Not part of this run: no ticket of one block was scored at initialisation."
        return PaperTable(3, title, "", (), (), (absent,))
    published = {name: values[0] for name, values in TABLE_2.items()}
    narrow = {
        str(case.criterion): case
        for case in _untrained(cases.others)
        if (case.kind, case.structure, case.matched, case.p) == ("ticket", "filters", "filters", 1)
        and case.schedule == "one-shot"
    }
    filters = tuple(
        Cell(
            narrow.get(name),
            cases.verdict(narrow[name]) if name in narrow else None,
            TABLE_3_FILTERS.get(name) if compared else None,
        )
        for name in found
    )
    layers = tuple(
        Cell(case, cases.verdict(case), published.get(name) if compared else None)
        for name, case in found.items()
    )
    return PaperTable(
        3,
        title,
        "pruned",
        tuple(found),
        (("filters", filters), ("layers", layers)),
        (FILTERS_NOTE if narrow else NO_FILTERS_NOTE,),
    )


def _found_untrained(cases: Cases) -> Iterable[TicketCase]:
    return _untrained(cases.tickets)


def _untrained(tickets: Iterable[TicketCase]) -> Iterable[TicketCase]:
    return (
        case
        for case in tickets
        if case.scored_at == INITIALISATION
        and case.weights in (None, "rewind")
        and case.rewound_to in (None, INITIALISATION)
    )


def _random_last(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    return sorted(rows.items(), key=lambda row: row[0] == "random")
