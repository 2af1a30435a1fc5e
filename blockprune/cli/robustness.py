"""``blockprune robustness``: how a run's networks, or one ticket, stand up to harder images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from blockprune.cli.lottery import RunBar
from blockprune.cli.output import INTERRUPTED, print_line, print_table, working
from blockprune.errors import BlockpruneError, DataError, ModelSpecError, SpecError
from blockprune.lottery.record import RunRecord
from blockprune.report.robust_figures import measures_of
from blockprune.robustness.record import RobustnessChoice, RobustnessResult
from blockprune.whole_files import write_whole

__all__ = ["TicketSource", "choice_of", "of_run", "of_ticket"]


@dataclass(frozen=True)
class TicketSource:
    """Where a ticket comes from.

    Attributes:
        path: that `save_ticket` wrote.
        model: MODEL, its dense network.
        arguments: of the model's factory, ``KEY=VALUE``.
        weights: of the trained dense network; None: it is not compared with.
    """

    path: Path
    model: str | None
    arguments: Sequence[str]
    weights: Path | None


def choice_of(
    attacks: str,
    corruptions: str,
    severities: str,
    *,
    corruption_files: str | None,
    shifts: Sequence[str],
    samples: int | None,
) -> RobustnessChoice:
    """Return what the options ask for.

    Raises:
        SpecError: they make no sense together, or name what there is not.
    """
    asked: dict[str, Any] = {
        "attacks": [] if attacks == "none" else _listed(attacks),
        "corruptions": corruptions if "," not in corruptions else _listed(corruptions),
        "severities": _listed(severities),
        "corruption_files": corruption_files,
        "shifts": dict(_pair(text, "--shift", "NAME=FOLDER") for text in shifts),
        "samples": samples,
    }
    try:
        return RobustnessChoice.model_validate(asked)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_url=False)
        )
        raise SpecError(f"This cannot be measured: {problems}.") from error


def of_run(
    folder: Path,
    choice: RobustnessChoice,
    *,
    data: str | None,
    data_dir: Path | None,
    jobs: int,
) -> int:
    """Measure every network of a run that has ended; its record and its report show it.

    Nothing is trained again, and what was measured already is not measured again, so a call that
    was interrupted is taken up by the next.

    Returns:
        The exit code: 0; 1 where something failed; 130 after Ctrl-C.

    Raises:
        BlockpruneError: there is no such run, it is of other data, or its networks are not there.
    """
    from blockprune.lottery import Spec, run
    from blockprune.report import read_run

    record = read_run(folder)
    home = folder if folder.is_dir() else folder.parent
    spec = Spec.parse({**record.spec, "robustness": choice.model_dump(mode="json")})
    own = spec.data.name
    if data not in (None, own):
        raise BlockpruneError(
            f"--data {data} was asked for, and {folder} is a run on {own}: leave --data out."
        )
    _check_networks(record, home)
    try:
        with RunBar() as bar:
            found = run(
                spec,
                home,
                jobs=jobs,
                data_dir=data_dir,
                command=record.command,
                on_event=bar.show,
            )
    except KeyboardInterrupt:
        typer.echo("Interrupted. What was measured is kept: the same command goes on.", err=True)
        return INTERRUPTED
    by_case: dict[str, list[RobustnessResult]] = {}
    for one in found.robustness:
        by_case.setdefault(one.case.label(), []).append(one.result)
    _show(by_case)
    print_line(f"Written to {home / 'results.json'}; `blockprune report {home}` shows it.")
    for stage, error in found.failures.items():
        typer.echo(f"failed: {stage}: {error}", err=True)
    return 1 if found.failures else 0


def of_ticket(
    source: TicketSource,
    choice: RobustnessChoice,
    *,
    data: str | None,
    data_dir: Path | None,
    image_size: int | None,
    out: Path | None,
    force: bool,
    seed: int,
) -> None:
    """Measure the ticket in a file, and its dense network where the weights of that are given.

    Raises:
        BlockpruneError: something is absent, or does not fit.
    """
    from blockprune.cli.models import load_weights
    from blockprune.robustness.choices import check_files, measured
    from blockprune.tickets import load_ticket

    if source.model is None:
        raise BlockpruneError(
            f"{source.path} holds a ticket, which is rebuilt from its dense network: name that "
            "by --model."
        )
    target = out or source.path.with_suffix(".robustness.json")
    if target.exists() and not force:
        raise BlockpruneError(f"{target} is there: give --force to replace it, or another --out.")
    images = _images(data or "digits", data_dir, image_size, seed)
    check_files(choice, data_dir, images.image_shape[-1])
    dense = _built(source.model, source.arguments)
    networks = {"ticket": load_ticket(dense, source.path)}
    if source.weights is not None:
        load_weights(dense, source.weights)
        networks = {"dense": dense, **networks}
    found = {}
    for name, network in networks.items():
        with working(f"Measuring the {name}"):
            found[name] = measured(
                choice,
                network.eval(),
                images,
                dense=dense if name == "ticket" and source.weights is not None else None,
                data_dir=data_dir,
                seed=seed,
            )
        # After each, so that an interrupted call leaves what it has.
        write_whole(target, json.dumps(found, indent=2) + "\n")
    _show({name: [RobustnessResult.model_validate(one)] for name, one in found.items()})
    print_line(f"Written to {target}")


def _check_networks(record: RunRecord, home: Path) -> None:
    """Refuse a record without the trained networks, which would all be trained again."""
    lost = dict.fromkeys(
        one.stage for one in record.networks if not (home / "stages" / one.stage).is_dir()
    )
    if lost:
        raise BlockpruneError(
            f"{home} has results of {len(record.networks)} networks, but {home / 'stages'} lacks "
            f"{len(lost)} of their trainings, such as {next(iter(lost))}. Give the folder that "
            "`blockprune lottery run` wrote, whole."
        )
    made, own = record.environment.get("blockprune"), version("blockprune")
    if made != own:
        raise BlockpruneError(
            f"{home} is a run of blockprune {made}, and this is {own}, which would train all of it "
            f"again. Install blockprune {made}, or run its spec anew with a [robustness] table."
        )


def _built(model: str, arguments: Sequence[str]) -> Any:
    from blockprune.models.building import model_and_inputs, model_factory

    keywords = dict(_pair(text, "--model-argument", "KEY=VALUE") for text in arguments)
    factory = model_factory(model, {key: _value(text) for key, text in keywords.items()})
    try:
        built = factory()
    # A factory may raise anything.
    except Exception as error:
        raise ModelSpecError(
            f"{model} cannot be built with {keywords}: {type(error).__name__}: {error}"
        ) from error
    return model_and_inputs(model, built)[0]


def _images(name: str, data_dir: Path | None, image_size: int | None, seed: int) -> Any:
    from blockprune.data import data_options, load_data

    known = data_options(name)
    options = {"augment": False, "seed": seed, "image_size": image_size}
    if image_size is not None and "image_size" not in known:
        raise DataError(f"{name} has images of one size: leave --image-size out.")
    return load_data(
        name,
        data_dir,
        **{key: v for key, v in options.items() if key in known and v is not None},
    )


def _show(found: Mapping[str, Sequence[RobustnessResult]]) -> None:
    """Print a row for each network: accuracies in percent, means over seeds."""
    results = [result for several in found.values() for result in several]
    measures = measures_of(results)
    headers = ["network", *(measure.name for measure in measures), "ECE", "agrees"]
    rows = []
    for name, several in found.items():
        columns = [[measure.of(result) for result in several] for measure in measures]
        columns.append([100 * result.ece for result in several])
        columns.append([None if r.agreement is None else 100 * r.agreement for r in several])
        rows.append([name, *map(_mean, columns)])
    print_table(headers, rows, numeric=headers[1:])
    print_line("Accuracies, ECE and agreement with the dense network in percent.")
    for flag in dict.fromkeys(flag for result in results for flag in result.flags):
        print_line(f"Caution: {flag}")


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "-"


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key or not value:
        raise SpecError(f"{option} {text!r} is not of the form {form}.")
    return key, value


def _value(text: str) -> Any:
    """Read what JSON has, such as a number, true or null, as such, and anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
