"""`run`: a spec becomes stages, stages become outputs, outputs become one record.

The folder of a run is all there is to it::

    DIR/results.json     the record, written when all that could be done is done
    DIR/stages/          the output of each stage, whole or absent
    DIR/tensorboard/     training curves, where TensorBoard is installed

A run that was killed is started again by the same command: what is there is not done again.
"""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from blockprune.blocks import BlockAnalysis
from blockprune.data import balanced_batch, size_of
from blockprune.filters import filter_layers
from blockprune.lottery import tensorboard
from blockprune.lottery.assembling import Assembly
from blockprune.lottery.cases import Moments, cases_of
from blockprune.lottery.comparisons import Comparison, comparisons_of
from blockprune.lottery.executors import InProcess, Submits, opened
from blockprune.lottery.merges import residual_merges
from blockprune.lottery.nodes import Node, Unfolding
from blockprune.lottery.record import BlockRecord, RunRecord
from blockprune.lottery.spec import Spec, SpecError
from blockprune.lottery.stages import Output, RunError, Stage, StageStore
from blockprune.lottery.work import Job, Setting, check_criteria, perform
from blockprune.plan import make_plan
from blockprune.randomness import preserved_rng
from blockprune.robustness.attacks import check_attacks
from blockprune.robustness.choices import check_files
from blockprune.sparsity import Mask
from blockprune.whole_files import write_whole

__all__ = ["Event", "run"]

RESULTS = "results.json"


@dataclass(frozen=True)
class Event:
    """Something that happened to a stage.

    Attributes:
        kind: "found" (its output was there), "done", "failed", or "skipped" (it needs one that
            failed, or there is nothing to do).
        stage: in words.
        finished: stages that are over, this one counted.
        total: of all stages.
        detail: the error, or why.
    """

    kind: Literal["found", "done", "failed", "skipped"]
    stage: str
    finished: int
    total: int
    detail: str = ""


