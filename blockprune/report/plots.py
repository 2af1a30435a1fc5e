"""Two pictures of an experiment: accuracy against depth, and which blocks went."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from blockprune.lottery.results import ExperimentResult

__all__ = ["plot_accuracy", "plot_blocks"]

# Blue and orange stay apart for every common kind of colour blindness.
WINS, LOSES, SPARED, KEPT, DENSE = "#0072b2", "#d55e00", "#b8c0c8", "#dfe4ea", "#333333"
DPI = 150


def plot_accuracy(result: ExperimentResult, path: str | Path) -> None:
    """Draw test accuracy against the residual blocks left, and write it as a PNG.

    The band below the dense accuracy is ``xi`` high: a ticket in or above it wins.
    """
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    dense = 100 * result.dense.accuracy
    axes.axhspan(dense - result.xi_points, dense, color=WINS, alpha=0.12, linewidth=0)
    axes.axhline(dense, color=DENSE, linewidth=1, linestyle="--")
    networks = (result.dense, *result.tickets)
    axes.plot(
        [network.blocks for network in networks],
        [100 * network.accuracy for network in networks],
        color="#9aa5b1",
        linewidth=1,
        zorder=2,
    )
    axes.plot(result.dense.blocks, dense, "s", color=DENSE, markersize=8, zorder=3)
    for ticket, comparison in zip(result.tickets, result.comparisons, strict=True):
        marker, colour = ("o", WINS) if comparison.winning else ("X", LOSES)
        accuracy = 100 * ticket.accuracy
        axes.plot(ticket.blocks, accuracy, marker, color=colour, markersize=9, zorder=3)
        axes.annotate(
            f"p={ticket.p}\n{comparison.difference_points:+.2f}",
            (ticket.blocks, accuracy),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
        )
    axes.margins(x=0.08, y=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_xaxis()  # left to right: deeper to shallower, as p grows
    axes.set_xlabel("residual blocks left")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{result.model} and its {result.criterion} tickets on {result.data}")
    axes.legend(
        handles=[
            Line2D([], [], marker="s", linestyle="--", color=DENSE, label="dense"),
            Patch(color=WINS, alpha=0.12, label=f"within xi = {result.xi_points:g} of dense"),
            Line2D([], [], marker="o", linestyle="", color=WINS, label="winning ticket"),
            Line2D([], [], marker="X", linestyle="", color=LOSES, label="losing ticket"),
        ],
        loc="best",
        fontsize=8,
    )
    figure.savefig(path, dpi=DPI, format="png")


def plot_blocks(result: ExperimentResult, path: str | Path) -> None:
    """Draw every block's score over the tickets that removed it, and write it as a PNG.

    A block kept although another with a higher score went owes that to the policy: it is
    protected, or its stage may lose no more.
    """
    names = list(result.scores)
    width = max(6.0, 0.45 * len(names) + 2)
    height = 3.6 + 0.3 * len(result.tickets)
    figure = Figure(figsize=(width, height), layout="constrained")
    scores, matrix = figure.subplots(
        2, 1, sharex=True, height_ratios=[2.2, 0.3 * max(3, len(result.tickets))]
    )
    _draw_scores(scores, result)
    _draw_removed(matrix, result, names)
    scores.set_title(f"{result.model} on {result.data}: {result.criterion} scores, blocks removed")
    figure.savefig(path, dpi=DPI, format="png")


def _draw_scores(axes: Axes, result: ExperimentResult) -> None:
    values = list(result.scores.values())
    removed = {name for ticket in result.tickets for name in ticket.removed}
    highest = max((result.scores[name] for name in removed), default=-math.inf)
    colours = [
        LOSES if name in removed else SPARED if score < highest else WINS
        for name, score in result.scores.items()
    ]
    axes.bar(range(len(values)), values, color=colours)
    sizes = sorted(abs(value) for value in values if value)
    if sizes and sizes[-1] > 30 * sizes[0]:
        # Scores of one network often span decades, and may have both signs.
        axes.set_yscale("symlog", linthresh=sizes[0])
    axes.axhline(0, color=DENSE, linewidth=0.8)
    axes.set_ylabel("score (low goes first)")
    axes.legend(
        handles=[
            Patch(color=LOSES, label="removed by a ticket"),
            Patch(color=WINS, label="kept for its score"),
            Patch(color=SPARED, label="kept by the policy"),
        ],
        fontsize=8,
    )


def _draw_removed(axes: Axes, result: ExperimentResult, names: list[str]) -> None:
    for row, ticket in enumerate(result.tickets):
        for column, name in enumerate(names):
            gone = name in ticket.removed
            axes.add_patch(
                Rectangle((column - 0.45, row - 0.42), 0.9, 0.84, color=LOSES if gone else KEPT)
            )
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(len(result.tickets) - 0.4, -0.6)
    axes.set_yticks(range(len(result.tickets)), [f"p={ticket.p}" for ticket in result.tickets])
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
