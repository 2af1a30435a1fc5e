"""``blockprune bench``: a dense model and its tickets side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from blockprune.cli.measuring import DENSE, Request, SideBySide, Training
from blockprune.cli.models import ModelSource
from blockprune.cli.options import TrainingOptions
from blockprune.cli.output import (
    INTERRUPTED,
    plural,
    print_line,
    print_table,
    print_wrapped,
    shape_text,
    working,
)
from blockprune.cli.tickets import Recipe, Workbench
from blockprune.errors import BlockpruneError
from blockprune.plan import Budget
from blockprune.profiling import Execution, saturated_batch
from blockprune.profiling.energy import CPU_WATTS, GPU_WATTS, GRID_KG_PER_KWH, check_meter
from blockprune.profiling.samples import CONFIDENCE
from blockprune.report import (
    BenchResult,
    bench_notes,
    bench_tables,
    plot_bench,
)
from blockprune.report.bench import NetworkFigures, TrainingSettings
from blockprune.tracing import tensors_in
from blockprune.whole_files import write_whole

__all__ = ["Outputs", "check_device", "checked_request", "run"]

TRAIN_BATCH = 64

EPOCH_SAMPLES = 50_000
"""Of the training data of CIFAR-10, the papers' data set."""


@dataclass(frozen=True)
class Outputs:
    """Where the figures go.

    Attributes:
        out: a JSON file, written anew after each network; None: none.
        plot: a PNG file; None: none.
        force: replace files that exist.
        as_json: print JSON in place of tables.
    """

    out: Path | None = None
    plot: Path | None = None
    force: bool = False
    as_json: bool = False

    def check(self) -> None:
        """Refuse, before any work, files that exist, that are folders or that have none.

        Raises:
            typer.BadParameter: a file cannot be written, or would be replaced unasked.
        """
        for option, path in (("--out", self.out), ("--plot", self.plot)):
            if path is None:
                continue
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise typer.BadParameter(f"{option} {path} is no file in a folder that exists.")
            if path.exists() and not self.force:
                raise typer.BadParameter(
                    f"{option} {path} exists; pass --force to replace it, or give another name."
                )
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise typer.BadParameter(f"--plot {self.plot} must end in .png: that is what is drawn.")


