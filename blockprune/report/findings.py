"""What the papers found, and whether this run shows the same, as `deciding` has it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from blockprune.lottery.record import StabilityRecord, TicketCase
from blockprune.report.cases import INITIALISATION, Cases
from blockprune.report.deciding import Decision, Finding, above_zero, against
from blockprune.report.grouping import by_group
from blockprune.report.sections import Cell, Part, Section, Table

__all__ = ["findings_of", "findings_section"]

STABLE = 0.02
"""Instability below which a network is stable (Frankle et al., 2020)."""

ALIKE = ("magnitude", "l1", "l2")
LATE = ("softmax", "minmax")
FEW = 0.5
"""Share of a ticket's connections below which what it has in common with others is little."""


def findings_section(cases: Cases) -> Section | None:
    """Return the findings that a run has figures on, None where it has none."""
    findings = findings_of(cases)
    if not findings:
        return None
    rows = tuple(
        (f.claim, (Cell(f.paper), Cell(f.decision, is_best=f.decision == "holds"), Cell(f.figures)))
        for f in findings
    )
    table = Table("", "claim", ("paper", "here", "figures"), rows, is_prose=True)
    return Section(
        "findings",
        "Findings",
        "What the papers found, and this run",
        (
            "Each is decided by rule from the figures below, by the interval of a difference "
            "paired over seeds. Undecided is what few seeds mostly give, and one seed always. "
            "Nothing here was seen on the papers' own data unless the data above are.",
            "Jordao et al., “When layers play the lottery, all tickets win at initialization”, "
            "2023; “Considering layerwise importance in the lottery ticket hypothesis”, 2023; "
            "Frankle et al., “Stabilizing the lottery ticket hypothesis”, 2019, and “Linear mode "
            "connectivity and the lottery ticket hypothesis”, 2020.",
        ),
        (Part(tables=(table,)),),
    )


def findings_of(cases: Cases) -> tuple[Finding, ...]:
    """Return every finding that a run has figures on."""
    return tuple(
        finding
        for look in (_at_initialisation, _filters, _levels, _overlaps, _steadiness, _stability)
        for finding in look(cases)
    )


# --- papers/000 -----------------------------------------------------------------------------------


def _at_initialisation(cases: Cases) -> Iterator[Finding]:
    of_blocks = [case for case in cases.tickets if case.structure == "blocks"]
    tickets = [case for case in of_blocks if _is_untrained(case)]
    trained = [
        case
        for case in of_blocks
        if case.scored_at not in (None, INITIALISATION) and case.weights == "rewind"
    ]
    for paper, members, words in (
        ("Jordao et al. 2023, Table 1", trained, "scored in a trained network"),
        ("Jordao et al. 2023, Table 2", tickets, "found at initialisation"),
    ):
        verdicts = [v.verdict for case in members if (v := cases.verdict(case)) and v.interval]
        if not verdicts:
            continue
        counts = {word: verdicts.count(word) for word in ("wins", "ties", "loses")}
        decision: Decision = "fails" if counts["loses"] else "undecided"
        if counts["wins"] == len(verdicts):
            decision = "holds"
        said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        yield Finding(
            paper,
            f"All tickets of blocks {words} win.",
            decision,
            f"Of {len(verdicts)}: {said}.",
        )
    yield from against(
        cases,
        "Jordao et al. 2023, Table 2",
        "GraSP finds better tickets of blocks than SNIP.",
        [(case, case.model_copy(update={"criterion": "snip"})) for case in tickets
         if case.criterion == "grasp"],
    )  # fmt: skip
    yield from against(
        cases,
        "control",
        "Criteria find better tickets of blocks than chance.",
        [(case, random.case) for case in tickets if (random := cases.random_of(case))],
    )


def _filters(cases: Cases) -> Iterator[Finding]:
    narrow = [case for case in cases.others if case.kind == "ticket" and case.matched]
    for structure, matched in dict.fromkeys((case.structure, case.matched) for case in narrow):
        pairs = [
            (case.model_copy(update={"structure": "blocks", "matched": None}), case)
            for case in narrow
            if (case.structure, case.matched) == (structure, matched)
        ]
        is_table_3 = (structure, matched) == ("filters", "filters")
        yield from against(
            cases,
            "Jordao et al. 2023, Table 3" if is_table_3 else "open question",
            f"Tickets of blocks are better than those of {structure} matched by {matched}.",
            pairs,
        )


