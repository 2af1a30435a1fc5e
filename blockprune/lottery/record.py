"""What a run of the lottery found: plain values, read and written as JSON, no torch needed.

`RunRecord` is all that a report reads. Accuracies are shares in [0, 1], differences percentage
points, times seconds, moments of training are `Step`s.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from blockprune.lottery.steps import Step
from blockprune.robustness.record import RobustnessResult

__all__ = [
    "RECORD_VERSION",
    "BlockRecord",
    "ConnectionRecord",
    "ConnectivityRecord",
    "Distance",
    "EpochFigures",
    "MaskRecord",
    "Matched",
    "NetworkRecord",
    "OverlapRecord",
    "RobustnessRecord",
    "RunRecord",
    "ScoreRecord",
    "SimilarityRecord",
    "StabilityRecord",
    "Structure",
    "SurvivalRecord",
    "TicketCase",
    "Verdict",
    "VerdictRecord",
]

RECORD_VERSION: Final = 1

Kind = Literal["dense", "ticket", "random", "scratch"]
"""The dense network; a ticket; blocks removed at random; a ticket's depth from new weights."""

Structure = Literal["blocks", "filters", "weights"]
"""What a ticket lacks: whole residual blocks, filters of convolutions, single weights."""

Matched = Literal["params", "macs", "filters"]
"""What a ticket of filters or weights lacks as much of as the ticket of blocks beside it."""