def run(
    spec: Spec,
    out: str | os.PathLike[str],
    *,
    executor: str | Submits = "local",
    jobs: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> RunRecord:
    """Train and judge everything that a spec asks for; write and return the record.

    Stages that the folder has already are not run again, so a run that was stopped, by SIGKILL
    too, is taken up by the same call, and ends with the same record: on a CPU bit for bit, but for
    what clocks said (`RunRecord.without_times`). A finished stage keeps its times. What goes wrong
    in a stage is recorded under `failures`, and all that does not need it is done nevertheless.

    Args:
        spec: what to run.
        out: the folder of the run; made where absent.
        executor: see `blockprune.lottery.executors.opened`.
        jobs: worker processes of the executor "local"; 1: this process alone.
        data_dir: the folder of the data; None where the data set needs none.
        command: that makes the run again, for the record.
        on_event: told of each stage that is over.

    Raises:
        SpecError, PlanError, CriterionError, ModelSpecError, TraceError, DataError: the spec
            cannot be carried out; found before any work is done.
        RunError: the folder cannot be written to, holds something else, or is in use.

    Example:
        >>> import tempfile
        >>> from blockprune.lottery import Spec, run
        >>> spec = Spec.parse({
        ...     "name": "example",
        ...     "model": {"name": "blockprune:resnet20", "arguments": {"in_channels": 1}},
        ...     "data": {"options": {"test_share": 0.8}},
        ...     "recipe": {"epochs": 1},
        ...     "criteria": "snip",
        ...     "p": 1,
        ...     "seeds": 1,
        ... })
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(spec, folder)
        >>> [network.case.kind for network in record.networks]
        ['dense', 'ticket', 'random', 'scratch']
        >>> record.verdicts[0].verdict
        'not enough seeds'

    Source: papers/000, Algorithms 1 and 2.
    """
    folder = Path(out).absolute()
    place = None if data_dir is None else str(Path(data_dir).absolute())
    results = folder / RESULTS
    _check_results(results)
    prepared = _prepare(spec, place)
    store = StageStore(folder / "stages")
    curves = str(folder / "tensorboard") if tensorboard.is_installed() else None
    job = partial(
        Job,
        store=str(store.folder),
        data_dir=place,
        checkpoint_epochs=spec.checkpoint_epochs,
        curves=curves,
        workers=spec.workers,
    )
    with store.alone():
        store.clear()
        with opened(executor, jobs) as workers:
            schedule = _Schedule(store, workers, job, prepared.nodes(), on_event)
            schedule.run()
        record = Assembly(
            prepared.unfolding,
            prepared.comparisons,
            schedule.outputs,
            schedule.failures,
            prepared.blocks,
            prepared.data,
            schedule.notes,
        ).record(command or f"blockprune lottery run {spec.name}.toml --out {folder.name}")
        write_whole(results, record.to_json(), RunError)
    return record


@dataclass(frozen=True)
class _Prepared:
    """A spec that can be carried out.

    Attributes:
        unfolding: its networks.
        comparisons: between them.
        blocks: of the dense network.
        data: what the record says of the data.
    """

    unfolding: Unfolding
    comparisons: tuple[Comparison, ...]
    blocks: tuple[BlockRecord, ...]
    data: dict[str, str | int | tuple[int, ...]]

    def nodes(self) -> tuple[Node, ...]:
        """Return every node of the run once."""
        nodes = [*self.unfolding.nodes()]
        for comparison in self.comparisons:
            nodes += [*comparison.before, comparison.node]
        return tuple({node.name: node for node in nodes}.values())


def _prepare(spec: Spec, data_dir: str | None) -> _Prepared:
    """Build what is cheap, and refuse what cannot be done."""
    told = {
        "model": spec.model.model_dump(),
        "data": spec.data.model_dump(),
        "granularity": spec.granularity,
        "threads": spec.threads,
    }
    with preserved_rng():
        setting = Setting.of(told, data_dir)
        images = setting.images
        check_criteria(spec)
        seed = spec.seed_list[0]
        model = setting.build(seed)
        if model is setting.build(seed):
            raise SpecError(
                f"{spec.model.name} is one model, not a factory: every replicate needs a new one."
            )
        analysis = setting.analyse(model)
        _check_classes(spec, setting, model)
        _check_structures(spec, setting, model)
        if spec.robustness is not None:
            check_files(spec.robustness, data_dir, images.image_shape[-1])
            if spec.robustness.attacks:
                check_attacks()
        balanced_batch(images.train, images.num_classes, spec.images_per_class, seed=seed)
    first = analysis.names[:1] if spec.protect_first else ()
    protect = (*first, *spec.protect)
    ps = _counts(spec, analysis, protect)
    train = size_of(images.train)
    moments = Moments(spec.recipe.epochs, math.ceil(train / spec.recipe.batch_size))
    data: dict[str, str | int | tuple[int, ...]] = {
        "name": images.name,
        "train_images": train,
        "test_images": size_of(images.test),
        "image_shape": images.image_shape,
        "classes": images.num_classes,
    }
    cases = cases_of(spec, ps, moments)
    unfolding = Unfolding(spec, told, cases, moments, protect)
    comparisons = comparisons_of(unfolding)
    return _Prepared(unfolding, comparisons, residual_merges(analysis), data)


def _check_structures(spec: Spec, setting: Setting, model: torch.nn.Module) -> None:
    """Refuse a network that has nothing of what is to go."""
    if "filters" in spec.structures and not filter_layers(model, setting.image):
        raise SpecError(
            f'structures names "filters", and {spec.model.name} has no convolution inside a '
            'residual branch to take them from: "blocks" and "weights" are left.'
        )
    if "weights" in spec.structures or spec.levels is not None:
        Mask.full(model)


def _check_classes(spec: Spec, setting: Setting, model: torch.nn.Module) -> None:
    """Refuse a network that does not map the images to a logit for each class."""
    with torch.no_grad():
        found = model.eval()(setting.image)
    shape = tuple(getattr(found, "shape", ()))
    classes = setting.images.num_classes
    if len(shape) != 2 or shape[0] != 1 or shape[1] < classes:
        what = f"shape {shape}" if shape else f"a {type(found).__name__}"
        raise SpecError(
            f"{spec.model.name} returns {what} for one image of {setting.images.name}, which needs "
            f"(1, {classes}): a logit for each class. See model.arguments."
        )


def _counts(spec: Spec, analysis: BlockAnalysis, protect: tuple[str, ...]) -> tuple[int, ...]:
    """Return each p of a spec as a number of blocks that can go."""
    counts: dict[int, None] = {}
    for p in spec.p:
        plan = make_plan(
            analysis, p=p, protect=protect, min_blocks_per_stage=spec.min_blocks_per_stage
        )
        if not plan.remove:
            raise SpecError(
                f"p = {p} of {len(analysis.blocks)} blocks is less than one: give a larger share."
            )
        counts[len(plan.remove)] = None
    return tuple(counts)


def _check_results(path: Path) -> None:
    """Refuse to write over what is no record of a run."""
    # Unlike Path.exists, this takes a name that is too long for one that is not there.
    if not os.path.exists(path):
        return
    try:
        RunRecord.from_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{path} is there, and is no record of a run: give another folder, or move it away."
        ) from error


