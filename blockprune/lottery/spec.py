"""What a run of the lottery is asked for: one value, read from TOML or JSON, no torch needed.

Everything that can be refused without looking at a model or at data is refused here.
"""

from __future__ import annotations

import json
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from blockprune.errors import SpecError, close_names
from blockprune.lottery.moments import Moment, MomentOrSame
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.record import Matched, Structure, Weights
from blockprune.lottery.steps import Step
from blockprune.robustness.record import RobustnessChoice

__all__ = [
    "Controls",
    "DataChoice",
    "EarlyBird",
    "FineTuning",
    "LatencyChoice",
    "Levels",
    "ModelChoice",
    "Spec",
    "SpecError",
    "Stability",
    "table_in",
]

HIGHEST_SEED = 2**31 - 1
"""Above it lie the seeds of new weights, see `blockprune.lottery.work`."""

MOST_SEEDS = 10_000
MOST_LEVELS = 1_000

Schedule = Literal["one-shot", "iterative"]
BlockSchedule = Literal["one-shot", "iterative", "beam"]
Scope = Literal["global", "layers"]


def _several(value: object) -> object:
    """Let one value stand for a list of it."""
    return value if isinstance(value, list | tuple) else (value,)


Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Option = StrictBool | StrictInt | StrictFloat | StrictStr | list[Any] | None


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelChoice(_Table):
    """The dense network; each seed builds one of its own."""

    name: str = Field(
        description="torchvision:NAME, timm:NAME, blockprune:NAME or package.module:factory."
    )
    arguments: dict[str, Option] = Field(
        default_factory=dict, description="Keywords of the factory, such as in_channels = 1."
    )


class DataChoice(_Table):
    """The data to train and test on."""

    name: str = Field(default="digits", description="A name of blockprune.data.DATASETS.")
    image_size: Count | None = Field(
        default=None, description="Height and width in pixels; None: as the data set has it."
    )
    options: dict[str, Option] = Field(
        default_factory=dict, description="Further keywords of the loader, such as test_share."
    )


class Controls(_Table):
    """What is trained beside every ticket, so that a win means something."""

    random: bool = Field(
        default=True, description="As many blocks removed at random, trained like the ticket."
    )
    scratch: bool = Field(
        default=True, description="The ticket's blocks with new weights, trained from the start."
    )


class LatencyChoice(_Table):
    """How forward passes are timed."""

    batch: Count = Field(default=64, description="Samples of one forward pass.")
    repeats: Count = Field(default=20, description="Timed rounds of all networks in turns.")


class EarlyBird(_Table):
    """Tickets drawn at the first epoch at which what would be cut no longer changes.

    Source: You et al., "Drawing early-bird tickets", 2020.
    """

    criterion: str = Field(description="That draws the masks, after every epoch.")
    window: int = Field(default=5, ge=2, description="Consecutive epochs that must agree.")
    distance: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Highest mask distance of the newest of them to each of the others.",
    )


