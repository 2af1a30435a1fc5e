"""From what the stages of a run found to its record."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

import torch

from blockprune.lottery.cases import START
from blockprune.lottery.comparisons import Comparison
from blockprune.lottery.nodes import LATENCY, Unfolding
from blockprune.lottery.record import (
    BlockRecord,
    ConnectionRecord,
    ConnectivityRecord,
    EpochFigures,
    MaskRecord,
    NetworkRecord,
    OverlapRecord,
    RobustnessRecord,
    RunRecord,
    ScoreRecord,
    SimilarityRecord,
    StabilityRecord,
    SurvivalRecord,
    TicketCase,
)
from blockprune.lottery.stages import Output
from blockprune.lottery.verdicts import verdicts_of
from blockprune.robustness.record import RobustnessResult

__all__ = ["Assembly"]

Compared = TypeVar(
    "Compared", ConnectionRecord, ConnectivityRecord, StabilityRecord, SurvivalRecord
)


@dataclass(frozen=True)
class Assembly:
    """What a record is put together from.

    Attributes:
        unfolding: of the run.
        comparisons: that it makes.
        outputs: of all nodes that are done, by name.
        failures: of those that could not be.
        blocks: of the dense network.
        data: what the record says of the data.
        notes: what came up besides.
    """

    unfolding: Unfolding
    comparisons: Sequence[Comparison]
    outputs: Mapping[str, Output | None]
    failures: Mapping[str, str]
    blocks: tuple[BlockRecord, ...]
    data: dict[str, str | int | tuple[int, ...]]
    notes: Iterable[str]

    def record(self, command: str) -> RunRecord:
        """Return the record of the run."""
        spec = self.unfolding.spec
        networks = tuple(self._networks())
        return RunRecord(
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            command=command,
            environment=_environment(spec.threads),
            data=self.data,
            xi_points=spec.xi_points,
            confidence=spec.confidence,
            latency_batch=None if spec.latency is None else spec.latency.batch,
            blocks=self.blocks,
            networks=networks,
            scores=tuple(self._scores()),
            verdicts=verdicts_of(networks, xi_points=spec.xi_points, confidence=spec.confidence),
            similarities=tuple(self._similarities()),
            masks=tuple(self._masks()),
            overlaps=tuple(self._overlaps()),
            connections=self._compared("connections", ConnectionRecord),
            survivals=self._compared("survival", SurvivalRecord),
            stabilities=self._compared("stability", StabilityRecord),
            connectivities=self._compared("line", ConnectivityRecord),
            robustness=tuple(self._robustness()),
            failures=dict(self.failures),
            notes=tuple(dict.fromkeys((*_shared(networks), *self._notes(), *self.notes))),
        )

    def _networks(self) -> Iterator[NetworkRecord]:
        latencies = self._latencies()
        for case, seed in self._all():
            trained = self.outputs.get(self.unfolding.training(case, seed))
            judged = self.outputs.get(self.unfolding.evaluation(case, seed))
            if trained is None or judged is None:
                continue
            removed = self.unfolding.removed(case, seed, self.outputs) or ()
            cut = json.dumps(self.unfolding.cut(case, seed, self.outputs), sort_keys=True)
            seconds = trained.times["seconds"]
            epochs = [
                EpochFigures(**figures, seconds=took)
                for figures, took in zip(trained.found["epochs"], seconds, strict=True)
            ]
            yield NetworkRecord(
                case=case,
                seed=seed,
                removed=removed,
                **judged.found,
                epochs=tuple(epochs),
                **latencies.get(cut, {}),
                drawn_at=self.unfolding.drawn_at(case, seed, self.outputs),
                stage=trained.folder.name,
            )

    def _scores(self) -> Iterator[ScoreRecord]:
        asked = {
            (str(case.criterion), case.scored_at or START, seed): None
            for case, seed in self._all()
            if case.kind == "ticket" and case.structure == "blocks" and not case.early_bird
        }
        for criterion, moment, seed in asked:
            found = self.outputs.get(self.unfolding.scoring(criterion, moment, seed))
            if found is not None:
                yield ScoreRecord(
                    criterion=criterion, scored_at=moment, seed=seed, scores=found.found["scores"]
                )

    def _similarities(self) -> Iterator[SimilarityRecord]:
        for case, seed in self._all():
            found = self.outputs.get(self.unfolding.similarity(case, seed))
            if found is not None:
                yield SimilarityRecord(case=case, seed=seed, **found.found)

    def _robustness(self) -> Iterator[RobustnessRecord]:
        for case, seed in self._all():
            found = self.outputs.get(self.unfolding.robustness(case, seed))
            if found is not None:
                result = RobustnessResult.model_validate(found.found)
                yield RobustnessRecord(case=case, seed=seed, result=result)

    def _masks(self) -> Iterator[MaskRecord]:
        for case, seed in self._all():
            if case.structure == "weights":
                chosen = self.outputs.get(self.unfolding.choice(case, seed))
                if chosen is not None:
                    yield MaskRecord(case=case, seed=seed, **chosen.found)

    def _overlaps(self) -> Iterator[OverlapRecord]:
        for comparison in self.comparisons:
            found = self.outputs.get(comparison.node.name)
            if comparison.kind == "overlaps" and found is not None:
                for one in found.found["overlaps"]:
                    cases = tuple(comparison.cases[place] for place in one["masks"])
                    shares = {name: value for name, value in one.items() if name != "masks"}
                    yield OverlapRecord(cases=cases, seed=comparison.seed, **shares)

    def _compared(self, kind: str, record: type[Compared]) -> tuple[Compared, ...]:
        return tuple(
            record(case=comparison.cases[0], seed=comparison.seed, **found.found)
            for comparison in self.comparisons
            if comparison.kind == kind
            and (found := self.outputs.get(comparison.node.name)) is not None
        )

    def _latencies(self) -> dict[str, dict[str, float]]:
        found = self.outputs.get(LATENCY)
        if found is None:
            return {}
        return {
            json.dumps(one["cut"], sort_keys=True): {
                "latency_ms": one["median_ms"],
                "latency_iqr_ms": one["iqr_ms"],
            }
            for one in found.times["latencies"]
        }

    def _notes(self) -> Iterator[str]:
        for name, output in self.outputs.items():
            if output is None:
                continue
            yield from (f"{name}: {note}" for note in output.notes)
            if output.found.get("masks") is not None and output.found["step"] is None:
                yield (
                    f"{name}: masks had not settled before the last of "
                    f"{len(output.found['masks']) + 1} epochs, so there is no such ticket."
                )

    def _all(self) -> Iterator[tuple[TicketCase, int]]:
        """Yield each case with each seed; the seeds of a case stand together."""
        for case in self.unfolding.cases:
            for seed in self.unfolding.spec.seed_list:
                yield case, seed


def _shared(networks: Sequence[NetworkRecord]) -> Iterator[str]:
    """Say how many figures are not independent of one another."""
    trainings = {network.stage for network in networks}
    if len(trainings) < len(networks):
        yield (
            f"{len(networks)} networks come from {len(trainings)} trainings: where two cases chose "
            "the same blocks for a seed, and start alike, they are the same network."
        )


def _environment(threads: int) -> dict[str, str | int | float | None]:
    """Return what figures may depend on; nothing that names a person or a machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "blockprune": version("blockprune"),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
    }