def _is_untrained(case: TicketCase) -> bool:
    return (
        case.scored_at == INITIALISATION
        and case.weights == "rewind"
        and case.rewound_to == INITIALISATION
    )


# --- papers/003 -----------------------------------------------------------------------------------


def _levels(cases: Cases) -> Iterator[Finding]:
    for group, members in _groups(cases):
        by_name: dict[str, dict[int, TicketCase]] = {}
        for case in members:
            by_name.setdefault(str(case.criterion), {})[case.level] = case
        plain = by_name.get("magnitude", {})
        others = [by_name[name] for name in ALIKE[1:] if name in by_name]
        alike = [(found[n], plain[n]) for found in others for n in found if n in plain]
        claim = f"L1 and L2 find tickets as good as magnitude ({group})."
        xi = cases.record.xi_points
        yield from against(cases, "Layerwise importance, 3.2", claim, alike, tolerance=xi)
        late = [
            (plain[last], by_name[name][last])
            for name in LATE
            if name in by_name and (last := max(by_name[name])) in plain
        ]
        claim = f"At the last level softmax and min-max fall behind magnitude ({group})."
        yield from against(cases, "Layerwise importance, 3.1", claim, late)
        random = [
            (case, control.case)
            for case in members
            if (control := cases.random_of(case)) is not None
        ]
        claim = f"Tickets of weights are better than random masks of their proportions ({group})."
        yield from against(cases, "Frankle et al. 2019, Figure 3", claim, random)


def _groups(cases: Cases) -> list[tuple[str, list[TicketCase]]]:
    tickets = [case for case in cases.others if case.kind == "ticket" and case.level]
    return [
        (group.title(), members)
        for group, members in by_group(tickets).items()
        if group.weights != "partial-reinit"
    ]


def _overlaps(cases: Cases) -> Iterator[Finding]:
    overlaps = cases.record.overlaps
    if overlaps:
        last = max(one.cases[0].level for one in overlaps)
        widest = max(len(one.cases) for one in overlaps)
        found = [o for o in overlaps if o.cases[0].level == last and len(o.cases) == widest]
        share, chance = (
            statistics.fmean(values)
            for values in zip(*((one.of_surviving, one.expected) for one in found), strict=True)
        )
        decision, said = above_zero(
            cases, ((one.cases, one.seed, FEW - one.of_surviving) for one in found)
        )
        yield Finding(
            "Layerwise importance, 5",
            "Tickets of one initialisation under different importances share few connections.",
            decision,
            f"At level {last}, {widest} tickets share {100 * share:.1f} % of the smallest one's "
            f"connections, {100 * chance:.1f} % by chance; below {100 * FEW:.0f} % is few, {said}.",
        )
    kept: dict[tuple[TicketCase, int], tuple[int, float]] = {
        (one.case, one.seed): (
            sum(again for _, again, _ in one.layers.values()),
            sum(expected for _, _, expected in one.layers.values()),
        )
        for one in cases.record.survivals
    }
    if kept:
        more = sum(again > expected for again, expected in kept.values())
        beyond = {key: again / expected - 1 for key, (again, expected) in kept.items() if expected}
        mean = statistics.fmean(beyond.values() or (0.0,))
        decision, said = above_zero(cases, ((case, s, v) for (case, s), v in beyond.items()))
        yield Finding(
            "Layerwise importance, 5",
            "What tickets share survives a partial re-initialisation more often than by chance.",
            decision,
            f"More in {more} of {len(kept)} tickets; {100 * mean:+.1f} % on the mean, {said}.",
        )


def _steadiness(cases: Cases) -> Iterator[Finding]:
    for place, (words, name) in enumerate(
        (("vary less from round to round", "spread"), ("flip their signs less often", "sign flips"))
    ):
        pairs = [
            (one, shared, other)
            for one in cases.record.connections
            for shared, other in ((one.spread, one.sign_flips)[place],)
            if shared is not None and other is not None
        ]
        if not pairs:
            continue
        fewer = sum(shared < other for _, shared, other in pairs)
        apart = sum(shared != other for _, shared, other in pairs)
        means = [statistics.fmean(values) for values in zip(*(p[1:] for p in pairs), strict=True)]
        decision, said = above_zero(
            cases, ((one.case, one.seed, other - shared) for one, shared, other in pairs)
        )
        yield Finding(
            "Layerwise importance, Figure 2",
            f"Connections that tickets share {words} than others.",
            decision,
            f"In {fewer} of {apart} tickets where they differ; {name} {means[0]:.3g} against "
            f"{means[1]:.3g} on the mean, {said}.",
        )


