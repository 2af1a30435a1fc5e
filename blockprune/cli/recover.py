"""``blockprune recover``, and ``prune --recover``: a ticket that makes up for what it has lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockprune.cli.batches import scoring_batch
from blockprune.cli.models import ModelSource
from blockprune.cli.output import print_json, print_line, print_table, working
from blockprune.errors import RecoveryError
from blockprune.recovery import recover, recovery_of
from blockprune.surgery import RecoveryRecord
from blockprune.tickets import load_ticket, save_ticket
from blockprune.tracing import tensors_in

__all__ = ["images_of", "print_recovery", "run"]

BATCH = 64
"""Images of a batch; every fourth is held out."""


def images_of(
    data: str, inputs: Any, *, root: Path, samples: int, seed: int
) -> list[tuple[Tensor, None]]:
    """Return training images of a data set, as many of each class, in batches of mixed classes.

    Raises:
        RecoveryError: no data set is named.
        DataError: it is absent or damaged, or its images are not what the model reads.
    """
    batch = scoring_batch(
        data, tuple(tensors_in(inputs)), root=root, seed=seed, images_in_all=samples
    )
    if batch is None:
        raise RecoveryError(
            "Recovering needs images such as the network will see: name a data set with --data. "
            "In Python, blockprune.recover takes any data."
        )
    images = batch[0]
    # Neighbours are of one class; strided parts have some of each.
    count = max(1, len(images) // BATCH)
    return [(images[start::count], None) for start in range(count)]


def print_recovery(record: RecoveryRecord) -> None:
    """Print what was done for each gap."""
    print_line(f"recovered by {record.method}, from {record.samples} images")
    rows = [
        (
            ", ".join(gap.blocks),
            ", ".join(gap.weights) or "left: no linear operation reaches it",
            f"{gap.residual_before:.3f}",
            f"{gap.residual_after:.3f}",
        )
        for gap in record.gaps
    ]
    if rows:
        header = ("removed", "fitted", "residual", "recovered")
        print_table(header, rows, numeric=header[2:])


def run(
    ticket_file: Path,
    source: ModelSource,
    method: str,
    out: Path,
    *,
    data: str,
    data_root: Path,
    samples: int,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Recover a ticket file, write another one and print what was done.

    Args:
        ticket_file: what `prune` wrote.
        source: the dense model, with its trained weights.
        method: of `blockprune.recover`.
        out: the file of the recovered ticket.
        data, data_root, samples: the images that are read.
        force: replace ``out`` where it exists.
        as_json: print JSON in place of a table.
    """
    with working(f"Recovering {ticket_file} ..."):
        dense, inputs = source.load()
        ticket: nn.Module = load_ticket(dense, ticket_file)
        images = images_of(data, inputs, root=data_root, samples=samples, seed=source.seed)
        recover(ticket, dense, images, method, in_place=True)
        save_ticket(ticket, out, overwrite=force)
    record = recovery_of(ticket)
    assert record is not None
    if as_json:
        print_json({"out": str(out), "recovery": record.model_dump(mode="json")})
        return
    print_recovery(record)
    print_line(f"Written to {out}")
