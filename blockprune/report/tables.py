"""Tickets against their dense network, as a table of at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from blockprune.lottery.results import Comparison, ExperimentResult, NetworkResult

__all__ = ["comparison_markdown", "comparison_table", "reading_notes"]

# Two lines each on a terminal, where width is scarce.
HEADERS = (
    "p",
    "removed blocks",
    "acc.\n%",
    "diff.\npts",
    "wins",
    "MACs\nsaved",
    "params",
    "latency\nms",
    "train\ns",
    "speed\nup",
)
REMOVED = HEADERS.index("removed blocks")


def comparison_table(result: ExperimentResult) -> Table:
    """Return one row for the dense network and one for each ticket, for a rich console.

    Winning tickets are green; the word in their column says the same without colour.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column, header in enumerate(HEADERS):
        if column == REMOVED:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row, comparison in _rows(result):
        style = "green" if comparison is not None and comparison.winning else None
        table.add_row(*row, style=style)
    return table


def comparison_markdown(result: ExperimentResult) -> str:
    """Return the same table as Markdown, one line a network."""
    lines = [
        "| " + " | ".join(header.replace("\n", " ") for header in HEADERS) + " |",
        "|" + "|".join(" :--- " if k == REMOVED else " ---: " for k in range(len(HEADERS))) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row, _ in _rows(result)]
    return "\n".join(lines) + "\n"


def reading_notes(result: ExperimentResult) -> tuple[str, ...]:
    """Return the sentences without which the table's figures cannot be read."""
    channels, height, width = result.image_shape
    first = ", ".join(result.protected) or "none"
    return (
        f"{result.model} on {result.data}: {result.train_images} training and "
        f"{result.test_images} test images of {channels}x{height}x{width}; MACs are for that "
        "shape.",
        f"Tickets: {result.criterion} scores of the untrained network (seed {result.seed}), the "
        f"p lowest blocks removed (protected: {first}; at least {result.min_blocks_per_stage} "
        f"blocks a stage stay), then {result.epochs} epochs in batches of {result.batch_size}, "
        "all networks alike.",
        f"acc.: test images right after the last epoch; one image is "
        f"{100 / result.test_images:.2f} points. diff.: points to dense. wins: diff. + xi >= 0 "
        f"with xi = {result.xi_points:g}.",
        f"latency: median time of one forward pass of {result.latency_batch_size} "
        f"images; speed up: of training, by train s. {result.device}, {result.threads} "
        f"{'thread' if result.threads == 1 else 'threads'}.",
        *_recovery_notes(result),
    )


def _recovery_notes(result: ExperimentResult) -> Iterator[str]:
    if (found := result.recovered) is not None:
        yield (
            f"cut {found.cut.p}: the trained dense network without its {found.cut.p} blocks of "
            f"lowest {found.criterion}, not trained again; {found.method} {found.cut.p}: its "
            f"weights fitted to {found.samples} training images in closed form, without labels; "
            "train s is what that took."
        )


def _rows(result: ExperimentResult) -> list[tuple[tuple[str, ...], Comparison | None]]:
    rows: list[tuple[tuple[str, ...], Comparison | None]] = [(_row(result.dense, None), None)]
    for ticket, comparison in zip(result.tickets, result.comparisons, strict=True):
        rows.append((_row(ticket, comparison), comparison))
    if result.recovered is not None:
        for label, network in (
            ("cut", result.recovered.cut),
            (result.recovered.method, result.recovered.recovered),
        ):
            rows.append((_untrained_row(label, network, result), None))
    return rows


def _untrained_row(label: str, network: NetworkResult, result: ExperimentResult) -> tuple[str, ...]:
    difference = 100 * (network.accuracy - result.dense.accuracy)
    return (
        f"{label} {network.p}",
        " ".join(network.removed),
        f"{100 * network.accuracy:.2f}",
        f"{difference:+.2f}",
        "",
        f"{100 * (1 - network.macs / result.dense.macs):.2f}%",
        f"{network.params:,}",
        f"{network.latency_ms:.2f}",
        f"{network.train_seconds:.1f}",
        "",
    )


def _row(network: NetworkResult, comparison: Comparison | None) -> tuple[str, ...]:
    return (
        str(network.p),
        "(dense)" if comparison is None else " ".join(network.removed),
        f"{100 * network.accuracy:.2f}",
        "" if comparison is None else f"{comparison.difference_points:+.2f}",
        "" if comparison is None else ("yes" if comparison.winning else "no"),
        "" if comparison is None else f"{comparison.macs_saved_percent:.2f}%",
        f"{network.params:,}",
        f"{network.latency_ms:.2f}",
        f"{network.train_seconds:.1f}",
        "" if comparison is None else f"{comparison.training_speed_up:.2f}x",
    )