Weights = Literal["rewind", "learning-rate", "reinit", "finetune", "partial-reinit"]
"""Weights policies: see `blockprune.lottery.weights`; "partial-reinit": new weights, but for those
connections that all tickets of the seed share, which keep their first ones."""

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
        p: blocks removed; of other structures matched to them, those of the ticket of blocks; 0
            where a level says how much went.
        scored_at: the moment of dense training whose weights were scored; None where none were.
        weights: what the ticket's weights and schedule start from; None for the dense network.
        rewound_to: the moment that the policy goes back to; None where it does not.
        schedule: "one-shot", "iterative", or of blocks "beam".
        early_bird: whether the ticket was drawn, and its weights are from, when masks had settled:
            at an epoch that each seed has of its own, so that `scored_at` is None.
        structure: what is removed.
        matched: of filters and weights beside a ticket of `p` blocks, what is equal.
        level: of weights, how many rounds of pruning made the mask; 0 elsewhere.
        scope: of weights, whether importances are compared over all layers, or each layer loses
            the same share.
    """

    kind: Kind
    criterion: str | None = None
    p: int = 0
    scored_at: Step | None = None
    weights: Weights | None = None
    rewound_to: Step | None = None
    schedule: Literal["one-shot", "iterative", "beam"] = "one-shot"
    early_bird: bool = False
    structure: Structure = "blocks"
    matched: Matched | None = None
    level: int = 0
    scope: Literal["global", "layers"] = "global"

    def label(self) -> str:
        """Return the case in a few words, for tables and legends."""
        if self.kind == "dense" and self.weights is None:
            return "dense"
        words = [self._who(), *self._how_much()]
        if self.scored_at is not None:
            words.append(f"scored at {self.scored_at}")
        if self.early_bird:
            words.append("early bird")
        is_plain = self.weights in (None, "rewind")
        if not is_plain and (self.weights != "reinit" or self._is_reinitialised_ticket):
            words.append(str(self.weights))
        if self.rewound_to is not None and self.rewound_to != Step(epoch=0):
            words.append(f"rewound to {self.rewound_to}")
        # New weights under the mask of a policy without a rewind, beside those of one with it.
        if self.kind == "scratch" and self.level and self.rewound_to is None:
            words.append("never rewound")
        # Levels are iterative unless they say otherwise, blocks are not.
        if self.schedule != ("iterative" if self.level else "one-shot"):
            words.append(self.schedule)
        if self.scope == "layers":
            words.append("by layers")
        return ", ".join(words)

    def _who(self) -> str:
        if self.kind == "scratch":
            return f"scratch of {self.criterion}" if self.criterion else "scratch"
        if self.kind == "random" and self.structure != "blocks":
            return f"random like {self.criterion}"
        return str(self.criterion) if self.kind == "ticket" else self.kind

    def _how_much(self) -> list[str]:
        if self.kind == "dense":
            return []
        if self.level:
            return [f"level {self.level}"]
        if self.structure == "blocks":
            return [f"p={self.p}"]
        return [f"{self.structure} like p={self.p} in {self.matched}"]

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
        params: parameters (elements) that are left; masked ones are not.
        macs: multiply-accumulates of one sample that these need. What computes with a mask
            multiplies by its zeros too, as its latency shows.
        filters: of all convolutions, those that went not counted; None in older records.
        narrowed: layer to filters that went.
        weights_left: of those that a mask may prune; None where there is no mask.
        weights_total: likewise, pruned or not.
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
    filters: int | None = None
    narrowed: dict[str, int] = Field(default_factory=dict)
    weights_left: int | None = None
    weights_total: int | None = None
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


class MaskRecord(_Value):
    """How many weights of each layer a mask left.

    Attributes:
        case: whose mask it is.
        seed: likewise.
        layers: weight tensor to those left and all of it, in order of the network.
        collapsed: those of which nothing is left (layer collapse, Tanaka et al., 2020).
    """

    case: TicketCase
    seed: int
    layers: dict[str, tuple[int, int]]
    collapsed: tuple[str, ...] = ()


class OverlapRecord(_Value):
    """How many connections tickets of one seed and level have in common (papers/003, section 5).

    Attributes:
        cases: two tickets, or all of a level.
        seed: of all of them.
        of_all: connections in all of the masks, as a share of all that can be pruned.
        of_surviving: likewise, of those that the smallest mask left.
        expected: what `of_surviving` would be of independent random masks of these sizes.
    """

    cases: tuple[TicketCase, ...]
    seed: int
    of_all: float
    of_surviving: float
    expected: float


class ConnectionRecord(_Value):
    """How steady the connections of a ticket are over the rounds that led to it (papers/003).

    The values of a connection are those after the training of each round, the dense one first.

    Attributes:
        case: the ticket of the last level.
        seed: of it.
        overlapping: connections that the tickets of all importances share.
        others: the ticket's other connections.
        spread: mean standard deviation of a connection's values: overlapping, others.
        sign_flips: share of connections whose sign was not always the same: likewise.
        None where there is no such connection.
    """

    case: TicketCase
    seed: int
    overlapping: int
    others: int
    spread: tuple[float | None, float | None]
    sign_flips: tuple[float | None, float | None]


class SurvivalRecord(_Value):
    """How many of the shared connections survive again after a partial re-initialisation.

    Attributes:
        case: the ticket that was found from the partly new weights.
        seed: of it.
        layers: weight tensor to shared connections, those of them that the new ticket has, and how
            many it would have by chance.
    """

    case: TicketCase
    seed: int
    layers: dict[str, tuple[int, int, float]]


class Distance(_Value):
    """How far two trained weights of one mask are apart (papers/004).

    Attributes:
        l2: Euclidean distance ||m * W - m * W'||.
        degrees: angle between m * W and m * W'.
    """

    l2: float
    degrees: float


class StabilityRecord(_Value):
    """How far noise carries a masked network (papers/004).

    Attributes:
        case: the masked network.
        seed: of it.
        to_pruning: distance to the dense network that was trained on the same order of the data.
        to_order: distance to the same masked network, trained on another order.
    """

    case: TicketCase
    seed: int
    to_pruning: Distance
    to_order: Distance


class ConnectivityRecord(_Value):
    """Test error on the line between a network trained on two orders of the data.

    Source: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", 2020.

    Attributes:
        case: the network.
        seed: of it.
        alphas: places on the line, 0 and 1 the two networks.
        errors: there, shares in [0, 1].
        instability: the highest error less the mean of both ends; stable below 0.02.
    """

    case: TicketCase
    seed: int
    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    instability: float


class RobustnessRecord(_Value):
    """How a network stands up to corruptions, other test sets and attacks.

    Attributes:
        case: of the network.
        seed: of it, and of all draws.
        result: what was measured; transferred attacks and agreement are with the dense network of
            the seed.
    """

    case: TicketCase
    seed: int
    result: RobustnessResult


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
        masks: of every network that has one.
        overlaps: of tickets of weights.
        connections: likewise.
        survivals: likewise.
        stabilities: where the spec asks for them.
        connectivities: likewise.
        robustness: likewise.
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
    masks: tuple[MaskRecord, ...] = ()
    overlaps: tuple[OverlapRecord, ...] = ()
    connections: tuple[ConnectionRecord, ...] = ()
    survivals: tuple[SurvivalRecord, ...] = ()
    stabilities: tuple[StabilityRecord, ...] = ()
    connectivities: tuple[ConnectivityRecord, ...] = ()
    robustness: tuple[RobustnessRecord, ...] = ()
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