@dataclass
class _Schedule:
    """Brings every node to its end, in any order that they allow.

    Attributes:
        outputs: of the nodes that are done.
        failures: node to error, of those that cannot be.
        notes: what came up.
    """

    store: StageStore
    workers: Submits
    job: Callable[[Stage], Job]
    nodes: tuple[Node, ...]
    on_event: Callable[[Event], None] | None
    outputs: dict[str, Output | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run all nodes; those that want to be alone come last, in this process."""
        self._waiting = {node.name: node for node in self.nodes if not node.is_alone}
        self._in_flight: dict[str, tuple[Stage, list[str]]] = {}
        self._over: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self._begin_ready()
        while self._in_flight:
            self._hear()
            self._begin_ready()
        assert not self._waiting, list(self._waiting)
        self.workers = InProcess()
        for node in self.nodes:
            if node.is_alone:
                self._begin(node)
                while self._in_flight:
                    self._hear()
        # In the order of the nodes, whichever ended first.
        self.outputs = {n.name: self.outputs[n.name] for n in self.nodes if n.name in self.outputs}
        self.failures = {
            n.name: self.failures[n.name] for n in self.nodes if n.name in self.failures
        }

    def _begin_ready(self) -> None:
        """Begin what waits for nothing any more, until nothing else becomes ready by it."""
        has_changed = True
        while has_changed:
            has_changed = False
            for node in list(self._waiting.values()):
                if all(need in self.outputs or need in self.failures for need in node.needs):
                    del self._waiting[node.name]
                    self._begin(node)
                    has_changed = True
                    # Where a stage runs as it is sent, it is over by now, and told of at once.
                    while not self._over.empty():
                        self._hear()

    def _begin(self, node: Node) -> None:
        lost = [need for need in node.needs if need in self.failures]
        if lost and not node.is_alone:
            self._fail(node.name, f"Not run, since this failed: {lost[0]}.", "skipped")
            return
        stage = node.stage({n: self.outputs[n] for n in node.needs if n in self.outputs})
        if stage is None:
            self.outputs[node.name] = None
            self._tell("skipped", node.name, "There is nothing to do.")
            return
        if stage.key in self._in_flight:
            self._in_flight[stage.key][1].append(node.name)
            return
        found = self.store.find(stage, self.notes.append)
        if found is not None:
            self.outputs[node.name] = found
            self._tell("found", node.name)
            return
        self._in_flight[stage.key] = (stage, [node.name])
        future = self.workers.submit(perform, self.job(stage))
        future.add_done_callback(partial(self._heard, stage.key))

    def _heard(self, key: str, future: Future[Any]) -> None:
        """Put the result of a worker where the run waits; called from any thread."""
        error = future.exception() if not future.cancelled() else None
        if future.cancelled():
            self._over.put((key, "Its executor was shut down."))
        elif error is not None:
            self._over.put((key, f"{type(error).__name__}: {error}"))
        else:
            self._over.put((key, future.result()))

    def _hear(self) -> None:
        """Wait until a stage is over, and take what it left."""
        key, error = self._over.get()
        stage, names = self._in_flight.pop(key)
        found = None if error is not None else self.store.find(stage)
        for name in names:
            if found is not None:
                self.outputs[name] = found
                self._tell("done", name)
            else:
                lost = f"its worker says it is done, but {self.store.path(stage)} is not there."
                self._fail(name, error or lost, "failed")

    def _fail(self, name: str, error: str, kind: Literal["failed", "skipped"]) -> None:
        self.failures[name] = error
        self._tell(kind, name, error)

    def _tell(
        self, kind: Literal["found", "done", "failed", "skipped"], name: str, detail: str = ""
    ) -> None:
        if self.on_event is not None:
            over = len(self.outputs) + len(self.failures)
            self.on_event(Event(kind, name, over, len(self.nodes), detail))
