"""Pictures of a run: the blocks with their scores and what was cut, and maps of similarity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from blockprune.lottery.record import BlockRecord, NetworkRecord, SimilarityRecord, VerdictRecord
from blockprune.lottery.steps import Step
from blockprune.report.cases import INITIALISATION, Cases
from blockprune.report.heat import MAP_CELL, depth_of, draw_heat, longest, shortened, write_below
from blockprune.report.svg import WIDTH, Drawing, Figure, Span

__all__ = ["block_pictures", "interval_picture", "similarity_map"]

CELL = 20
LABELS = 44
SCORES, STRIP, ROW = 72, 18, 18
DECADES = 30
"""Scores that span more than this factor are drawn by their logarithm, with their sign."""

FOREST_WIDTH, FOREST_HEIGHT = 170, 26


# --- blocks ---------------------------------------------------------------------------------------


def block_pictures(cases: Cases) -> tuple[Figure, ...]:
    """Return, for each criterion and moment of scoring, the blocks, their scores, what was cut.

    Scores are means over seeds. A cell is the fuller, the larger the share of the networks in which
    its block went.
    """
    record = cases.record
    scored: dict[tuple[str, Step], list[dict[str, float]]] = {}
    for table in record.scores:
        scored.setdefault((table.criterion, table.scored_at), []).append(table.scores)
    figures = []
    for (criterion, moment), tables in scored.items():
        cut = [
            network
            for network in record.networks
            if (network.case.kind, network.case.structure) == ("ticket", "blocks")
            and (network.case.criterion, network.case.scored_at) == (criterion, moment)
        ]
        when = "initialisation" if moment == INITIALISATION else str(moment)
        title = f"{criterion}, scored at {when}"
        figures.append(_block_picture(record.blocks, title, _means(tables), _shares(cut)))
    controls = (n for n in record.networks if n.case.kind == "random")
    chance = [network for network in controls if network.case.structure == "blocks"]
    if chance:
        figures.append(_block_picture(record.blocks, "random control", {}, _shares(chance)))
    return tuple(figures)


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {
        name: sum(table[name] for table in tables if name in table) / len(tables)
        for name in tables[0]
    }


def _shares(networks: Iterable[NetworkRecord]) -> dict[str, dict[str, float]]:
    """Return, for each number of blocks removed, the share of the networks each is gone from."""
    ordered = sorted(networks, key=lambda network: (network.case.p, network.case.schedule))
    shares: dict[str, dict[str, float]] = {}
    for (p, schedule), group in groupby(ordered, key=lambda n: (n.case.p, n.case.schedule)):
        found = [network.removed for network in group]
        names = {name for removed in found for name in removed}
        label = f"p={p}" + {"one-shot": "", "iterative": " it."}.get(schedule, f" {schedule}")
        shares[label] = {
            name: sum(name in removed for removed in found) / len(found) for name in names
        }
    return shares


def _block_picture(
    blocks: Sequence[BlockRecord],
    title: str,
    scores: Mapping[str, float],
    shares: Mapping[str, Mapping[str, float]],
) -> Figure:
    top = SCORES + 12 if scores else 4
    foot = top + STRIP + ROW * len(shares)
    names = [block.name for block in blocks]
    width = max(WIDTH, LABELS + CELL * len(blocks) + 8)
    drawing = Drawing(f"Blocks, {title}", width, foot + depth_of(names))
    if scores:
        _draw_scores(drawing, blocks, scores)
    _draw_stages(drawing, blocks, top)
    for row, (label, gone) in enumerate(shares.items()):
        y = top + STRIP + ROW * row
        drawing.text(LABELS - 5, y + 13, label, "tick end")
        for place, block in enumerate(blocks):
            _draw_cell(drawing, block, LABELS + CELL * place, y, gone.get(block.name, 0.0), label)
    for place, block in enumerate(blocks):
        css = "tick end" if block.removable else "tick end faint"
        write_below(drawing, LABELS + CELL * (place + 0.5), foot, block.name, css)
    return Figure(title, drawing.svg(), width=width)


def _draw_scores(
    drawing: Drawing, blocks: Sequence[BlockRecord], scores: Mapping[str, float]
) -> None:
    heights = _heights(scores)
    low, high = min(0.0, *heights.values()), max(0.0, *heights.values())
    scale = SCORES / ((high - low) or 1.0)

    def y(height: float) -> float:
        return 6 + (high - height) * scale

    for place, block in enumerate(blocks):
        if block.name in heights:
            height = heights[block.name]
            drawing.add(
                "rect",
                "score",
                x=LABELS + CELL * place + 3,
                y=min(y(height), y(0)),
                width=CELL - 6,
                height=max(abs(height) * scale, 0.6),
                said=f"{block.name}: {scores[block.name]:.4g}",
            )
    end = LABELS + CELL * len(blocks)
    drawing.add("line", "axis", x1=LABELS, x2=end, y1=y(0), y2=y(0))
    for extreme in {max(scores.values()), min(scores.values())}:
        name = next(name for name, score in scores.items() if score == extreme)
        drawing.text(LABELS - 3, y(heights[name]) + 3, f"{extreme:.2g}", "small end")


def _heights(scores: Mapping[str, float]) -> dict[str, float]:
    sizes = sorted(abs(score) for score in scores.values() if score)
    if not sizes or sizes[-1] <= DECADES * sizes[0]:
        return dict(scores)
    return {
        name: math.copysign(math.log10(1 + abs(score) / sizes[0]), score)
        for name, score in scores.items()
    }


def _draw_stages(drawing: Drawing, blocks: Sequence[BlockRecord], top: float) -> None:
    place = 0
    for stage, group in groupby(blocks, key=lambda block: block.stage):
        members = list(group)
        width = CELL * len(members)
        shape = "x".join(map(str, members[0].shape))
        x = LABELS + CELL * place
        drawing.add(
            "rect",
            f"stage s{stage % 2}",
            x=x,
            y=top,
            width=width - 1,
            height=STRIP - 3,
            said=f"stage {stage}: {len(members)} blocks of {shape}",
        )
        if 5.5 * len(shape) < width:
            drawing.text(x + width / 2, top + 11.5, shape, "small middle")
        place += len(members)


def _draw_cell(
    drawing: Drawing, block: BlockRecord, x: float, y: float, share: float, label: str
) -> None:
    def draw(css: str, said: str, part: float = 1.0) -> None:
        height = (ROW - 2) * part
        foot = y + ROW - 1
        drawing.add("rect", css, x=x + 1, y=foot - height, width=CELL - 2, height=height, said=said)

    if not block.removable:
        draw("cell fixed", f"{block.name} stays: {block.reason}")
        return
    said = f"{block.name}, {label}: cut in {100 * share:.0f} % of the networks"
    draw("cell", said)
    if share:
        draw("cut", said, share)


# --- similarity -----------------------------------------------------------------------------------


def similarity_map(similarity: SimilarityRecord, removed: Iterable[str]) -> Figure:
    """Return the CKA of each block of the dense network with each of another, in hundredths."""
    gone = set(removed)
    rows, columns = similarity.rows, similarity.columns
    left, foot = 8 + round(longest(rows)), 4 + MAP_CELL * len(rows)
    width = max(WIDTH, left + MAP_CELL * len(columns) + 6)
    title = f"{similarity.case.label()}, seed {similarity.seed}"
    drawing = Drawing(f"CKA, {title}", width, foot + depth_of(columns))
    for row, (name, values) in enumerate(zip(rows, similarity.values, strict=True)):
        y = 4 + MAP_CELL * row
        css = "tick end lost" if name in gone else "tick end"
        drawing.text(left - 5, y + 13, shortened(name), css)
        for column, value in enumerate(values):
            said = f"dense {name}, other {columns[column]}: {value:.3f}"
            draw_heat(drawing, left + MAP_CELL * column, y, value, said)
    for column, name in enumerate(columns):
        write_below(drawing, left + MAP_CELL * (column + 0.5), foot, name, "tick end")
    return Figure(title, drawing.svg(), width=width)


# --- verdicts -------------------------------------------------------------------------------------


def interval_picture(verdict: VerdictRecord, span: Span, xi_points: float) -> Drawing:
    """Return mean, interval and seeds of one verdict on the scale that all of them share."""
    summary = f"mean {verdict.mean:+.2f} points"
    drawing = Drawing(summary, FOREST_WIDTH, FOREST_HEIGHT)
    low, high = span
    middle = FOREST_HEIGHT / 2

    def x(points: float) -> float:
        inside = min(max(points, low), high)
        return 4 + (FOREST_WIDTH - 8) * (inside - low) / (high - low)

    drawing.add(
        "rect",
        "tolerance",
        x=x(-xi_points),
        y=0,
        width=x(0) - x(-xi_points),
        height=FOREST_HEIGHT,
    )
    drawing.add("line", "axis", x1=x(0), x2=x(0), y1=0, y2=FOREST_HEIGHT)
    if verdict.interval is not None:
        start, end = verdict.interval
        drawing.add("line", "line ink", x1=x(start), x2=x(end), y1=middle, y2=middle)
        for cap in verdict.interval:
            if low <= cap <= high:
                drawing.add("line", "line ink", x1=x(cap), x2=x(cap), y1=middle - 5, y2=middle + 5)
    for seed, points in verdict.differences.items():
        said = f"seed {seed}: {points:+.2f}"
        drawing.add("circle", "seed ink", cx=x(points), cy=middle, r=2.2, said=said)
    drawing.add("circle", "mark ink", cx=x(verdict.mean), cy=middle, r=4, said=summary)
    return drawing