# --- papers/004 -----------------------------------------------------------------------------------


def _stability(cases: Cases) -> Iterator[Finding]:
    found = {(one.case, one.seed): one for one in cases.record.stabilities}
    pairs = [
        (one, found[chance, seed])
        for (case, seed), one in found.items()
        if case.kind == "ticket"
        and (chance := case.model_copy(update={"kind": "random"}), seed) in found
    ]
    for words, noise in (("pruning", "to_pruning"), ("the order of the data", "to_order")):
        apart = [(one, getattr(one, noise).l2, getattr(other, noise).l2) for one, other in pairs]
        ratios = [other / own for _, own, other in apart if own]
        if ratios:
            decision, said = above_zero(
                cases, ((one.case, one.seed, other - own) for one, own, other in apart)
            )
            yield Finding(
                "Frankle et al. 2019, Figure 3",
                f"Tickets of weights are more stable to {words} than random masks.",
                decision,
                f"Random ones end {statistics.fmean(ratios):.2f} times as far apart on the mean, "
                f"{min(ratios):.2f} to {max(ratios):.2f}; in L2 the difference is {said}.",
            )
        yield from _later(cases, found, words, noise)
    yield from _later_accuracy(cases)
    yield from _connected(cases)


def _later(
    cases: Cases, found: dict[tuple[TicketCase, int], StabilityRecord], words: str, noise: str
) -> Iterator[Finding]:
    """Compare the first with the last moment that tickets are rewound to."""
    ends = [
        (found[first, seed], found[last, seed])
        for first, last in _ends([case for case, _ in found])
        for seed in {seed for _, seed in found}
        if (first, seed) in found and (last, seed) in found
    ]
    if ends:
        lengths = [(a, getattr(a, noise).l2, getattr(b, noise).l2) for a, b in ends]
        closer = sum(last < first for _, first, last in lengths)
        means = [statistics.fmean(values) for values in zip(*(e[1:] for e in lengths), strict=True)]
        decision, said = above_zero(
            cases, ((one.case, one.seed, first - last) for one, first, last in lengths)
        )
        yield Finding(
            "Frankle et al. 2019, Figure 4",
            f"Tickets rewound later are more stable to {words}.",
            decision,
            f"L2 {means[0]:.2f} at the first moment, {means[1]:.2f} at the last; closer in "
            f"{closer} of {len(ends)} tickets, {said}.",
        )


def _later_accuracy(cases: Cases) -> Iterator[Finding]:
    levels = [case for case in cases.others if case.kind == "ticket" and case.level]
    last = max((case.level for case in levels), default=0)
    ends = [(b, a) for a, b in _ends([case for case in levels if case.level == last])]
    claim = "Tickets of the last level that are rewound later are better."
    yield from against(cases, "Frankle et al. 2019, Figure 4", claim, ends)


def _ends(members: Sequence[TicketCase]) -> list[tuple[TicketCase, TicketCase]]:
    """Return each ticket as it is rewound first, and last."""
    same: dict[TicketCase, list[TicketCase]] = {}
    for case in dict.fromkeys(members):
        if case.kind == "ticket" and case.weights == "rewind" and case.rewound_to is not None:
            same.setdefault(case.model_copy(update={"rewound_to": None}), []).append(case)
    ordered = [
        sorted(several, key=lambda c: (c.rewound_to.epoch, c.rewound_to.iteration))  # type: ignore[union-attr]
        for several in same.values()
    ]
    return [(several[0], several[-1]) for several in ordered if len(several) > 1]


def _connected(cases: Cases) -> Iterator[Finding]:
    lines = [one for one in cases.record.connectivities if one.case.kind == "ticket"]
    if not lines:
        return
    stable = sum(one.instability < STABLE for one in lines)
    values = [100 * one.instability for one in lines]
    decision, said = above_zero(
        cases, ((one.case, one.seed, 100 * (STABLE - one.instability)) for one in lines)
    )
    yield Finding(
        "Frankle et al. 2020",
        "Tickets are linearly connected over orders of the data (instability below 2 points).",
        decision,
        f"{stable} of {len(lines)} are; instability {min(values):.2f} to {max(values):.2f} points, "
        f"below 2 by {said}.",
    )
