"""The commands and their options. What a command does lives in the module of its name."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from blockprune.cli.options import (
    LARGEST_BATCH,
    parse_asked,
    parse_batches,
    parse_beam_width,
    parse_shape,
    parse_training,
)
from blockprune.errors import BlockNotFoundError, BlockpruneError, ModelSpecError

__all__ = ["Data", "Granularity", "NumberFormat", "Ranking", "Schedule", "app", "main"]

# What was asked for does not exist: the command line is at fault, as for an unknown option.
USAGE_ERRORS = (BlockNotFoundError, ModelSpecError)


class Granularity(StrEnum):
    """What counts as one block."""

    branch = "branch"
    layer = "layer"
    layer_approx = "layer_approx"


class Ranking(StrEnum):
    """In which order blocks go, the lowest first."""

    score = "score"
    score_per_cost = "score_per_cost"


class Schedule(StrEnum):
    """How often blocks are scored."""

    one_shot = "one-shot"
    iterative = "iterative"
    beam = "beam"


class Data(StrEnum):
    """Where the batch that a criterion scores on comes from."""

    random = "random"
    # As blockprune.data.DATASETS has them, which takes torch to import.
    digits = "digits"
    mnist = "mnist"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    tiny_imagenet = "tiny-imagenet"
    imagenet = "imagenet"


class RecoveryMethod(StrEnum):
    """How a ticket makes up for the blocks it has lost."""

    # As blockprune.recovery.METHODS has them, which takes torch to import.
    norms = "norms"
    refit = "refit"
    map = "map"
    scale = "scale"
    moments = "moments"
    distill = "distill"


class NumberFormat(StrEnum):
    """What numbers a network is run with."""

    float16 = "float16"
    bfloat16 = "bfloat16"


class _Commands(TyperGroup):
    """Commands whose expected errors end as one sentence, and the others as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with _readable_warnings():
            try:
                return super().invoke(ctx)
            except BlockpruneError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2 if isinstance(error, USAGE_ERRORS) else 1) from error


@contextmanager
def _readable_warnings() -> Iterator[None]:
    """Print each warning once, as a sentence without the source line it came from."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if text not in shown:
            shown.add(text)
            typer.echo(f"warning: {text}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, rank and cut the residual blocks of a PyTorch model.",
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --version: all that a bug report needs.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    if version and verbose:
        from blockprune.cli.doctor import print_versions

        print_versions()
        raise typer.Exit
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"blockprune {version_of('blockprune')}")
        raise typer.Exit
    if verbose:
        raise typer.BadParameter("--verbose goes with --version.")
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, blockprune:NAME or package.module:factory.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        metavar="FILE",
        help="State dict: .safetensors, or a file for torch.load(weights_only=True). "
        "Without it the weights are random.",
    ),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SIZES",
        help="Input shape, batch first, such as 1,3,224,224; repeat it for several inputs.",
    ),
]
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        help="A block is one branch, or one whole layer; layer_approx: post-norm layers as well, "
        "with their norms, as an approximation."
    ),
]
Criterion = Annotated[
    str,
    typer.Option(
        "--criterion",
        "-c",
        metavar="NAME",
        help="See `blockprune criteria` for the names; or package.module:function, your own.",
    ),
]
DataOption = Annotated[
    Data, typer.Option(help="The batch to score on; random says nothing about a trained net.")
]
DataRoot = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The folder that holds the files of --data.")
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of random weights, inputs and criteria."),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Pattern of block names to keep, such as 'layer1.*'; may be repeated.",
    ),
]
MinBlocks = Annotated[
    int,
    typer.Option(
        "--min-blocks-per-stage", metavar="N", min=0, help="Residual blocks left in each stage."
    ),
]
KeepMacs = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="In place of -p: MACs that may be left, a share such as 0.5 or a number.",
    ),
]
KeepParams = Annotated[
    str | None,
    typer.Option(metavar="N", help="In place of -p: parameters that may be left, likewise."),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        "--max-latency-ms",
        metavar="MS",
        help="In place of -p: milliseconds that a ticket may take for the inputs.",
    ),
]
By = Annotated[
    Ranking, typer.Option(help="What the blocks that go are lowest in; costs are those budgeted.")
]
ScheduleOption = Annotated[
    Schedule,
    typer.Option(help="Score once, or again after each block that goes; beam: from several sets."),
]
BeamWidth = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Sets that a beam goes on from; default 3."),
]
MaxCache = Annotated[
    int | None,
    typer.Option(
        "--max-cache-bytes",
        metavar="N",
        min=0,
        help="What criteria that leave one block out may keep of a pass; default 1 GiB.",
    ),
]
PreserveRoot = Annotated[
    bool,
    typer.Option(
        "--preserve-root",
        help="Keep the class of the root module, and look into its children one by one.",
    ),
]
LeafModules = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Modules not to look into: a class name, or a pattern of qualified names such as "
        "'*.attn'; may be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Images that a recovery reads, about; default 512, and all for distill.",
    ),
]
Epochs = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Passes over the data of distill; default 1.")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="X", min=0, help="Highest rate of distill; default 0.001."),
]
LoraRank = Annotated[
    int | None,
    typer.Option(metavar="R", min=1, help="Distill adapters of this rank, and merge them."),
]
CheckpointFile = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="Where an interrupted distill goes on from."),
]


@app.command()
def analyze(
    model: Model,
    weights: Weights = None,
    input_shape: InputShape = None,
    granularity: GranularityOption = Granularity.branch,
    rejections: Annotated[
        bool, typer.Option("--rejections", help="Also print every merge refused, and why.")
    ] = False,
    why: Annotated[
        bool,
        typer.Option("--why", help="Also print the modules not looked into, and what to do."),
    ] = False,
    preserve_root: PreserveRoot = False,
    leaf_modules: LeafModules = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Print the residual blocks that can be removed from MODEL."""
    shapes = [parse_shape(text) for text in input_shape or []]
    from blockprune.cli.analyze import run
    from blockprune.cli.models import ModelSource

    source = ModelSource(model, weights, shapes, seed)
    run(
        source,
        granularity.value,
        preserve_root=preserve_root,
        leaf_modules=tuple(leaf_modules or ()),
        with_rejections=rejections,
        with_reasons=why,
        as_json=as_json,
    )


