"""Blocks, filters and weights side by side: what each loses and saves where as much is removed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from blockprune.lottery.record import NetworkRecord, Structure, TicketCase, VerdictRecord
from blockprune.report.cases import Cases, Setting
from blockprune.report.sections import ABSENT, Cell, Part, Section, Table
from blockprune.report.svg import Figure, Plot, span_of

__all__ = ["STRUCTURES", "Rival", "rivals_of", "structures_section"]

STRUCTURES: Final[tuple[Structure, ...]] = ("blocks", "filters", "weights")
CLOSE: Final = 0.1
"""Shares of the dense network's cost that may lie apart where latency follows MACs."""

WORDS: Final = {"params": "parameters", "macs": "MACs", "filters": "filters"}


@dataclass(frozen=True)
class Rival:
    """A ticket of one structure, and what it costs.

    Attributes:
        case: of it.
        verdict: on it; None where it was not judged.
        params: mean over seeds.
        macs: likewise.
        macs_ratio: to the dense network of the same seed, mean.
        latency_ratio: likewise, measured; None where it was not.
        seconds_ratio: likewise, of the training.
    """

    case: TicketCase
    verdict: VerdictRecord | None
    params: float
    macs: float
    macs_ratio: float | None
    latency_ratio: float | None
    seconds_ratio: float | None


Row = dict[Structure, Rival]
Key = tuple[Setting, str | None, int]


def structures_section(cases: Cases) -> Section | None:
    """Return one table for each measure that was matched, None where there is none."""
    found = rivals_of(cases)
    if not found:
        return None
    parts = tuple(part for matched, rows in found.items() for part in _parts(cases, matched, rows))
    return Section(
        "structures",
        "Structures",
        "Blocks, filters and weights side by side",
        (
            "Tickets of filters and of weights that lack as much as the ticket of p blocks beside "
            "them. Differences to dense in points with their interval and seeds. Parameters and "
            "MACs count what is left, a masked weight not; latency and training time are measured, "
            "as shares of the dense network of the same seed: what computes with a mask multiplies "
            "by its zeros.",
        ),
        parts,
    )


def rivals_of(cases: Cases) -> dict[str, dict[Key, Row]]:
    """Return, for each measure matched, the structures of each setting, criterion and p."""
    found: dict[str, dict[Key, Row]] = {}
    blocks = {_key(case): case for case in cases.tickets}
    for case in cases.others:
        if case.kind != "ticket" or case.matched is None:
            continue
        row = found.setdefault(case.matched, {}).setdefault(_key(case), {})
        if _key(case) in blocks and "blocks" not in row:
            row["blocks"] = _rival(cases, blocks[_key(case)])
        row[case.structure] = _rival(cases, case)
    return found


def _key(case: TicketCase) -> Key:
    return Setting.of(case), case.criterion, case.p


def _rival(cases: Cases, case: TicketCase) -> Rival:
    networks = cases.networks(case)
    dense = {network.seed: network for network in cases.dense}

    def ratio(read: Callable[[NetworkRecord], float | None]) -> float | None:
        pairs = [(read(n), read(dense[n.seed])) for n in networks if n.seed in dense]
        known = [mine / other for mine, other in pairs if mine is not None and other]
        return statistics.fmean(known) if known else None

    return Rival(
        case=case,
        verdict=cases.verdict(case),
        params=statistics.fmean([network.params for network in networks] or [0]),
        macs=statistics.fmean([network.macs for network in networks] or [0]),
        macs_ratio=ratio(lambda network: network.macs),
        latency_ratio=ratio(lambda network: network.latency_ms),
        seconds_ratio=ratio(lambda network: network.seconds),
    )


# --- tables ---------------------------------------------------------------------------------------


def _parts(cases: Cases, matched: str, rows: dict[Key, Row]) -> list[Part]:
    settings: dict[Setting, dict[Key, Row]] = {}
    for key, row in rows.items():
        settings.setdefault(key[0], {})[key] = row
    return [
        Part(
            title=f"Equal {WORDS[matched]}, {setting.title()}",
            text=_sentences(list(found.values())),
            tables=(_table(found),),
            figures=_charts(cases, found),
        )
        for setting, found in settings.items()
    ]


def _table(rows: dict[Key, Row]) -> Table:
    shown = _shown(rows.values())
    lines = sorted(rows.items(), key=lambda item: (str(item[0][1]), item[0][2]))
    return Table(
        "",
        "ticket",
        tuple(shown),
        tuple(
            (
                f"{criterion}, p={p}",
                tuple(_cell(row[name]) if name in row else ABSENT for name in shown),
            )
            for (_, criterion, p), row in lines
        ),
    )


def _shown(rows: Iterable[Row]) -> list[Structure]:
    found = {name for row in rows for name in row}
    return [name for name in STRUCTURES if name in found]


def _cell(rival: Rival) -> Cell:
    costs = (
        f"{rival.params:,.0f} parameters",
        f"{rival.macs:,.0f} MACs",
        f"latency {_share(rival.latency_ratio)}",
        f"training {_share(rival.seconds_ratio)}",
    )
    verdict = rival.verdict
    if verdict is None:
        return Cell("not judged", costs)
    low, high = verdict.interval or (None, None)
    interval = "no interval" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    seeds = len(verdict.differences)
    said = f"{verdict.verdict}, {seeds} seed{'' if seeds == 1 else 's'}"
    return Cell(f"{verdict.mean:+.2f}", (interval, said, *costs))


def _share(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}x dense"


# --- what the figures say -------------------------------------------------------------------------


