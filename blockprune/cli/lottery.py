"""``blockprune lottery run``: a spec becomes a folder of results, whatever interrupts it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table

from blockprune.cli.output import INTERRUPTED
from blockprune.cli.progress import Bar
from blockprune.lottery.record import RunRecord, TicketCase, VerdictRecord
from blockprune.lottery.running import Event, run
from blockprune.lottery.suites import read_specs

__all__ = ["RunBar", "run_command", "verdict_table"]

STAGE_WIDTH = 48


def run_command(spec_file: Path, out: Path, data_dir: Path | None, executor: str, jobs: int) -> int:
    """Run what a file asks for, and print who wins.

    Args:
        spec_file: TOML, or JSON; with several [[runs]], each has a folder of its own in `out`.
        out: folder of the run; taken up where it was left.
        data_dir: folder of the data.
        executor: "local" or "dask://HOST:PORT".
        jobs: worker processes of "local".

    Returns:
        The exit code: 0; 1 where a stage failed; 130 after Ctrl-C.

    Raises:
        BlockpruneError: the spec cannot be carried out, or the folder not be used.
    """
    specs = read_specs(spec_file)
    command = f"blockprune lottery run {spec_file.name} --out {out.name}"
    if data_dir is not None:
        command += " --data-dir DATA"
    code = 0
    for spec in specs:
        folder = out if len(specs) == 1 else out / spec.name
        try:
            with RunBar() as bar:
                record = run(
                    spec,
                    folder,
                    executor=executor,
                    jobs=jobs,
                    data_dir=data_dir,
                    command=command,
                    on_event=bar.show,
                )
        except KeyboardInterrupt:
            typer.echo(
                f"Interrupted. What was done is kept in {out}: the same command goes on from "
                "there.",
                err=True,
            )
            return INTERRUPTED
        Console(highlight=False).print(verdict_table(record))
        typer.echo(f"\nWritten to {folder / 'results.json'}")
        for stage, error in record.failures.items():
            typer.echo(f"failed: {stage}: {error}", err=True)
        code = 1 if record.failures else code
    return code


def verdict_table(record: RunRecord) -> Table:
    """Return one row for the dense network and one for each case, for a rich console."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("network", overflow="fold")
    per_cent = f"{100 * record.confidence:g} %"
    for header in ("acc.\n%", "diff.\npts", f"interval\n{per_cent}", "over\nrandom"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    table.add_row("dense", _accuracy(record, TicketCase(kind="dense")), "", "", "", "")
    for verdict in record.verdicts:
        table.add_row(*_row(record, verdict), style="green" if verdict.verdict == "wins" else None)
    return table


def _row(record: RunRecord, verdict: VerdictRecord) -> tuple[str, ...]:
    low, high = verdict.interval or (None, None)
    return (
        verdict.case.label(),
        _accuracy(record, verdict.case),
        f"{verdict.mean:+.2f}",
        "" if low is None else f"{low:+.2f} {high:+.2f}",
        "" if verdict.against_random is None else f"{verdict.against_random:+.2f}",
        verdict.verdict,
    )


def _accuracy(record: RunRecord, case: TicketCase) -> str:
    found = [network.accuracy for network in record.networks if network.case == case]
    return f"{100 * sum(found) / len(found):.2f}" if found else "-"


class RunBar(Bar):
    """One bar over all stages of a run."""

    def __init__(self) -> None:
        super().__init__(BarColumn(bar_width=20), MofNCompleteColumn())

    def show(self, event: Event) -> None:
        """Say what is over."""
        text = event.stage
        if len(text) > STAGE_WIDTH:
            text = f"{text[: STAGE_WIDTH - 3]}..."
        self.update(description=text, completed=event.finished, total=event.total)
        if event.kind == "failed":
            self.print(f"failed: {event.stage}: {event.detail}")
