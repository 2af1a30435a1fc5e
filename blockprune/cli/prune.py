"""``blockprune prune``: cut the least important blocks and write the ticket."""

from __future__ import annotations

from pathlib import Path

from blockprune.cli.models import ModelSource
from blockprune.cli.output import count, print_json, print_line, print_table, working
from blockprune.cli.recover import Recovery, accuracies, images_for, print_recovery, recovered
from blockprune.cli.tickets import Recipe, Workbench
from blockprune.costs import model_costs
from blockprune.errors import TicketError
from blockprune.plan import Budget
from blockprune.recovery import recovery_of
from blockprune.tickets import save_ticket

__all__ = ["check_out", "run"]


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output path before any work: what exists, what has no folder.

    Raises:
        TicketError: ``out`` exists and ``force`` is off, or it cannot be a file.
    """
    if out.is_dir():
        raise TicketError(f"{out} is a folder; give --out the name of a file.")
    if out.exists() and not force:
        raise TicketError(f"{out} exists; pass --force to replace it, or give another --out.")
    if not out.absolute().parent.is_dir():
        raise TicketError(
            f"{out.absolute().parent} is no folder; create it, or give another --out."
        )


def run(
    source: ModelSource,
    recipe: Recipe,
    budget: int | float | Budget,
    out: Path,
    *,
    force: bool = False,
    as_json: bool = False,
    recovery: Recovery | None = None,
) -> None:
    """Prune a model, write the ticket and print what went.

    Args:
        source: the model and its inputs.
        recipe: how the blocks are chosen.
        budget: a count or a share of the removable blocks, or what may be left of the model.
        out: the ticket file.
        force: replace ``out`` where it exists.
        as_json: print JSON in place of tables.
        recovery: how to make up for what has gone, None for not at all.
    """
    with working(f"Pruning {source.spec} ..."):
        model, inputs = source.load()
        images = None
        if recovery is not None:
            images = images_for(recipe.data, inputs, root=recipe.data_root, seed=recipe.seed)
        bench = Workbench(model, inputs, recipe, [budget])
        [plan] = bench.plans
        ticket = bench.cut(plan)
        accuracy = accuracies(images, dense=model, cut=ticket) if images is not None else {}
    if images is not None and recovery is not None:
        recovered(ticket, model, images, recovery)
        accuracy |= accuracies(images, recovered=ticket)
    with working("Writing ..."):
        record = recovery_of(ticket)
        dense_costs = model_costs(model, inputs)
        ticket_costs = model_costs(ticket, inputs)
        save_ticket(ticket, out, overwrite=force)
    if as_json:
        print_json(
            {
                "model": source.spec,
                "out": str(out),
                "plan": plan.model_dump(mode="json"),
                "dense": {"params": dense_costs.params, "macs": dense_costs.macs},
                "ticket": {"params": ticket_costs.params, "macs": ticket_costs.macs},
                "recovery": record and record.model_dump(mode="json"),
                "accuracy": accuracy,
            }
        )
        return
    removable = len(bench.analysis.blocks)
    print_line(f"{source.spec}: {len(plan.remove)} of {removable} blocks removed")
    gone = set(plan.remove)
    rows = [(name, f"{plan.scores[name]:.4g}") for name in bench.analysis.names if name in gone]
    if rows:
        header = f"{plan.criterion} score"
        print_table(("block", header), rows, numeric=(header,))
    print_line(f"parameters {count(dense_costs.params)} -> {count(ticket_costs.params)}")
    print_line(f"MACs       {count(dense_costs.macs)} -> {count(ticket_costs.macs)}")
    print_line("The cut was verified against the dense model")
    if record is not None:
        print_recovery(record, accuracy)
    print_line(f"Written to {out}")
