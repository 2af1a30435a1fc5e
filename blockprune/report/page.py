"""A run as one HTML page: no script, no network, nothing beside it needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from itertools import product
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from blockprune.lottery.record import NetworkRecord, RunRecord, TicketCase, Verdict, VerdictRecord
from blockprune.report.cases import Cases
from blockprune.report.cautions import cautions
from blockprune.report.charts import cost_chart, curve_charts, depth_charts
from blockprune.report.findings import findings_section
from blockprune.report.levels import levels_section
from blockprune.report.masks import layers_section, overlap_section
from blockprune.report.paper import paper_tables, set_up_of
from blockprune.report.pictures import block_pictures, interval_picture, similarity_map
from blockprune.report.record_csv import csv_tables
from blockprune.report.robust import robustness_section
from blockprune.report.sections import Section
from blockprune.report.stability import stability_section
from blockprune.report.structures import STRUCTURES, structures_section
from blockprune.report.svg import Figure, Span, span_of

__all__ = ["counts_of", "environment", "model_name", "page_html", "resource"]

VERDICTS: tuple[Verdict, ...] = ("wins", "ties", "loses", "not enough seeds")

SECTIONS: tuple[Callable[[Cases], Section | None], ...] = (
    findings_section,
    structures_section,
    levels_section,
    layers_section,
    overlap_section,
    stability_section,
    robustness_section,
)
"""Those that a run has only where it found what they show."""

MAPS_IN_SIGHT = 4
"""Similarity maps shown at once; the others open on demand."""


def page_html(record: RunRecord) -> str:
    """Return the report of a run as an HTML page.

    Every picture is drawn inline and every style is inside; the page asks the browser to load
    nothing at all.
    """
    cases = Cases(record)
    page = environment().get_template("page.html.jinja")
    cost, cost_unit = cost_chart(cases)
    return page.render(
        record=record,
        style=Markup(resource("page.css")),
        model=model_name(record),
        cases=cases,
        dense=_dense_summary(cases),
        counts=counts_of(record),
        cautions=cautions(record),
        groups=_verdict_groups(cases),
        set_up=set_up_of(record),
        tables=paper_tables(record),
        depth=depth_charts(cases),
        cost=cost,
        cost_unit=cost_unit,
        blocks=block_pictures(cases),
        sections=[section for make in SECTIONS if (section := make(cases))],
        has_similarity=bool(cases.has_blocks or record.similarities),
        files=["results.json", *csv_tables(record)],
        alike=_alike(record),
        maps=_maps(cases),
        maps_in_sight=MAPS_IN_SIGHT,
        curves=curve_charts(cases),
        spec=json.dumps(record.model_dump(mode="json")["spec"], indent=2, ensure_ascii=False),
    )


def environment() -> Environment:
    """Return what turns the templates of this package into pages; all text is escaped."""
    environment = Environment(
        loader=FunctionLoader(resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "paper": _in_the_papers_form,
        "points": lambda value: f"{value:+.2f}",
        "interval": _interval,
        "percent": lambda share: f"{100 * share:.2f}",
        "grouped": lambda value: f"{value:,}",
        "lost": _lost,
        "slug": lambda verdict: str(verdict).replace(" ", "-"),
    }
    return environment


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return resources.files("blockprune.report").joinpath(name).read_text(encoding="utf-8")


def _in_the_papers_form(points: float) -> str:
    """Return a difference as the paper writes it; what rounds to nothing is no decline.

    Example:
        >>> from blockprune.report.page import _in_the_papers_form
        >>> _in_the_papers_form(0.4), _in_the_papers_form(-0.011), _in_the_papers_form(-0.001)
        ('(+) 0.40', '(-) 0.01', '(+) 0.00')
    """
    rounded = round(points, 2)
    return f"({'-' if rounded < 0 else '+'}) {abs(rounded):.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _lost(network: NetworkRecord) -> str:
    """Return what a network lacks."""
    words = [*network.removed]
    if network.narrowed:
        layers = ", ".join(f"{name}: {count}" for name, count in network.narrowed.items())
        words.append(f"{sum(network.narrowed.values())} filters ({layers})")
    if network.weights_left is not None and network.weights_total is not None:
        gone = network.weights_total - network.weights_left
        words.append(f"{gone:,} of {network.weights_total:,} weights")
    return " ".join(words)


def model_name(record: RunRecord) -> str:
    """Return what the spec calls the network."""
    model: Any = record.spec.get("model", "the dense network")
    name = model.get("name", "the dense network") if isinstance(model, dict) else model
    return str(name)


# --- summary --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dense:
    """The dense networks: mean accuracy and that of each seed, in percent, and their size."""

    mean: float
    seeds: tuple[tuple[int, float], ...]
    blocks: int
    params: int
    macs: int


def _dense_summary(cases: Cases) -> _Dense | None:
    if not cases.dense:
        return None
    first = cases.dense[0]
    seeds = tuple((network.seed, 100 * network.accuracy) for network in cases.dense)
    mean = sum(accuracy for _, accuracy in seeds) / len(seeds)
    return _Dense(mean, seeds, first.blocks, first.params, first.macs)


def counts_of(record: RunRecord) -> dict[str, dict[str, int]]:
    """Return, for tickets and each control, how many cases got each verdict."""
    counts: dict[str, dict[str, int]] = {}
    for kind, structure in product(("ticket", "random", "scratch"), STRUCTURES):
        found = Counter(
            v.verdict
            for v in record.verdicts
            if (v.case.kind, v.case.structure) == (kind, structure)
        )
        if found:
            name = _kind_name(kind, structure)
            counts[name] = {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}
    return counts


def _kind_name(kind: str, structure: str) -> str:
    if kind == "random":
        return f"random {structure}"
    name = "tickets" if kind == "ticket" else "from scratch"
    return name if structure == "blocks" else f"{name}, {structure}"


# --- verdicts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _VerdictRow:
    """One verdict as the page shows it."""

    label: str
    verdict: VerdictRecord
    picture: Markup
    control: VerdictRecord | None


def _verdict_groups(cases: Cases) -> tuple[tuple[str, tuple[_VerdictRow, ...]], ...]:
    """Return the verdicts on the tickets of each setting, and those on the controls."""
    record = cases.record
    of_blocks = [verdict for verdict in record.verdicts if verdict.case.structure == "blocks"]
    seeds = [d for verdict in of_blocks for d in verdict.differences.values()]
    span = span_of([0, -record.xi_points, *seeds], margin=0.15)
    tickets: dict[str, list[TicketCase]] = {}
    for setting, members in cases.settings():
        of_tickets = [case for case in members if case.kind == "ticket"]
        tickets.setdefault(f"Tickets {setting.title()}", []).extend(of_tickets)
    groups = {**tickets, "Controls": list(cases.controls)}
    rows = {title: _verdict_rows(cases, members, span) for title, members in groups.items()}
    return tuple((title, found) for title, found in rows.items() if found)


def _verdict_rows(
    cases: Cases, members: Iterable[TicketCase], span: Span
) -> tuple[_VerdictRow, ...]:
    return tuple(
        _VerdictRow(
            f"{case.criterion}, p={case.p}" if case.kind == "ticket" else case.label(),
            verdict,
            interval_picture(verdict, span, cases.record.xi_points).svg(),
            cases.random_of(case) if case.kind == "ticket" else None,
        )
        for case in members
        if (verdict := cases.verdict(case))
    )


# --- similarity -----------------------------------------------------------------------------------


def _alike(record: RunRecord) -> tuple[tuple[str, float, int], ...]:
    """Return, for each case, its label, the mean CKA of blocks of one name, and its seeds."""
    found: dict[TicketCase, list[float]] = {}
    for similarity in record.similarities:
        of_same = [
            similarity.values[similarity.rows.index(name)][place]
            for place, name in enumerate(similarity.columns)
            if name in similarity.rows
        ]
        usable = [value for value in of_same if math.isfinite(value)]
        if usable:
            found.setdefault(similarity.case, []).append(sum(usable) / len(usable))
    return tuple(
        (case.label(), sum(values) / len(values), len(values)) for case, values in found.items()
    )


def _maps(cases: Cases) -> tuple[Figure, ...]:
    """Return a map of each network, those of one seed beside one another."""
    removed = {(n.case, n.seed): n.removed for n in cases.record.networks}
    ordered = sorted(cases.record.similarities, key=lambda similarity: similarity.seed)
    return tuple(
        similarity_map(similarity, removed.get((similarity.case, similarity.seed), ()))
        for similarity in ordered
    )
