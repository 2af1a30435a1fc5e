"""What masks have in common and where they cut: layer by layer, ticket by ticket.

Source: papers/003, sections 4 and 5: sparsity of each layer, overlap of the tickets of several
importances, spread and sign flips of the shared connections, partial re-initialisation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from blockprune.lottery.record import MaskRecord, OverlapRecord, RunRecord, TicketCase
from blockprune.report.cases import Cases
from blockprune.report.cautions import listed
from blockprune.report.grouping import LevelGroup, by_group, criteria_of
from blockprune.report.heat import share_map
from blockprune.report.sections import ABSENT, Cell, Part, Section, Table, spread_of
from blockprune.report.svg import Figure, Plot, span_of

__all__ = ["layers_section", "overlap_section"]

Kept = tuple[int, int, float]


# --- layers ---------------------------------------------------------------------------------------


def layers_section(cases: Cases) -> Section | None:
    """Return what each level leaves of each layer, None for a run without masks."""
    masks = cases.record.masks
    if not masks:
        return None
    tickets = [mask for mask in masks if mask.case.level and mask.case.kind == "ticket"]
    groups = by_group(dict.fromkeys(mask.case for mask in tickets))
    parts = [
        Part(
            title=group.title().capitalize(),
            figures=tuple(
                _layer_map(
                    name, [m for m in tickets if m.case in found and m.case.criterion == name]
                )
                for name in criteria_of(found)
            ),
            is_folded=place > 0,
        )
        for place, (group, found) in enumerate(groups.items())
    ]
    text = (
        "Rows are layers in order of the network, columns levels; figures are the weights left, in "
        "percent of the layer, means over seeds.",
    )
    return Section(
        "layers",
        "Layers",
        "Weights left, layer by layer",
        (*(text if parts else ()), *_collapsed(masks)),
        tuple(parts),
    )


def _layer_map(title: str, masks: Sequence[MaskRecord]) -> Figure:
    found: dict[tuple[str, str], list[float]] = {}
    for mask in masks:
        for layer, (left, total) in mask.layers.items():
            found.setdefault((layer, str(mask.case.level)), []).append(left / total if total else 0)
    levels = sorted({mask.case.level for mask in masks})
    rows = list(dict.fromkeys(layer for layer, _ in found))
    shares = {place: statistics.fmean(values) for place, values in found.items()}
    return share_map(title, rows, [str(level) for level in levels], shares, "of the weights left")


def _collapsed(masks: Iterable[MaskRecord]) -> tuple[str, ...]:
    """Name the layers of which nothing is left, with the seeds in which it is so."""
    seeds: dict[tuple[TicketCase, str], list[int]] = {}
    for mask in masks:
        for layer in mask.collapsed:
            seeds.setdefault((mask.case, layer), []).append(mask.seed)
    if not seeds:
        return ("No layer collapsed: each mask leaves weights of every layer.",)
    named = [
        f"{case.label()}: {layer} (seed{'' if len(found) == 1 else 's'} "
        f"{', '.join(map(str, found))})"
        for (case, layer), found in seeds.items()
    ]
    return (f"Layers collapsed, and nothing passes them: {listed(named)}.",)


# --- overlap --------------------------------------------------------------------------------------


def overlap_section(cases: Cases) -> Section | None:
    """Return what tickets of one seed share, None for a run that did not compare them."""
    record = cases.record
    parts = [*_overlap_parts(record.overlaps), *_steadiness(record), *_survival(record)]
    if not parts:
        return None
    return Section(
        "overlap",
        "Overlap",
        "What tickets have in common",
        (),
        tuple(parts),
    )


def _overlap_parts(overlaps: Sequence[OverlapRecord]) -> list[Part]:
    members: dict[LevelGroup, list[OverlapRecord]] = {}
    for overlap in overlaps:
        members.setdefault(LevelGroup.of(overlap.cases[0]), []).append(overlap)
    return [_overlap_part(group, found) for group, found in members.items()]


def _overlap_part(group: LevelGroup, overlaps: Sequence[OverlapRecord]) -> Part:
    named = criteria_of(case for overlap in overlaps for case in overlap.cases)
    together: dict[int, list[OverlapRecord]] = {}
    for overlap in overlaps:
        if len(overlap.cases) == len(named):
            together.setdefault(overlap.cases[0].level, []).append(overlap)
    rows = tuple(
        (str(level), tuple(map(Cell, _overlap_row(found))))
        for level, found in sorted(together.items())
    )
    last = max(overlap.cases[0].level for overlap in overlaps)
    pairs = [o for o in overlaps if len(o.cases) == 2 and o.cases[0].level == last]
    return Part(
        title=f"Overlap of {', '.join(named)}: {group.title()}",
        text=(
            "Connections that the tickets of all importances of one seed share: of all that can be "
            "pruned, of those that the smallest mask left, and how many of these would be shared "
            "by independent random masks of the same sizes. Percent, mean ± standard deviation "
            "over seeds.",
        ),
        tables=(
            Table(
                "",
                "level",
                ("of all", "of surviving", "by chance", "times chance"),
                rows,
            ),
        ),
        figures=(*_overlap_curves(together), *_pairs_map(named, pairs, last)),
    )


def _overlap_row(found: Sequence[OverlapRecord]) -> tuple[str, ...]:
    ratios = [o.of_surviving / o.expected for o in found if o.expected > 0]
    return (
        spread_of([100 * overlap.of_all for overlap in found]),
        spread_of([100 * overlap.of_surviving for overlap in found]),
        spread_of([100 * overlap.expected for overlap in found]),
        f"{statistics.fmean(ratios):.3g}" if ratios else ABSENT.text,
    )


def _overlap_curves(together: dict[int, list[OverlapRecord]]) -> tuple[Figure, ...]:
    if not together:
        return ()
    lines = {
        ("k0 ticket", "of all"): {k: [o.of_all for o in v] for k, v in together.items()},
        ("k1 ticket", "of surviving"): {
            k: [o.of_surviving for o in v] for k, v in together.items()
        },
        ("grey random", "of surviving, by chance"): {
            k: [o.expected for o in v] for k, v in together.items()
        },
    }
    plot = Plot(
        "Overlap by level",
        x=(min(together) - 0.5, max(together) + 0.5),
        y=span_of([0, *(100 * v for line in lines.values() for vs in line.values() for v in vs)]),
        x_title="level",
        y_title="shared connections, %",
        whole_x=True,
    )
    for (css, name), line in lines.items():
        points = [(level, 100 * statistics.fmean(line[level])) for level in sorted(line)]
        plot.curve(points, f"line {css}")
        for level, value in points:
            plot.dot(level, value, f"mark {css}", said=f"level {level}: {value:.2f} % {name}")
    return (Figure("By level", plot.svg(), tuple(lines)),)


def _pairs_map(
    names: Sequence[str], pairs: Sequence[OverlapRecord], level: int
) -> tuple[Figure, ...]:
    found: dict[tuple[str, str], list[float]] = {}
    for overlap in pairs:
        one, other = (str(case.criterion) for case in overlap.cases)
        for place in ((one, other), (other, one)):
            found.setdefault(place, []).append(overlap.of_surviving)
    if len(names) < 3 or not found:
        return ()
    shares = {place: statistics.fmean(values) for place, values in found.items()}
    title = f"Pairs at level {level}, percent of the smaller ticket"
    return (share_map(title, names, names, shares, "of the smaller ticket shared"),)


# --- spread, sign flips, survival -----------------------------------------------------------------


def _steadiness(record: RunRecord) -> list[Part]:
    cases = dict.fromkeys(connection.case for connection in record.connections)
    if not cases:
        return []
    rows = []
    for case in cases:
        found = [c for c in record.connections if c.case == case]
        samples = (
            ([float(c.overlapping) for c in found], 0),
            ([float(c.others) for c in found], 0),
            *(([v for c in found if (v := c.spread[k]) is not None], 4) for k in (0, 1)),
            *(([100 * v for c in found if (v := c.sign_flips[k]) is not None], 2) for k in (0, 1)),
        )
        rows.append((case.label(), tuple(Cell(spread_of(*sample)) for sample in samples)))
    columns = (
        "shared connections",
        "others",
        "spread, shared",
        "spread, others",
        "sign flips, shared, %",
        "sign flips, others, %",
    )
    text = (
        "Spread is the mean standard deviation of a connection's value over the rounds that led to "
        "the ticket, a sign flip a connection whose sign was not always the same. Shared "
        "connections are those in the tickets of all importances.",
    )
    table = Table("", "ticket", columns, tuple(rows))
    return [Part("Spread and sign flips over the rounds", text, (table,))]


def _survival(record: RunRecord) -> list[Part]:
    found: dict[TicketCase, dict[str, list[Kept]]] = {}
    for survival in record.survivals:
        layers = found.setdefault(survival.case, {})
        for layer, counts in survival.layers.items():
            layers.setdefault(layer, []).append(counts)
    tables = tuple(
        Table(
            case.label(),
            "layer",
            ("shared", "kept again", "by chance", "difference, %"),
            (*((layer, _kept(counts)) for layer, counts in layers.items()), _kept_in_all(layers)),
        )
        for case, layers in found.items()
    )
    if not tables:
        return []
    text = (
        "Only the shared connections kept their first weights; all others began anew, and tickets "
        "were searched again. By chance is how many a mask of that density would keep; counts are "
        "summed over seeds, the difference is in percent of chance.",
    )
    return [Part("Survival after partial re-initialisation", text, tables)]


def _kept_in_all(layers: dict[str, list[Kept]]) -> tuple[str, tuple[Cell, ...]]:
    return "all layers", _kept([counts for found in layers.values() for counts in found])


def _kept(counts: Sequence[Kept]) -> tuple[Cell, ...]:
    shared, kept, chance = (sum(values) for values in zip(*counts, strict=True))
    difference = f"{100 * (kept - chance) / chance:+.1f}" if chance > 0 else ABSENT.text
    return Cell(f"{shared:,}"), Cell(f"{kept:,}"), Cell(f"{chance:,.1f}"), Cell(difference)
