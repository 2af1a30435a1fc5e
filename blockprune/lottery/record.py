"""What a run of the lottery found: plain values, read and written as JSON, no torch needed.

`RunRecord` is all that a report reads. Accuracies are shares in [0, 1], differences percentage
points, times seconds, moments of training are `Step`s.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from blockprune.lottery.steps import Step

__all__ = [
    "RECORD_VERSION",
    "BlockRecord",
    "EpochFigures",
    "NetworkRecord",
    "RunRecord",
    "ScoreRecord",
    "SimilarityRecord",
    "TicketCase",
    "Verdict",
    "VerdictRecord",
]

RECORD_VERSION: Final = 1

Kind = Literal["dense", "ticket", "random", "scratch"]
"""The dense network; a ticket; blocks removed at random; a ticket's depth from new weights."""

Weights = Literal["rewind", "learning-rate", "reinit", "finetune"]
"""Weights policies: see `blockprune.lottery.weights`."""

Verdict = Literal["wins", "ties", "loses", "not enough seeds"]


class _Value(BaseModel):
    # A similarity with what never varies is NaN, and must come back from the file as such.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class TicketCase(_Value):
    """What all seeds of one kind of ticket share.

    Attributes:
        kind: of the network.
        criterion: that chose the blocks; None for the dense network, "random" for that control,
            for a ticket from scratch that of the ticket whose blocks it has.
        p: blocks removed.
        scored_at: the moment of dense training whose weights were scored; None where none were.
        weights: what the ticket's weights and schedule start from; None for the dense network.
        rewound_to: the moment that the policy goes back to; None where it does not.
        schedule: "one-shot" or "iterative".
        early_bird: whether the ticket was drawn, and its weights are from, when masks had settled:
            at an epoch that each seed has of its own, so that `scored_at` is None.
    """

    kind: Kind
    criterion: str | None = None
    p: int = 0
    scored_at: Step | None = None
    weights: Weights | None = None
    rewound_to: Step | None = None
    schedule: Literal["one-shot", "iterative"] = "one-shot"
    early_bird: bool = False

    def label(self) -> str:
        """Return the case in a few words, for tables and legends."""
        if self.kind == "dense":
            return "dense"
        words = [self._who(), f"p={self.p}"]
        if self.scored_at is not None:
            words.append(f"scored at {self.scored_at}")
        if self.early_bird:
            words.append("early bird")
        if self.weights in ("learning-rate", "finetune") or self._is_reinitialised_ticket:
            words.append(str(self.weights))
        if self.rewound_to is not None and self.rewound_to != Step(epoch=0):
            words.append(f"rewound to {self.rewound_to}")
        if self.schedule == "iterative":
            words.append("iterative")
        return ", ".join(words)

    def _who(self) -> str:
        if self.kind == "scratch":
            return f"scratch of {self.criterion}" if self.criterion else "scratch"
        return str(self.criterion) if self.kind == "ticket" else self.kind

    @property
    def _is_reinitialised_ticket(self) -> bool:
        # A ticket from scratch has new weights by its name.
        return self.weights == "reinit" and self.kind != "scratch"


