"""Option texts to values, refused before any work is done. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from blockprune.plan import Budget

__all__ = [
    "LARGEST_BATCH",
    "TrainingOptions",
    "parse_asked",
    "parse_batches",
    "parse_beam_width",
    "parse_budget",
    "parse_budgets",
    "parse_shape",
    "parse_training",
]

LARGEST_BATCH = 65_536

SATURATED = "saturated"


def parse_budget(text: str) -> int | float:
    """Read ``-p``: a count (``3``) or a share of the removable blocks (``0.25``)."""
    try:
        return _count(int(text))
    except ValueError:
        pass
    try:
        share = float(text)
    except ValueError:
        raise _refused("-p", text, "a count such as 3, or a share such as 0.25") from None
    if math.isnan(share) or not 0 <= share <= 1:
        raise _refused("-p", text, "a share between 0 and 1, or a count without a decimal point")
    return share


def _count(count: int) -> int:
    if count < 0:
        raise _refused("-p", str(count), "a count of 0 or more")
    return count


def parse_budgets(text: str) -> tuple[int | float, ...]:
    """Read a list of budgets such as ``1,3,0.5``, each once, in the order given."""
    budgets = [parse_budget(part.strip()) for part in text.split(",")]
    # 1 is one block, 1.0 all of them, and the two are equal: the text keeps them apart.
    return tuple({str(budget): budget for budget in budgets}.values())


def parse_asked(
    p: str | None,
    keep_macs: str | None,
    keep_params: str | None,
    max_latency_ms: str | None,
    *,
    default: str | None = None,
) -> tuple[int | float | Budget, ...]:
    """Read the one option that says how much is to go: one budget, or several such as ``0.8,0.5``.

    Args:
        p, keep_macs, keep_params, max_latency_ms: texts of the options.
        default: of ``-p`` where none is given; None: one must be.
    """
    options = {
        "-p": p,
        "--keep-macs": keep_macs,
        "--keep-params": keep_params,
        "--max-latency-ms": max_latency_ms,
    }
    given = {option: text for option, text in options.items() if text is not None}
    if not given and default is not None:
        given = {"-p": default}
    if len(given) != 1:
        found = f"{' and '.join(given)} are {len(given)}" if given else "none is given"
        raise typer.BadParameter(f"Give one of {', '.join(options)}: {found}.")
    [(option, text)] = given.items()
    if option == "-p":
        return parse_budgets(text)
    budgets = [_limit(option, part.strip()) for part in text.split(",")]
    return tuple({str(budget): budget for budget in budgets}.values())


def _limit(option: str, text: str) -> int | float | Budget:
    # Only where it is needed: what checks a plan takes a while to import.
    from blockprune.errors import PlanError
    from blockprune.plan import budget_asked_for

    kind = option.lstrip("-").replace("-", "_")
    try:
        number: int | float = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            raise _refused(option, text, "a number") from None
    try:
        return budget_asked_for(**{kind: number})
    except PlanError as error:
        raise typer.BadParameter(f"{option} {text!r} is not valid: {error}") from error


def parse_beam_width(schedule: str, width: int | None) -> int | None:
    """Return ``--beam-width``; refuse one without a beam."""
    if width is not None and schedule != "beam":
        raise typer.BadParameter("--beam-width says how wide a beam is: add --schedule beam.")
    return width


def parse_batches(text: str) -> tuple[int | None, ...]:
    """Read a list of batch sizes such as ``1,8``, each once, in the order given.

    None stands for the word ``saturated``: where throughput stops growing.
    """
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != SATURATED]
    wanted = f"batch sizes such as 1,8, or {SATURATED}"
    sizes = _integers("--batch", ",".join(named), wanted) if named else ()
    for size in sizes:
        if not 1 <= size <= LARGEST_BATCH:
            raise _refused("--batch", text, f"sizes between 1 and {LARGEST_BATCH}")
    return tuple({part: None if part == SATURATED else int(part) for part in parts}.values())


@dataclass(frozen=True)
class TrainingOptions:
    """What is asked of training; None where the default is.

    Attributes:
        batch: samples a step.
        epoch_samples: samples of one epoch.
        watts: of the device.
        grid: kg of CO2 for a kWh.
        meter_energy: in place of the formula with the watts.
    """

    batch: int | None
    epoch_samples: int | None
    watts: float | None
    grid: float | None
    meter_energy: bool


def parse_training(
    train: bool,
    *,
    batch: int | None,
    epoch_samples: int | None,
    watts: float | None,
    grid: float | None,
    meter_energy: bool,
) -> TrainingOptions | None:
    """Return the options of training, None without ``--train``; refuse those without meaning."""
    asked = {
        "--train-batch": batch,
        "--epoch-samples": epoch_samples,
        "--watts": watts,
        "--grid": grid,
        "--meter-energy": meter_energy or None,
    }
    given = [option for option, value in asked.items() if value is not None]
    if given and not train:
        raise typer.BadParameter(f"{' and '.join(given)} say how to train: add --train.")
    if watts is not None and meter_energy:
        raise typer.BadParameter("--watts are for the formula, --meter-energy is in its place.")
    if watts is not None and not (math.isfinite(watts) and watts > 0):
        raise _refused("--watts", f"{watts:g}", "a number above 0")
    if grid is not None and not (math.isfinite(grid) and grid >= 0):
        raise _refused("--grid", f"{grid:g}", "a number from 0 on, such as 0.432")
    return TrainingOptions(batch, epoch_samples, watts, grid, meter_energy) if train else None


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``1,3,224,224``."""
    sizes = _integers("--input-shape", text, "positive sizes such as 1,3,224,224")
    if any(size < 1 for size in sizes):
        raise _refused("--input-shape", text, "positive sizes such as 1,3,224,224")
    return sizes


def _integers(option: str, text: str, wanted: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise _refused(option, text, wanted) from None


def _refused(option: str, text: str, wanted: str) -> typer.BadParameter:
    return typer.BadParameter(f"{option} {text!r} is not valid: give {wanted}.")
