"""``blockprune recover``, and ``prune --recover``: a ticket that makes up for what it has lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, TextColumn
from torch import Tensor, nn

from blockprune.cli.batches import NamedImages
from blockprune.cli.models import ModelSource
from blockprune.cli.output import INTERRUPTED, print_json, print_line, print_table, working
from blockprune.cli.progress import Bar
from blockprune.errors import RecoveryError
from blockprune.recovery import Distillation, Progress, recover, recovery_of
from blockprune.surgery import RecoveryRecord
from blockprune.tickets import load_ticket, save_ticket
from blockprune.tracing import tensors_in

__all__ = ["Recovery", "accuracies", "images_for", "print_recovery", "recovered", "run"]

BATCH = 64
"""Images of a batch; every fourth is held out."""
CHANCES = 1.5
"""A network that is right not so many times as often as guessing has learned nothing."""
FITTED_TO = 512
"""Images that a closed form reads where nobody says how many."""


@dataclass(frozen=True)
class Recovery:
    """How a ticket is recovered.

    Attributes:
        method: of `blockprune.recover`.
        samples: how many training images are read; None: 512, or all for "distill".
        recipe: of "distill"; None for other methods.
        checkpoint: its file.
    """

    method: str
    samples: int | None = None
    recipe: Distillation | None = None
    checkpoint: Path | None = None


def images_for(data: str, inputs: Any, *, root: Path, seed: int) -> NamedImages:
    """Return the images of a data set.

    Raises:
        RecoveryError: no data set is named.
        DataError: it is absent or damaged, or its images are not what the model reads.
    """
    if data == "random":
        raise RecoveryError(
            "Recovering needs images such as the network will see: name a data set with --data. "
            "In Python, blockprune.recover takes any data."
        )
    return NamedImages(data, tuple(tensors_in(inputs)), root, seed)


def recovered(
    ticket: nn.Module, dense: nn.Module, images: NamedImages, recovery: Recovery
) -> nn.Module:
    """Return the ticket, recovered in place, and show how far it is."""
    bar = Bar(BarColumn(), TextColumn("{task.fields[loss]}"), only_on_terminals=True)
    bar.update(description=f"Recovering by {recovery.method}", loss="")
    reached: list[Progress] = []
    try:
        with bar:
            return recover(
                ticket,
                dense,
                _batches(images, recovery),
                recovery.method,
                in_place=True,
                recipe=recovery.recipe,
                checkpoint=recovery.checkpoint,
                on_progress=lambda progress: _show(bar, reached, progress),
            )
    except KeyboardInterrupt as error:
        step = f" at {reached[-1].done} of {reached[-1].total}" if reached else ""
        kept = "nothing was kept"
        if recovery.checkpoint is not None and recovery.checkpoint.exists():
            kept = f"the same command goes on from {recovery.checkpoint}"
        typer.echo(f"Interrupted{step}; {kept}.", err=True)
        raise typer.Exit(INTERRUPTED) from error


def _show(bar: Bar, reached: list[Progress], progress: Progress) -> None:
    reached[:] = [progress]
    loss = "" if progress.loss is None else f"loss {progress.loss:.4f}"
    bar.update(completed=progress.done, total=progress.total, loss=loss)


def _batches(images: NamedImages, recovery: Recovery) -> Iterable[tuple[Tensor, Tensor]]:
    if recovery.samples is None and recovery.method == "distill":
        return images.shuffled(BATCH)
    each = max(1, (recovery.samples or FITTED_TO) // images.data.num_classes)
    batch, labels = images.balanced(each)
    # Neighbours are of one class; strided parts have some of each.
    count = max(1, len(batch) // BATCH)
    return [(batch[start::count], labels[start::count]) for start in range(count)]


def accuracies(images: NamedImages, **models: nn.Module) -> dict[str, float]:
    """Return the share of the test images that each model recognises.

    Empty where their outputs are no scores of the classes of the data set.
    """
    found = {name: images.accuracy(model) for name, model in models.items()}
    shares = {name: share for name, share in found.items() if share is not None}
    chance = 1 / images.data.num_classes
    if shares.get("dense", 1) < CHANCES * chance:
        warnings.warn(
            f"the dense network recognises {100 * shares['dense']:.1f} % of the test images, about "
            "what guessing does. Give it its trained weights (--weights), and images as it was "
            "trained on (--input-shape).",
            UserWarning,
            stacklevel=2,
        )
    return shares


def print_recovery(record: RecoveryRecord, accuracy: Mapping[str, float]) -> None:
    """Print what was done for each gap, and what the networks recognise."""
    print_line(f"recovered by {record.method}, from {record.samples} images")
    unfitted = (
        "all are trained" if record.method == "distill" else "left: no linear operation reaches it"
    )
    rows = [
        (
            ", ".join(gap.blocks),
            ", ".join(gap.weights) or unfitted,
            f"{gap.residual_before:.3f}",
            f"{gap.residual_after:.3f}",
        )
        for gap in record.gaps
    ]
    if rows:
        header = ("removed", "weights", "residual", "after")
        print_table(header, rows, numeric=header[2:])
    if accuracy:
        shares = ((name, f"{100 * share:.1f}") for name, share in accuracy.items())
        print_table(
            ("network", "test accuracy in %"), list(shares), numeric=("test accuracy in %",)
        )


def run(
    ticket_file: Path,
    source: ModelSource,
    recovery: Recovery,
    out: Path,
    *,
    data: str,
    data_root: Path,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Recover a ticket file, write another one and print what was done.

    Args:
        ticket_file: what `prune` wrote.
        source: the dense model, with its trained weights.
        recovery: how.
        out: the file of the recovered ticket.
        data, data_root: the images that are read.
        force: replace ``out`` where it exists.
        as_json: print JSON in place of a table.
    """
    with working(f"Loading {ticket_file} ..."):
        dense, inputs = source.load()
        ticket: nn.Module = load_ticket(dense, ticket_file)
        images = images_for(data, inputs, root=data_root, seed=source.seed)
        # A ticket that is recovered already is no longer only cut.
        given = "cut" if recovery_of(ticket) is None else "ticket"
        accuracy = accuracies(images, **{"dense": dense, given: ticket})
    recovered(ticket, dense, images, recovery)
    with working("Measuring ..."):
        accuracy |= accuracies(images, recovered=ticket)
        save_ticket(ticket, out, overwrite=force)
    record = recovery_of(ticket)
    assert record is not None
    if as_json:
        print_json(
            {
                "out": str(out),
                "recovery": record.model_dump(mode="json"),
                "accuracy": accuracy,
            }
        )
        return
    print_recovery(record, accuracy)
    print_line(f"Written to {out}")