@app.command()
def prune(
    model: Model,
    p: Annotated[
        str | None,
        typer.Option("-p", metavar="P", help="Blocks to remove: 3, or a share such as 0.25."),
    ] = None,
    keep_macs: KeepMacs = None,
    keep_params: KeepParams = None,
    max_latency_ms: MaxLatency = None,
    by: By = Ranking.score,
    schedule: ScheduleOption = Schedule.one_shot,
    beam_width: BeamWidth = None,
    criterion: Criterion = "grasp",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ticket file.")] = Path(
        "ticket.safetensors"
    ),
    force: Force = False,
    protect: Protect = None,
    min_blocks_per_stage: MinBlocks = 0,
    granularity: GranularityOption = Granularity.branch,
    data: DataOption = Data.random,
    data_root: DataRoot = Path("data"),
    max_cache_bytes: MaxCache = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    preserve_root: PreserveRoot = False,
    leaf_modules: LeafModules = None,
    recover: Annotated[
        RecoveryMethod | None,
        typer.Option(help="Make up for what has gone, with images of --data."),
    ] = None,
    samples: Samples = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    lora_rank: LoraRank = None,
    checkpoint: CheckpointFile = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Remove the least important blocks of MODEL and write the ticket."""
    budgets = parse_asked(p, keep_macs, keep_params, max_latency_ms)
    if len(budgets) != 1:
        raise typer.BadParameter(f"One ticket has one budget, not {len(budgets)}.")
    shapes = [parse_shape(text) for text in input_shape or []]
    from blockprune.cli.criteria import criterion_named
    from blockprune.cli.models import ModelSource
    from blockprune.cli.prune import check_out, run
    from blockprune.cli.tickets import Recipe

    check_out(out, force=force)
    source = ModelSource(model, weights, shapes, seed)
    recipe = Recipe(
        criterion=criterion_named(criterion),
        granularity=granularity.value,
        data=data.value,
        data_root=data_root,
        protect=tuple(protect or ()),
        min_blocks_per_stage=min_blocks_per_stage,
        by=by.value,
        schedule=schedule.value,
        beam_width=parse_beam_width(schedule.value, beam_width),
        max_cache_bytes=max_cache_bytes,
        seed=seed,
        preserve_root=preserve_root,
        leaf_modules=tuple(leaf_modules or ()),
    )
    run(
        source,
        recipe,
        budgets[0],
        out,
        force=force,
        as_json=as_json,
        recovery=None
        if recover is None
        else _recovery(recover, samples, epochs, lr, lora_rank, checkpoint, seed),
    )


@app.command()
def recover(
    ticket: Annotated[Path, typer.Argument(metavar="TICKET", help="A ticket's file.")],
    model: Model,
    data: Annotated[Data, typer.Option(help="Images such as the network will see.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recovered ticket's file.")] = Path(
        "recovered.safetensors"
    ),
    method: Annotated[
        RecoveryMethod, typer.Option(help="What is fitted in front of each gap.")
    ] = RecoveryMethod.refit,
    force: Force = False,
    data_root: DataRoot = Path("data"),
    samples: Samples = None,
    epochs: Epochs = None,
    lr: LearningRate = None,
    lora_rank: LoraRank = None,
    checkpoint: CheckpointFile = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make up for the blocks that TICKET has lost of MODEL."""
    shapes = [parse_shape(text) for text in input_shape or []]
    from blockprune.cli.models import ModelSource
    from blockprune.cli.prune import check_out
    from blockprune.cli.recover import run

    check_out(out, force=force)
    run(
        ticket,
        ModelSource(model, weights, shapes, seed),
        _recovery(method, samples, epochs, lr, lora_rank, checkpoint, seed),
        out,
        data=data.value,
        data_root=data_root,
        force=force,
        as_json=as_json,
    )


