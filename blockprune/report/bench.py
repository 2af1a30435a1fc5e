"""What a benchmark of a dense network and its tickets measured: plain values, no torch.

The fields of a network are absolute; those that end in ``percent`` or begin with ``speed_up`` are
against the dense network. Intervals hold with the confidence of the result, and are null where the
rounds are too few for one.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = [
    "BenchResult",
    "EnergyFigure",
    "LatencyFigures",
    "MemoryFigures",
    "NetworkFigures",
    "TrainingFigures",
    "TrainingSettings",
]

Pair = tuple[float, float] | None


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class LatencyFigures(_Value):
    """Time of one forward pass.

    Attributes:
        batch: samples in the batch.
        median_ms, iqr_ms, interval_ms: median over the rounds, interquartile range, interval.
        samples_per_s: throughput at the median.
        percent, percent_interval: of the dense network's time, paired round by round.
        speed_up, speed_up_interval: the dense network's time over this one's, likewise.
    """

    batch: int
    median_ms: float
    iqr_ms: float
    interval_ms: Pair
    samples_per_s: float
    percent: float
    percent_interval: Pair
    speed_up: float
    speed_up_interval: Pair


class MemoryFigures(_Value):
    """Peak memory of one forward pass, or of one training step.

    Attributes:
        batch: samples in the batch.
        peak_bytes: the most that is held at one time, the state included.
        state_bytes: parameters, buffers, inputs; in training also the optimiser's state.
        percent: of the dense network's peak.
        source: how it was found.
    """

    batch: int
    peak_bytes: int
    state_bytes: int
    percent: float
    source: str


class EnergyFigure(_Value):
    """Energy that one part of the machine uses for one epoch of training.

    Attributes:
        part: "CPU", "GPU", "RAM", or "device" for the formula.
        kwh: of one epoch.
        measured: whether a counter was read; False: an estimate.
        source: the counter, or what the estimate assumes.
    """

    part: str
    kwh: float
    measured: bool
    source: str


class TrainingFigures(_Value):
    """One step of training, and an epoch of such steps.

    Attributes:
        batch: samples a step.
        step_ms, step_iqr_ms, step_interval_ms: of one step.
        epoch_seconds, epoch_interval_seconds: of one epoch.
        percent, percent_interval: of the dense network's time, paired round by round.
        speed_up, speed_up_interval: the dense network's time over this one's, likewise.
        memory: peak of one step.
        kwh, co2_kg: of one epoch.
        co2_percent: of the dense network's CO2.
        energy: the same by parts of the machine, each with its source.
    """

    batch: int
    step_ms: float
    step_iqr_ms: float
    step_interval_ms: Pair
    epoch_seconds: float
    epoch_interval_seconds: Pair
    percent: float
    percent_interval: Pair
    speed_up: float
    speed_up_interval: Pair
    memory: MemoryFigures
    kwh: float
    co2_kg: float
    co2_percent: float
    energy: tuple[EnergyFigure, ...]


class NetworkFigures(_Value):
    """One network: the dense one, which comes first, or a ticket.

    Attributes:
        name: "dense", or the budget of the ticket.
        removed: names of the blocks that are gone.
        params, macs: parameters; multiply-accumulates of the batch that was analysed.
        paper_memory_bytes: 4 bytes for each layer output and parameter, as in the papers' tables.
        latency, memory: one entry a batch size; the dense network's latency is empty until the
            first ticket was timed beside it.
        training: None where it was not asked for, and for the dense network until the first
            ticket was trained beside it.
    """

    name: str
    removed: tuple[str, ...]
    params: int
    params_saved_percent: float
    macs: int
    macs_saved_percent: float
    paper_memory_bytes: int
    paper_memory_saved_percent: float
    latency: tuple[LatencyFigures, ...] = ()
    memory: tuple[MemoryFigures, ...] = ()
    training: TrainingFigures | None = None


class TrainingSettings(_Value):
    """How training was measured.

    Attributes:
        batch: samples a step.
        epoch_samples: samples of one epoch.
        watts: of the formula; None: energy was metered.
        grid_kg_per_kwh: kg of CO2 equivalents for a kWh.
    """

    batch: int
    epoch_samples: int
    watts: float | None
    grid_kg_per_kwh: float


class BenchResult(_Value):
    """A dense network and its tickets, measured side by side.

    Attributes:
        model: as it was named.
        inputs: shapes of the inputs that were analysed.
        device: that the networks ran on.
        threads: of torch.
        execution: what the networks were converted to, such as "bfloat16"; "" where nothing.
        repeats: rounds; in each, the dense network and a ticket run once.
        confidence: of every interval.
        criterion, granularity: how blocks were chosen.
        training: None where it was not asked for.
        complete: whether all networks were measured; False: the run was interrupted, or goes on.
        networks: the dense one first, then the tickets measured so far.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    device: str
    threads: int
    execution: str
    repeats: int
    confidence: float
    criterion: str | None
    granularity: str
    training: TrainingSettings | None
    complete: bool
    networks: tuple[NetworkFigures, ...]

    def to_json(self) -> str:
        """Return the result as indented JSON."""
        return self.model_dump_json(indent=2) + "\n"