class Levels(_Table):
    """Tickets of single weights, pruned in rounds: each level trains, prunes and rewinds.

    Every level prunes a share of the weights that the one before it left, by an importance of the
    weights that its training ended with, and goes back as `weights` and `rewound_to` say.

    Sources: Frankle et al., "Stabilizing the lottery ticket hypothesis", 2019 (Algorithm 1);
    papers/003, Algorithm 2.
    """

    importances: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        description="What ranks the weights: names of blockprune.sparsity.IMPORTANCES."
    )
    count: int = Field(default=10, ge=1, le=MOST_LEVELS, description="Rounds of pruning.")
    share: float = Field(
        default=0.2, gt=0, lt=1, description="Of the remaining weights, that each round prunes."
    )
    schedule: Annotated[tuple[Schedule, ...], BeforeValidator(_several)] = Field(
        default=("iterative",),
        description='"iterative": a training between rounds; "one-shot": all rounds at once, by '
        "the trained dense network.",
    )
    scope: Annotated[tuple[Scope, ...], BeforeValidator(_several)] = Field(
        default=("global",),
        description='"global": importances are compared over all layers; "layers": each layer '
        "loses the same share.",
    )
    trained: Annotated[tuple[StrictInt, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="One-shot levels that are trained; none named: all of them. Iterative ones "
        "all are, since each needs the one before it.",
    )
    controls_at: Annotated[tuple[StrictInt, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="Levels at which controls run; none named: all of them. Random ones of final "
        "weights also run at the levels before, which they go on from.",
    )
    partial_reinit: bool = Field(
        default=False,
        description="Find the tickets again from new weights, but for the connections that those "
        "of all importances share (papers/003, section 5).",
    )


class Stability(_Table):
    """How far noise carries tickets of weights, and their random controls (papers/004).

    Each is trained a second time, on another order of the data.
    """

    levels: Annotated[tuple[StrictInt, ...], BeforeValidator(_several)] = Field(
        default=(), description="At which; none named: the last."
    )
    alphas: int = Field(
        default=0,
        ge=0,
        description="Places on the line between both at which the test error is measured (linear "
        "mode connectivity); 30 in the paper; 0: not.",
    )

    @field_validator("alphas")
    @classmethod
    def _two_ends(cls, alphas: int) -> int:
        if alphas == 1:
            raise ValueError("a line has two ends: give 2 places or more, or 0")
        return alphas


class FineTuning(_Table):
    """How the "finetune" policy goes on from the final weights."""

    epochs: Count = Field(description="Epochs of it.")
    lr: Positive = Field(description="Its constant learning rate.")


class Spec(_Table):
    """One run of the lottery: which tickets, trained how, against what.

    Every criterion, `p`, moment, policy and schedule is combined with every other; a moment is
    "init", "final", a share of the training ("25%"), an epoch (10) or a step
    ({ epoch = 2, iteration = 50 }).

    - Algorithm 1 of papers/000 is `scored_at = "final"`, `rewound_to` any earlier moment;
    - Algorithm 2 is `scored_at = "init"`, `rewound_to = "init"`;
    - pruning during the training at epoch k is `scored_at = k`, `rewound_to = "scored_at"`.

    A field out of range or unknown raises `pydantic.ValidationError` (a `ValueError`); `parse` and
    `read` raise `SpecError`, with the close name of an unknown key.

    Example:
        >>> from blockprune.lottery.spec import Spec
        >>> spec = Spec.parse({
        ...     "name": "example",
        ...     "model": {"name": "blockprune:resnet20", "arguments": {"in_channels": 1}},
        ...     "recipe": {"epochs": 8},
        ...     "criteria": "grasp",
        ...     "p": [1, 3],
        ...     "seeds": 2,
        ... })
        >>> spec.seed_list, spec.scored_at, spec.data.name
        ((0, 1), ('init',), 'digits')

    Source: Jordao et al., "When Layers Play the Lottery, all Tickets Win at Initialization".
    """

    name: str = Field(min_length=1, description="Of the run, in reports.")
    model: ModelChoice = Field(description="The dense network.")
    data: DataChoice = Field(default_factory=DataChoice, description="To train and test on.")
    recipe: Recipe = Field(description="How the dense network is trained; seed is the run's.")
    criteria: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="What ranks the blocks: names of `blockprune criteria`, or "
        "package.module:function. Random blocks are a control, not a criterion.",
    )
    p: Annotated[tuple[StrictInt | StrictFloat, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="Blocks to remove: a count (int), or a share of the removable ones (float).",
    )
    structures: Annotated[tuple[Structure, ...], BeforeValidator(_several)] = Field(
        default=("blocks",),
        description='What criteria and p remove: "blocks"; "filters" or "weights", as many as the '
        "ticket of p blocks lacks, see matched_by.",
    )
    matched_by: Annotated[tuple[Matched, ...], BeforeValidator(_several)] = Field(
        default=("params",),
        description='What a ticket of filters or weights has as many of as that of blocks: "params"'
        ', "macs", or "filters" (of filters alone).',
    )
    matched_p: Annotated[tuple[StrictInt, ...], BeforeValidator(_several)] = Field(
        default=(),
        description="Numbers of blocks beside whose tickets those of filters and weights stand; "
        "none named: all of p.",
    )
    levels: Levels | None = Field(
        default=None, description="Tickets of weights pruned in rounds. None: not."
    )
    stability: Stability | None = Field(
        default=None, description="Of the tickets of levels, which it needs. None: not measured."
    )
    scored_at: Annotated[tuple[Moment, ...], BeforeValidator(_several)] = Field(
        default=("init",),
        description="The moments of the dense training whose weights are scored.",
    )
    rewound_to: Annotated[tuple[MomentOrSame, ...], BeforeValidator(_several)] = Field(
        default=("init",),
        description='The moments that "rewind" and "learning-rate" go back to; "scored_at": that '
        "at which the ticket was scored.",
    )
    weights: Annotated[tuple[Weights, ...], BeforeValidator(_several)] = Field(
        default=("rewind",),
        description='What tickets start from: "rewind" (weights and schedule of rewound_to), '
        '"learning-rate" (final weights, schedule of rewound_to), "reinit" (new weights, whole '
        'schedule), "finetune" (final weights, a small constant rate).',
    )
    schedule: Annotated[tuple[BlockSchedule, ...], BeforeValidator(_several)] = Field(
        default=("one-shot",),
        description='"one-shot": blocks are scored once; "iterative": after each that goes; '
        '"beam": the same from the best beam_width sets of each step.',
    )
    beam_width: Count = Field(default=3, description='How many sets a "beam" goes on from.')
    carry_optimizer: bool = Field(
        default=False,
        description="Keep the momentum, and the averages, of what survives; otherwise they start "
        "anew.",
    )
    finetune: FineTuning | None = Field(
        default=None, description='Of the "finetune" policy, which needs it.'
    )
    early_bird: EarlyBird | None = Field(
        default=None,
        description="Also draw a ticket of each p at the epoch at which masks settle, and train it "
        "on from there. None: not.",
    )
    seeds: StrictInt | tuple[StrictInt, ...] = Field(
        default=3,
        description="How many replicates (from seed 0 on), or the list of their seeds: of "
        "weights, data order, scoring batch and all draws.",
    )
    controls: Controls = Field(
        default_factory=Controls, description="What is trained beside every ticket."
    )
    granularity: Literal["branch", "layer"] = Field(
        default="branch", description="What counts as one block."
    )
    protect_first: bool = Field(
        default=True, description="Never remove the first removable block, as the paper does not."
    )
    protect: Annotated[tuple[str, ...], BeforeValidator(_several)] = Field(
        default=(), description='Patterns of further blocks that stay, such as "layer1.*".'
    )
    min_blocks_per_stage: int = Field(
        default=2, ge=0, description="Residual blocks that stay in each stage."
    )
    images_per_class: Count = Field(
        default=10, description="Of the batch that blocks are scored on, as in GraSP's code."
    )
    xi_points: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Accuracy, in percentage points, that a winning ticket may lose.",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Of all intervals.")
    latency: LatencyChoice | None = Field(
        default=None, description="How forward passes are timed; None: they are not."
    )
    robustness: RobustnessChoice | None = Field(
        default=None,
        description="Measure every network under corruptions, on other test sets and under "
        "attack. None: not.",
    )
    similarities: bool = Field(
        default=False, description="Compare the blocks of every ticket with the dense ones by CKA."
    )
    test_every_epoch: bool = Field(
        default=False, description="Evaluate after every epoch too, for the training curves."
    )
    checkpoint_epochs: Count = Field(
        default=5, description="A killed training goes on from the latest multiple of these."
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="Processes that fetch samples for each training, where reading and augmenting "
        "them takes long; 0: none. The batches are the same.",
    )
    threads: Count = Field(
        default=1,
        description="Threads of torch inside a stage; their number decides how sums are rounded.",
    )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Return the spec in a TOML file, or in a JSON file of the same structure.

        Raises:
            SpecError: the file cannot be read, or is not what a spec can be.
        """
        file = Path(path)
        table = table_in(file)
        if "runs" in table:
            raise SpecError(
                f"The spec {file} holds several runs: blockprune.lottery.read_specs reads them."
            )
        return cls.parse(table, source=str(file))

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, source: str = "The spec") -> Self:
        """Return the spec that a table of plain values is.

        Raises:
            SpecError: every field that cannot be used is named, an unknown one with those close.
        """
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            problems = [_sentence(problem) for problem in error.errors(include_url=False)]
            raise SpecError(f"{source} cannot be used: {'; '.join(problems)}.") from error

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, one for each replicate."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(seeds, int):
            if not 1 <= seeds <= MOST_SEEDS:
                raise ValueError(f"1 to {MOST_SEEDS} replicates can run, not {seeds}")
        elif not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("a list of seeds names at least one, and each once")
        elif not all(0 <= seed <= HIGHEST_SEED for seed in seeds):
            raise ValueError(f"a seed lies in 0 .. {HIGHEST_SEED}")
        return seeds

    @field_validator("p")
    @classmethod
    def _something_goes(cls, several: tuple[int | float, ...]) -> tuple[int | float, ...]:
        for p in several:
            if not (p > 0 and (isinstance(p, int) or p <= 1)):
                raise ValueError(
                    f"p = {p} removes nothing that can be removed: give a count from 1 on, or a "
                    "share in (0, 1]. The dense network always runs"
                )
        return several

    @field_validator("criteria")
    @classmethod
    def _no_control(cls, criteria: tuple[str, ...]) -> tuple[str, ...]:
        if "random" in criteria:
            raise ValueError('"random" is a control, which runs beside every ticket: leave it out')
        return criteria

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("scored_at", "rewound_to", "weights", "schedule", "structures", "matched_by"):
            _check_list(field, getattr(self, field))
        if self.levels is None or self.criteria or self.p:
            _check_list("criteria", self.criteria)
            _check_list("p", self.p)
        self._check_structures()
        self._check_levels()
        if self.recipe.seed != 0:
            raise ValueError("recipe.seed has no place here: seeds says which, for all stages")
        self._check_policies()
        self._check_moments()
        if self.early_bird is not None and self.early_bird.window >= self.recipe.epochs:
            raise ValueError(
                f"early_bird.window = {self.early_bird.window} never fills before the last of "
                f"{self.recipe.epochs} epochs"
            )
        return self

    def _check_structures(self) -> None:
        others = set(self.structures) - {"blocks"}
        if self.matched_by != ("params",) and not others:
            raise ValueError(
                'matched_by means nothing to structures = ["blocks"]: add "filters" or "weights"'
            )
        if self.matched_p and not others:
            raise ValueError(
                'matched_p means nothing to structures = ["blocks"]: add "filters" or "weights"'
            )
        counts = {p for p in self.p if isinstance(p, int)}
        if len(counts) == len(self.p) and not counts.issuperset(self.matched_p):
            raise ValueError(
                f"matched_p = {list(self.matched_p)} is to be a part of p = {list(self.p)}"
            )
        if self.structures == ("weights",) and self.matched_by == ("filters",):
            raise ValueError(
                'weights cannot be matched by filters: matched_by "params" or "macs" would do'
            )
        steps = [schedule for schedule in self.schedule if schedule != "one-shot"]
        if others and steps:
            raise ValueError(
                f'schedule "{steps[0]}" is for blocks alone; weights are pruned in rounds by '
                "[levels]"
            )
        if "partial-reinit" in self.weights:
            raise ValueError(
                '"partial-reinit" is no policy of its own: set partial_reinit = true in [levels]'
            )

    def _check_levels(self) -> None:
        levels = self.levels
        if levels is None:
            if self.stability is not None:
                raise ValueError("[stability] is of the tickets of [levels], which is not there")
            return
        _check_list("levels.importances", levels.importances)
        _check_list("levels.schedule", levels.schedule)
        _check_list("levels.scope", levels.scope)
        named = {
            "levels.trained": levels.trained,
            "levels.controls_at": levels.controls_at,
            "stability.levels": () if self.stability is None else self.stability.levels,
        }
        for field, chosen in named.items():
            if not all(1 <= level <= levels.count for level in chosen):
                raise ValueError(f"{field} = {list(chosen)}: levels are 1 .. {levels.count}")
        if levels.trained and "one-shot" not in levels.schedule:
            raise ValueError(
                'levels.trained is of "one-shot" levels: iterative ones are all trained'
            )
        untrained = {*named["levels.controls_at"], *named["stability.levels"]} - {*levels.trained}
        if levels.schedule == ("one-shot",) and levels.trained and untrained:
            raise ValueError(
                f"levels {sorted(untrained)} are named, and levels.trained = "
                f"{list(levels.trained)} leaves them out"
            )
        if levels.partial_reinit and (
            len(levels.importances) < 2 or "iterative" not in levels.schedule
        ):
            raise ValueError(
                "levels.partial_reinit is about what the iterative tickets of two importances or "
                "more share"
            )
        if levels.partial_reinit and "rewind" not in self.weights:
            raise ValueError('levels.partial_reinit needs "rewind" among weights')

    def _check_policies(self) -> None:
        goes_back = {"rewind", "learning-rate"} & set(self.weights)
        if not goes_back and self.rewound_to != ("init",):
            raise ValueError(
                f"rewound_to means nothing to weights = {list(self.weights)}: leave it out, or "
                'add "rewind" or "learning-rate"'
            )
        if ("finetune" in self.weights) != (self.finetune is not None):
            raise ValueError(
                'the policy "finetune" and the table [finetune] (epochs, lr) need each other'
            )
        if self.carry_optimizer and set(self.weights) == {"reinit"} and self.early_bird is None:
            raise ValueError("carry_optimizer means nothing to new weights: leave it out")

    def _check_moments(self) -> None:
        """Refuse what leaves nothing to train, where no iterations need be counted to see it."""
        last = self.recipe.epochs
        for moment in (*self.scored_at, *self.rewound_to):
            if isinstance(moment, Step) and (moment.epoch, moment.iteration) > (last, 0):
                raise ValueError(f"{moment} lies behind the end of the training, {last} epochs")
        if not {"rewind", "learning-rate"} & set(self.weights):
            return
        for scored, rewound in product(self.scored_at, self.rewound_to):
            moment = scored if rewound == "scored_at" else rewound
            if moment in ("final", "100%", Step(epoch=last)):
                raise ValueError(
                    f"rewound_to = {str(rewound)!r} goes back to the end of the training "
                    f"({moment}), and leaves nothing to train: name an earlier moment, or the "
                    'policy "finetune"'
                )


def table_in(file: Path) -> dict[str, Any]:
    """Return the table in a TOML file, or in a JSON file.

    Raises:
        SpecError: it cannot be read, or is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    # A name with a null byte is a ValueError.
    except (OSError, ValueError) as error:
        raise SpecError(f"The spec {file} cannot be read: {error}") from error
    try:
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    # A file of brackets alone exceeds what a parser may nest.
    except (ValueError, RecursionError) as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise SpecError(f"The spec {file} is not valid {kind}: {error}") from error
    if not isinstance(table, dict):
        raise SpecError(f"The spec {file} is a {type(table).__name__}, not a table of fields.")
    return table


def _check_list(field: str, values: tuple[object, ...]) -> None:
    if not values:
        raise ValueError(f"{field} is an empty list; it needs at least one entry")
    if len(set(values)) < len(values):
        raise ValueError(f"{field} has an entry twice: {', '.join(map(str, values))}")


def _sentence(problem: Any) -> str:
    """Return what pydantic found as one clause that begins with the field."""
    place = tuple(part for part in problem["loc"] if isinstance(part, str))
    where = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = _fields_of(Spec, place[:-1])
        return f"{where} is unknown.{close_names(place[-1], known)} Known: {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _fields_of(table: type[BaseModel], place: tuple[str, ...]) -> list[str]:
    """Return the keys of the table at a place in a spec."""
    for part in place:
        table = next(_tables_in(table.model_fields[part].annotation))
    return list(table.model_fields)


def _tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Give the tables that a field holds: itself, or one of a union, or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _tables_in(part)