def _recovery(
    method: RecoveryMethod,
    samples: int | None,
    epochs: int | None,
    lr: float | None,
    lora_rank: int | None,
    checkpoint: Path | None,
    seed: int,
) -> Any:
    given = {"--epochs": epochs, "--lr": lr, "--lora-rank": lora_rank, "--checkpoint": checkpoint}
    for option, value in given.items():
        if value is not None and method is not RecoveryMethod.distill:
            raise typer.BadParameter(f"{option} is for distill, and the method is {method.value}.")
    if lr == 0:
        raise typer.BadParameter("--lr is above 0.")
    from blockprune.cli.recover import Recovery
    from blockprune.recovery import Distillation

    recipe = None
    if method is RecoveryMethod.distill:
        recipe = Distillation(epochs=epochs or 1, lr=lr or 1e-3, lora_rank=lora_rank, seed=seed)
    return Recovery(method.value, samples, recipe, checkpoint)


@app.command()
def bench(
    model: Model,
    p: Annotated[
        str | None,
        typer.Option(
            "-p",
            metavar="P,...",
            help="Tickets to measure: 3, or several such as 1,3,0.5; default 1.",
        ),
    ] = None,
    keep_macs: KeepMacs = None,
    keep_params: KeepParams = None,
    max_latency_ms: MaxLatency = None,
    by: By = Ranking.score,
    schedule: ScheduleOption = Schedule.one_shot,
    beam_width: BeamWidth = None,
    batch: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            help="Batch sizes, such as 1,8; saturated: where throughput stops growing.",
        ),
    ] = "1",
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="Timed rounds.")
    ] = 30,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        NumberFormat | None,
        typer.Option(help="Run converted copies; in training, under autocast."),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Run copies with images channels last.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run copies by torch.compile.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Also measure training: time, memory, CO2.")
    ] = False,
    train_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=LARGEST_BATCH, help="Samples a step; default 64."),
    ] = None,
    epoch_samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples of an epoch; default 50000, as CIFAR-10."),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(
            metavar="W", help="Of the device, for CO2; default 300 on a GPU, 85 on a CPU."
        ),
    ] = None,
    grid: Annotated[
        float | None,
        typer.Option(metavar="KG", help="CO2 of the grid in kg for a kWh; default 0.432."),
    ] = None,
    meter_energy: Annotated[
        bool,
        typer.Option("--meter-energy", help="Meter the energy by codecarbon (extra carbon)."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A JSON file, written after each network."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A PNG file.")] = None,
    force: Force = False,
    criterion: Criterion = "grasp",
    protect: Protect = None,
    min_blocks_per_stage: MinBlocks = 0,
    granularity: GranularityOption = Granularity.branch,
    data: DataOption = Data.random,
    data_root: DataRoot = Path("data"),
    max_cache_bytes: MaxCache = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    preserve_root: PreserveRoot = False,
    leaf_modules: LeafModules = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure MODEL and its tickets side by side: MACs, parameters, latency, memory, training."""
    budgets = parse_asked(p, keep_macs, keep_params, max_latency_ms, default="1")
    batches = parse_batches(batch)
    shapes = [parse_shape(text) for text in input_shape or []]
    training = parse_training(
        train,
        batch=train_batch,
        epoch_samples=epoch_samples,
        watts=watts,
        grid=grid,
        meter_energy=meter_energy,
    )
    from blockprune.cli.bench import Outputs, check_device, checked_request, run
    from blockprune.cli.criteria import criterion_named
    from blockprune.cli.models import ModelSource
    from blockprune.cli.tickets import Recipe

    outputs = Outputs(out=out, plot=plot, force=force, as_json=as_json)
    outputs.check()
    request = checked_request(
        check_device(device),
        batches,
        repeats,
        training,
        dtype=dtype.value if dtype else None,
        channels_last=channels_last,
        compiled=compiled,
    )
    source = ModelSource(model, weights, shapes, seed)
    recipe = Recipe(
        criterion=criterion_named(criterion),
        granularity=granularity.value,
        data=data.value,
        data_root=data_root,
        protect=tuple(protect or ()),
        min_blocks_per_stage=min_blocks_per_stage,
        by=by.value,
        schedule=schedule.value,
        beam_width=parse_beam_width(schedule.value, beam_width),
        max_cache_bytes=max_cache_bytes,
        seed=seed,
        preserve_root=preserve_root,
        leaf_modules=tuple(leaf_modules or ()),
    )
    run(source, recipe, budgets, request, outputs)


@app.command()
def criteria(as_json: Json = False) -> None:
    """List the criteria that rank blocks."""
    from blockprune.cli.criteria import run

    run(as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Try every part of the installation, each extra too; say what works here."""
    from blockprune.cli.doctor import run

    raise typer.Exit(run(as_json=as_json))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")] = Path(
        "blockprune-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer epochs: seconds, not minutes.")
    ] = False,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Train a ResNet32 and its GraSP tickets on handwritten digits; print who wins."""
    from blockprune.cli.demo import demo_command

    raise typer.Exit(demo_command(out=out, quick=quick, seed=seed, force=force))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or its results.json.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the report goes; default: RUN/report."),
    ] = None,
    force: Force = False,
) -> None:
    """Write the report of a lottery run, or of each run in a folder: a page, and its tables."""
    from blockprune.cli.report import run as write

    write(run, out, force=force)


@app.command()
def robustness(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TICKET|RUN", help="A ticket's file, or the folder of a lottery run."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Test images; of a RUN its own, of a TICKET digits."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder that holds the data.")
    ] = None,
    attacks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="fgsm, pgd, deepfool, autoattack (extra attacks); none."
        ),
    ] = "none",
    corruptions: Annotated[
        str, typer.Option(metavar="NAME,...", help="Names; common (15), all (19) or none.")
    ] = "common",
    severities: Annotated[
        str, typer.Option(metavar="N,...", help="Of each corruption.")
    ] = "1,2,3,4,5",
    corruption_files: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="In --data-dir, such as CIFAR-10-C; default: made."),
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Another test set in --data-dir; repeatable."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images attacked; default all.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Worker processes, for a RUN.")
    ] = 1,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of a TICKET: its dense network.")
    ] = None,
    model_argument: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of MODEL's factory; repeatable."),
    ] = None,
    weights: Weights = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a TICKET's digits.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of a TICKET; default TICKET.robustness.json."),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Measure accuracy on corrupted and shifted images, under attack, and calibration."""
    from blockprune.cli.robustness import TicketSource, choice_of, of_run, of_ticket

    choice = choice_of(
        attacks,
        corruptions,
        severities,
        corruption_files=corruption_files,
        shifts=shift or (),
        samples=samples,
    )
    if source.is_dir() or source.suffix == ".json":
        raise typer.Exit(of_run(source, choice, data=data, data_dir=data_dir, jobs=jobs))
    of_ticket(
        TicketSource(source, model, tuple(model_argument or ()), weights),
        choice,
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        out=out,
        force=force,
        seed=seed,
    )


lottery = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="Experiments that validate tickets: trained, controlled, judged over seeds.",
)
app.add_typer(lottery, name="lottery")


@lottery.callback()
def _lottery() -> None:
    """Keep `run` a command of its own, as others will stand beside it."""


@lottery.command("run")
def lottery_run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The experiment, a TOML file.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Of the run; an unfinished one is taken up.")
    ],
    data_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder that holds the data.")
    ] = None,
    executor: Annotated[
        str, typer.Option(metavar="WHERE", help="local, or dask://HOST:PORT (extra cluster).")
    ] = "local",
    jobs: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Worker processes of local.")
    ] = 1,
) -> None:
    """Train what SPEC asks for, with its controls; print who wins."""
    from blockprune.cli.lottery import run_command

    raise typer.Exit(run_command(spec, out, data_dir, executor, jobs))


def main() -> None:
    """Run the command line."""
    from blockprune.cli.signals import sigterm_as_interrupt

    for stream in (sys.stdout, sys.stderr):
        # A path in letters that a terminal lacks is printed in escapes, not a reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with sigterm_as_interrupt():
        app()