class EpochFigures(_Value):
    """One pass over the training data; `epoch` is 1-based, loss and accuracy are of training."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    test_accuracy: float | None = None


class NetworkRecord(_Value):
    """One trained network.

    Attributes:
        case: what it is.
        seed: of its weights, data order and draws.
        removed: names of the blocks that went, in order of execution.
        blocks: residual blocks left, those that cannot be removed counted.
        params: parameters (elements).
        macs: multiply-accumulates of one sample.
        accuracy: on the test set after the last epoch.
        loss: likewise.
        epochs: those this network trained itself, those before a rewind not counted.
        latency_ms: median time of one forward pass of `RunRecord.latency_batch`; None unmeasured.
        latency_iqr_ms: its interquartile range.
        drawn_at: of an early-bird ticket, the epoch at which masks had settled; None otherwise.
        stage: the directory of the run that holds its weights.
    """

    case: TicketCase
    seed: int
    removed: tuple[str, ...] = ()
    blocks: int
    params: int
    macs: int
    accuracy: float
    loss: float
    epochs: tuple[EpochFigures, ...]
    latency_ms: float | None = None
    latency_iqr_ms: float | None = None
    drawn_at: Step | None = None
    stage: str

    @property
    def seconds(self) -> float:
        """Wall-clock time of its training, evaluation not included."""
        return sum(epoch.seconds for epoch in self.epochs)


class ScoreRecord(_Value):
    """The scores of all blocks under one criterion at one moment, for one seed."""

    criterion: str
    scored_at: Step
    seed: int
    scores: dict[str, float]


class VerdictRecord(_Value):
    """Whether a case wins, by equation 1 of papers/000: accuracy(ticket) + xi >= accuracy(dense).

    Attributes:
        case: what is judged.
        differences: by seed, its accuracy minus that of the dense network of that seed.
        winning: by seed, whether difference + xi >= 0.
        mean: of the differences.
        interval: of the mean, paired over seeds, at the run's confidence; None below two seeds.
        against_random: mean difference to the random control of the same p, None without one.
        against_random_interval: likewise.
        verdict: "wins" where the whole interval is at or above -xi, "loses" where it is below,
            "ties" where it holds -xi; "not enough seeds" below two.
    """

    case: TicketCase
    differences: dict[int, float]
    winning: dict[int, bool]
    mean: float
    interval: tuple[float, float] | None
    against_random: float | None = None
    against_random_interval: tuple[float, float] | None = None
    verdict: Verdict


class BlockRecord(_Value):
    """One residual merge of the dense network, in order of execution.

    Attributes:
        name: of the block, or of the refused merge.
        stage: index of its stage, by shape.
        shape: of one sample's merge.
        params: that vanish with it; 0 where it stays.
        macs: likewise, of one sample.
        removable: whether it is a block; where not, `reason` says why.
        reason: of the refusal.
    """

    name: str
    stage: int
    shape: tuple[int, ...]
    params: int = 0
    macs: int = 0
    removable: bool = True
    reason: str | None = None


class SimilarityRecord(_Value):
    """Linear CKA between the blocks of the dense network and those of another.

    Attributes:
        case: the other network.
        seed: of both.
        rows: blocks of the dense network.
        columns: blocks of the other.
        values: one row for each of `rows`.
    """

    case: TicketCase
    seed: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


class RunRecord(_Value):
    """All that one run found.

    Attributes:
        name: of the run, from its spec.
        spec: the spec as it was read, with the defaults filled in.
        command: that makes the run again.
        environment: versions, cores, device; nothing that names a person or a machine.
        data: name of the data set, number of its images, their shape and number of classes.
        xi_points: tolerance of a winning ticket, in percentage points.
        confidence: of all intervals.
        latency_batch: samples of one timed forward pass; None where none was timed.
        blocks: every residual merge of the dense network.
        networks: every trained network.
        scores: of the blocks.
        verdicts: one for each case but the dense one.
        similarities: where the spec asks for them.
        failures: stage to error, of what could not be done; all else is complete.
        notes: what a reader must know before believing a figure.
    """

    version: Literal[1] = RECORD_VERSION
    name: str
    spec: dict[str, Any]
    command: str
    environment: dict[str, str | int | float | None]
    data: dict[str, str | int | tuple[int, ...]]
    xi_points: float
    confidence: float
    latency_batch: int | None = None
    blocks: tuple[BlockRecord, ...]
    networks: tuple[NetworkRecord, ...]
    scores: tuple[ScoreRecord, ...]
    verdicts: tuple[VerdictRecord, ...]
    similarities: tuple[SimilarityRecord, ...] = ()
    failures: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the record as indented JSON; equal records give equal text."""
        return self.model_dump_json(indent=2) + "\n"

    def without_times(self) -> RunRecord:
        """Return the record without what clocks said, which two runs of one spec never agree in.

        All else is the same, on a CPU to the last bit, however often a run was interrupted.
        """
        networks = [
            network.model_copy(
                update={
                    "latency_ms": None,
                    "latency_iqr_ms": None,
                    "epochs": tuple(e.model_copy(update={"seconds": 0.0}) for e in network.epochs),
                }
            )
            for network in self.networks
        ]
        return self.model_copy(update={"networks": tuple(networks)})

    @classmethod
    def from_json(cls, text: str | bytes) -> RunRecord:
        """Read what `to_json` wrote; `pydantic.ValidationError` where it does not fit."""
        return cls.model_validate_json(text)
