"""A dense network and its tickets, measured one ticket at a time.

Each ticket takes turns with the dense network, and its figures are complete before the next one
begins; so a run that ends early has lost none of the tickets before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockprune.cli.figures import (
    Beside,
    joined,
    latency_figures,
    mean_energy,
    memory_figures,
    percent_saved,
    training_figures,
)
from blockprune.costs import model_costs, paper_memory_bytes
from blockprune.profiling import (
    Energy,
    Execution,
    PeakMemory,
    Timing,
    compare_latency,
    compare_training,
    formula_energy,
    inference_memory,
    training_memory,
)
from blockprune.profiling.training import metered_step, steps_of_epoch
from blockprune.report.bench import NetworkFigures, TrainingFigures

__all__ = ["DENSE", "Request", "SideBySide", "Training"]

DENSE = "dense"


@dataclass(frozen=True)
class Training:
    """How training is measured.

    Attributes:
        batch: samples a step.
        epoch_samples: samples of one epoch.
        watts: for the formula; None: energy is metered.
        grid_kg_per_kwh: kg of CO2 equivalents for a kWh.
    """

    batch: int
    epoch_samples: int
    watts: float | None
    grid_kg_per_kwh: float

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return steps_of_epoch(self.epoch_samples, self.batch)


@dataclass(frozen=True)
class Request:
    """What is measured, and how.

    Attributes:
        batches: batch sizes of the forward pass; None stands for the saturated one.
        repeats: rounds; in each, the dense network and a ticket run once.
        device: that networks run on.
        execution: what they are converted to.
        training: None: it is not measured.
    """

    batches: tuple[int | None, ...]
    repeats: int
    device: torch.device
    execution: Execution
    training: Training | None


@dataclass(frozen=True)
class _Alone:
    """What is measured of a network without another beside it."""

    params: int
    macs: int
    paper_bytes: int
    passes: tuple[PeakMemory, ...]
    step: PeakMemory | None


class SideBySide:
    """Measures tickets beside their dense network.

    Args:
        dense: the network; what needs no ticket beside it is measured at once.
        inputs: that costs are counted on and batches made of.
        batches: batch sizes of the forward pass.
        request: everything else.

    Raises:
        MeasurementError: the network does not run, or does not train, on the inputs.
    """

    def __init__(
        self, dense: nn.Module, inputs: Any, batches: Sequence[int], request: Request
    ) -> None:
        self._dense = dense
        self._inputs = inputs
        self._batches = tuple(batches)
        self._request = request
        self._alone = self._measure_alone(dense)
        self._passes: list[tuple[Timing, ...]] = []
        self._steps: list[Timing] = []
        self._energies: list[Energy] = []
        self._tickets: list[NetworkFigures] = []

    @property
    def networks(self) -> tuple[NetworkFigures, ...]:
        """The dense network, then the tickets measured so far."""
        return (self._dense_figures(), *self._tickets)

    def add(self, name: str, removed: Sequence[str], ticket: nn.Module) -> None:
        """Measure a ticket; nothing is kept of one whose measuring fails or is interrupted."""
        alone = self._measure_alone(ticket)
        passes = self._time_passes(name, ticket)
        training, steps, energy = self._train(name, ticket, alone.step)
        latency = tuple(map(latency_figures, passes))
        self._tickets.append(self._figures(name, removed, alone, latency, training))
        self._passes.append(tuple(times.dense for times in passes))
        self._steps += steps
        self._energies += energy

    def _measure_alone(self, model: nn.Module) -> _Alone:
        request, inputs = self._request, self._inputs
        costs = model_costs(model, inputs)
        passes = tuple(
            inference_memory(model, inputs, batch_size=size, execution=request.execution)
            for size in self._batches
        )
        step = None
        if request.training is not None:
            step = training_memory(
                model, inputs, batch_size=request.training.batch, execution=request.execution
            )
        return _Alone(costs.params, costs.macs, paper_memory_bytes(model, inputs), passes, step)

    def _time_passes(self, name: str, ticket: nn.Module) -> tuple[Beside, ...]:
        timed = compare_latency(
            {DENSE: self._dense, name: ticket},
            self._inputs,
            batch_sizes=self._batches,
            repeats=self._request.repeats,
            execution=self._request.execution,
        )
        return tuple(map(Beside, timed[name], timed[DENSE]))

    def _train(
        self, name: str, ticket: nn.Module, memory: PeakMemory | None
    ) -> tuple[TrainingFigures | None, list[Timing], list[Energy]]:
        """Return a ticket's figures, and the dense network's times and energies beside it."""
        training = self._request.training
        if training is None or memory is None:
            return None, [], []
        timed = compare_training(
            {DENSE: self._dense, name: ticket},
            self._inputs,
            batch_sizes=(training.batch,),
            repeats=self._request.repeats,
            execution=self._request.execution,
        )
        [own], [dense] = timed[name], timed[DENSE]
        times = Beside(own, dense)
        if training.watts is not None:
            return self._training(times, memory, self._by_formula(own), None), [dense], []
        energy, dense_energy = (self._metered(model) for model in (ticket, self._dense))
        figures = self._training(times, memory, energy, dense_energy)
        return figures, [dense], [dense_energy]

    def _training(
        self, times: Beside, memory: PeakMemory, energy: Energy, dense_energy: Energy | None
    ) -> TrainingFigures:
        training = self._request.training
        assert training is not None
        # By formula CO2 is time, and of the time the share round by round is the better figure.
        share = times.own.ratio_to(times.dense)
        if dense_energy is not None and dense_energy.kwh > 0:
            share = energy.kwh / dense_energy.kwh
        beside = memory_figures(memory, self._alone.step or memory)
        return training_figures(times, training.steps, beside, energy, 100 * share)

    def _by_formula(self, step: Timing) -> Energy:
        training = self._request.training
        assert training is not None
        assert training.watts is not None
        seconds = training.steps * step.median_ms / 1e3
        return formula_energy(seconds, training.watts, training.grid_kg_per_kwh)

    def _metered(self, model: nn.Module) -> Energy:
        training = self._request.training
        assert training is not None
        one = metered_step(
            model,
            self._inputs,
            batch_size=training.batch,
            grid_kg_per_kwh=training.grid_kg_per_kwh,
            execution=self._request.execution,
        )
        return one.times(training.steps)

    def _dense_figures(self) -> NetworkFigures:
        passes = [joined(times) for times in zip(*self._passes, strict=True)]
        latency = tuple(latency_figures(Beside(times, times)) for times in passes)
        training = None
        if self._steps and self._alone.step is not None:
            steps = joined(self._steps)
            energy = mean_energy(self._energies) if self._energies else self._by_formula(steps)
            training = self._training(Beside(steps, steps), self._alone.step, energy, energy)
        return self._figures(DENSE, (), self._alone, latency, training)

    def _figures(
        self,
        name: str,
        removed: Sequence[str],
        alone: _Alone,
        latency: Any,
        training: TrainingFigures | None,
    ) -> NetworkFigures:
        dense = self._alone
        memory = zip(alone.passes, dense.passes, strict=True)
        return NetworkFigures(
            name=name,
            removed=tuple(removed),
            params=alone.params,
            params_saved_percent=percent_saved(dense.params, alone.params),
            macs=alone.macs,
            macs_saved_percent=percent_saved(dense.macs, alone.macs),
            paper_memory_bytes=alone.paper_bytes,
            paper_memory_saved_percent=percent_saved(dense.paper_bytes, alone.paper_bytes),
            latency=latency,
            memory=tuple(memory_figures(own, whole) for own, whole in memory),
            training=training,
        )