def _sentences(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(filter(None, (_on_loss(rows), _on_latency(rows))))


def _on_loss(rows: Sequence[Row]) -> str:
    """Say which structure loses least where all are judged, and whether intervals part them."""
    names = _shown(rows)
    judged = [
        {name: verdict for name in names if name in row and (verdict := row[name].verdict)}
        for row in rows
    ]
    full = [verdicts for verdicts in judged if len(verdicts) == len(names)]
    if not full or len(names) < 2:
        return ""
    means = {name: statistics.fmean(v[name].mean for v in full) for name in names}
    best = max(names, key=lambda name: means[name])
    figures = ", ".join(f"{name} {means[name]:+.2f}" for name in names)
    tickets = f"{len(full)} ticket{'' if len(full) == 1 else 's'} of each structure"
    apart = sum(_is_apart(verdicts, best) for verdicts in full)
    unknown = sum(any(v.interval is None for v in verdicts.values()) for verdicts in full)
    tied = [name for name in names if round(means[name], 2) == round(means[best], 2)]
    first = f"{' and '.join(tied)} come out best{', equal' if len(tied) > 1 else ''}"
    if unknown == len(full):
        return (
            f"Mean difference to dense over {tickets}, in points: {figures}. {first.capitalize()}; "
            "without intervals nothing says that this is more than chance."
        )
    return (
        f"Mean difference to dense over {tickets}, in points: {figures}. {first.capitalize()}. In "
        f"{apart} of {len(full)} cases the interval of {best} lies wholly above those of all "
        f"others{'' if apart else ', so no case tells the structures apart'}."
    )


def _is_apart(verdicts: dict[Structure, VerdictRecord], best: Structure) -> bool:
    mine = verdicts[best].interval
    others = [verdict.interval for name, verdict in verdicts.items() if name != best]
    return mine is not None and all(other is not None and mine[0] > other[1] for other in others)


def _on_latency(rows: Sequence[Row]) -> str:
    """Say whether the measured latency falls as MACs do."""
    words = []
    for name in _shown(rows):
        found = [
            (rival.macs_ratio, rival.latency_ratio)
            for row in rows
            if (rival := row.get(name))
            and rival.macs_ratio is not None
            and rival.latency_ratio is not None
        ]
        if not found:
            continue
        macs, latency = (statistics.fmean(values) for values in zip(*found, strict=True))
        gap = latency - macs
        verdict = "follows" if abs(gap) <= CLOSE else "stays above" if gap > 0 else "falls below"
        words.append(f"{name} {macs:.2f}x MACs and {latency:.2f}x latency ({verdict})")
    if not words:
        return ""
    return (
        f"Means, as shares of dense: {'; '.join(words)}. Latency follows MACs where the two lie "
        f"within {CLOSE:g} of one another."
    )


# --- charts ---------------------------------------------------------------------------------------


def _charts(cases: Cases, rows: dict[Key, Row]) -> tuple[Figure, ...]:
    criteria = dict.fromkeys(criterion for _, criterion, _ in rows)
    losses = [
        _loss_chart(cases, str(name), {k[2]: row for k, row in rows.items() if k[1] == name})
        for name in criteria
    ]
    return (*losses, *_latency_chart(list(rows.values())))


def _loss_chart(cases: Cases, criterion: str, rows: dict[int, Row]) -> Figure:
    names = _shown(rows.values())
    found = {
        name: [(p, v) for p in sorted(rows) if name in rows[p] and (v := rows[p][name].verdict)]
        for name in names
    }
    xi = cases.record.xi_points
    verdicts = [verdict for points in found.values() for _, verdict in points]
    seeds = [d for verdict in verdicts for d in verdict.differences.values()]
    plot = Plot(
        f"{criterion}: difference to dense",
        x=(min(rows) - 0.5, max(rows) + 0.5),
        y=span_of([0, -xi, *seeds]),
        x_title="blocks that go, or as much of another structure",
        y_title="difference to dense, points",
        whole_x=True,
    )
    plot.band(-xi, 0, "tolerance")
    plot.level(0, "dense")
    for place, (name, points) in enumerate(found.items()):
        css, shift = _css(name), 8.0 * (place - (len(found) - 1) / 2)
        plot.line([(plot.x(p) + shift, plot.y(v.mean)) for p, v in points], f"line {css}")
        for p, verdict in points:
            if verdict.interval is not None:
                plot.upright(p, verdict.interval, f"line {css}", shift)
            said = f"{name}, p={p}: {verdict.mean:+.2f} points, {verdict.verdict}"
            plot.dot(p, verdict.mean, f"mark {css}", said=said, shift=shift)
    legend = tuple((_css(name), name) for name in names)
    return Figure(criterion, plot.svg(), (("grey dense", "dense"), *legend))


def _latency_chart(rows: Sequence[Row]) -> tuple[Figure, ...]:
    points = [
        (name, rival, rival.macs_ratio, rival.latency_ratio)
        for row in rows
        for name, rival in row.items()
        if rival.macs_ratio is not None and rival.latency_ratio is not None
    ]
    if not points:
        return ()
    reach = max(1.0, *(x for *_, x, _ in points), *(y for *_, y in points)) * 1.05
    plot = Plot(
        "Measured latency against MACs",
        x=(0, reach),
        y=(0, reach),
        x_title="MACs, share of dense",
        y_title="latency, share of dense",
    )
    plot.curve([(0, 0), (reach, reach)], "dense")
    for name, rival, macs, latency in points:
        said = f"{rival.case.label()}: {macs:.2f}x MACs, {latency:.2f}x latency"
        plot.dot(macs, latency, f"mark {_css(name)}", said=said)
    legend = tuple((_css(name), name) for name in _shown(rows))
    title = "Measured latency against MACs; on the dashed line it follows them"
    return (Figure(title, plot.svg(), legend),)


def _css(structure: Structure) -> str:
    return f"k{STRUCTURES.index(structure)} ticket"