def check_device(name: str) -> torch.device:
    """Return the device of a name, or refuse it before any work.

    Raises:
        typer.BadParameter: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # A build without the device raises AssertionError, an unknown name or index RuntimeError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise typer.BadParameter(f"--device {name!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise typer.BadParameter("--device 'meta' computes nothing, so there is nothing to time.")
    return device


def checked_request(
    device: torch.device,
    batches: tuple[int | None, ...],
    repeats: int,
    training: TrainingOptions | None,
    *,
    dtype: str | None,
    channels_last: bool,
    compiled: bool,
) -> Request:
    """Return what is measured, with the defaults of training; refuse what cannot be, at once.

    Raises:
        MeasurementError: compilation was asked for, and no compiler works.
        MissingExtraError: energy is to be metered, and codecarbon is not installed.
    """
    execution = Execution(
        channels_last=channels_last,
        dtype=getattr(torch, dtype) if dtype else None,
        compile=compiled,
    )
    execution.check(device)
    if training is not None and training.meter_energy:
        check_meter()
    how = None if training is None else _training(training, device)
    return Request(batches, repeats, device, execution, how)


def _training(options: TrainingOptions, device: torch.device) -> Training:
    usual = CPU_WATTS if device.type == "cpu" else GPU_WATTS
    watts = None if options.meter_energy else options.watts or usual
    return Training(
        batch=options.batch or TRAIN_BATCH,
        epoch_samples=options.epoch_samples or EPOCH_SAMPLES,
        watts=watts,
        grid_kg_per_kwh=GRID_KG_PER_KWH if options.grid is None else options.grid,
    )


def run(
    source: ModelSource,
    recipe: Recipe,
    budgets: Sequence[int | float | Budget],
    request: Request,
    outputs: Outputs,
) -> None:
    """Measure a dense model and one ticket a budget, and print them side by side.

    Ctrl-C ends it with what was measured so far, printed and written, and the exit code 130.

    Args:
        source: the model and its inputs.
        recipe: how blocks are chosen.
        budgets: one ticket each: a count or a share of the removable blocks, or what may be left.
        request: what is measured.
        outputs: where the figures go.

    Raises:
        typer.Exit: it was interrupted.
    """
    bench = _Bench(source, recipe, budgets, request, outputs)
    try:
        bench.measure()
    except KeyboardInterrupt as interrupt:
        bench.tell_unfinished()
        raise typer.Exit(INTERRUPTED) from interrupt
    except BlockpruneError:
        # One network too large for the device takes none of the others with it.
        if bench.has_tickets:
            bench.tell_unfinished()
        raise
    bench.show()


class _Bench:
    """One run of the command: what it has measured is a result at any time."""

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        budgets: Sequence[int | float | Budget],
        request: Request,
        outputs: Outputs,
    ) -> None:
        self._source = source
        self._recipe = recipe
        self._labels = [_label(budget) for budget in budgets]
        self._budgets = budgets
        self._request = request
        self._outputs = outputs
        self._result: BenchResult | None = None

    def measure(self) -> None:
        """Measure network after network; keep and write the result after each."""
        with working(f"Preparing {self._source.spec} ..."):
            model, inputs = self._source.load(self._request.device)
            bench = Workbench(model.eval(), inputs, self._recipe, self._budgets)
            batches = self._batches(model, inputs)
        with working(f"Measuring {DENSE} ..."):
            measured = SideBySide(model, inputs, batches, self._request)
            self._keep(measured.networks, inputs, bench.plans[0].criterion)
        for label, plan in zip(self._labels, bench.plans, strict=True):
            with working(f"Measuring {label} ..."):
                measured.add(label, plan.remove, bench.cut(plan))
                self._keep(measured.networks, inputs, plan.criterion)

    def show(self) -> None:
        """Print what was measured, and draw it where a plot was asked for."""
        result, outputs = self._result, self._outputs
        if result is None:
            return
        if outputs.plot is not None and self.has_tickets:
            plot_bench(result, outputs.plot)
        if outputs.as_json:
            typer.echo(result.to_json(), nl=False)
            return
        inputs = ", ".join(shape_text(shape) for shape in result.inputs)
        converted = f", {result.execution}" if result.execution else ""
        rounds = plural(result.repeats, "round")
        print_line(f"{result.model} on {result.device}{converted}, inputs {inputs}, {rounds}")
        for table in bench_tables(result):
            print_line("")
            print_table(table.headers, table.rows, numeric=table.headers[1:])
        print_line("")
        for note in bench_notes(result):
            print_wrapped(note)
        for path in filter(None, (outputs.out, outputs.plot if self.has_tickets else None)):
            print_line(f"Written to {path}")

    @property
    def has_tickets(self) -> bool:
        """Whether a ticket was measured."""
        return self._result is not None and len(self._result.networks) > 1

    def tell_unfinished(self) -> None:
        """Show what there is, and say on stderr what is missing."""
        self.show()
        if self._result is None:
            typer.echo("Unfinished: nothing was measured.", err=True)
            return
        names = [network.name for network in self._result.networks]
        missing = [label for label in self._labels if label not in names]
        where = f"; in {self._outputs.out}" if self._outputs.out else ""
        typer.echo(
            f"Unfinished: measured {', '.join(names)}{where}. Missing: {', '.join(missing)}.",
            err=True,
        )

    def _batches(self, model: nn.Module, inputs: Any) -> tuple[int, ...]:
        """Return the batch sizes, with the saturated one found where it is asked for."""
        sizes = []
        for size in self._request.batches:
            if size is None:
                found = saturated_batch(model, inputs, execution=self._request.execution)
                size = found.batch_size
            sizes.append(size)
        return tuple(dict.fromkeys(sizes))

    def _keep(
        self, networks: tuple[NetworkFigures, ...], inputs: Any, criterion: str | None
    ) -> None:
        request, training = self._request, self._request.training
        self._result = BenchResult(
            model=self._source.spec,
            inputs=tuple(tuple(tensor.shape) for tensor in tensors_in(inputs)),
            device=str(request.device),
            threads=torch.get_num_threads(),
            execution=str(request.execution),
            repeats=request.repeats,
            confidence=CONFIDENCE,
            criterion=criterion,
            granularity=self._recipe.granularity,
            training=None
            if training is None
            else TrainingSettings(
                batch=training.batch,
                epoch_samples=training.epoch_samples,
                watts=training.watts,
                grid_kg_per_kwh=training.grid_kg_per_kwh,
            ),
            complete=len(networks) == 1 + len(self._labels),
            networks=networks,
        )
        if self._outputs.out is not None:
            write_whole(self._outputs.out, self._result.to_json())


def _label(budget: int | float | Budget) -> str:
    return str(budget) if isinstance(budget, Budget) else f"p={budget}"
