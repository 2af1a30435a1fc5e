"""A benchmark as a picture: what is left of each cost, ticket by ticket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from blockprune.report.bench import BenchResult, NetworkFigures
from blockprune.whole_files import whole_file

__all__ = ["plot_bench"]

DPI = 150
SPREAD = 0.6
"""Of the height of a row, what the tickets in it take."""

Share = tuple[str, float, tuple[float, float] | None]


def plot_bench(result: BenchResult, path: str | Path) -> None:
    """Draw what each ticket costs in % of the dense network, and write it as a PNG.

    A row is one cost, a dot one ticket, with whiskers where there is an interval; the dashed line
    is the dense network.

    Raises:
        BlockpruneError: it cannot be written.
    """
    tickets = result.networks[1:]
    shares = [list(_shares(ticket, result)) for ticket in tickets]
    labels = [label for label, _, _ in shares[0]] if shares else []
    figure = Figure(
        figsize=(7.5, 1.6 + 0.12 * len(labels) * (2 + len(tickets))), layout="constrained"
    )
    axes = figure.add_subplot()
    # Light to dark in the order of the tickets: told apart with every kind of colour blindness.
    colours = colormaps["viridis_r"]
    for position, (ticket, found) in enumerate(zip(tickets, shares, strict=True)):
        offset = SPREAD * ((position + 0.5) / len(tickets) - 0.5)
        axes.errorbar(
            [share for _, share, _ in found],
            [row + offset for row in range(len(found))],
            xerr=_whiskers(found),
            fmt="o",
            color=colours((position + 1) / (len(tickets) + 0.5)),
            capsize=2,
            label=ticket.name,
        )
    axes.axvline(100, color="#333333", linewidth=1, linestyle="--", label="dense")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    # A whisker that leaves the picture says enough; it must not squeeze the dots together.
    axes.set_xlim(0, 1.1 * max([100, *(share for found in shares for _, share, _ in found)]))
    axes.grid(axis="x", color="#dfe4ea")
    axes.set_axisbelow(True)
    axes.set_xlabel("% of the dense network")
    figure.suptitle(f"{result.model} on {result.device}: what is left of each cost")
    figure.legend(loc="outside right upper", fontsize=8)
    with whole_file(path) as file:
        figure.savefig(file, dpi=DPI, format="png")


def _shares(ticket: NetworkFigures, result: BenchResult) -> Iterator[Share]:
    yield "parameters", 100 - ticket.params_saved_percent, None
    yield "MACs", 100 - ticket.macs_saved_percent, None
    for memory in ticket.memory:
        yield f"memory, batch {memory.batch}", memory.percent, None
    for latency in ticket.latency:
        yield f"latency, batch {latency.batch}", latency.percent, latency.percent_interval
    training = ticket.training
    if training is None or result.training is None:
        return
    yield f"training memory, batch {training.batch}", training.memory.percent, None
    yield f"training time, batch {training.batch}", training.percent, training.percent_interval
    # By formula it is the time once more.
    if result.training.watts is None:
        yield "CO2", training.co2_percent, None


def _whiskers(shares: list[Share]) -> list[list[float]]:
    """Return the lengths to the left and to the right of each dot, 0 without an interval."""
    ends = [(share, interval or (share, share)) for _, share, interval in shares]
    return [[share - low for share, (low, _) in ends], [high - share for share, (_, high) in ends]]
