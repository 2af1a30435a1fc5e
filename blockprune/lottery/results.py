"""What an experiment found: plain values, read and written as JSON, no torch needed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, computed_field

__all__ = ["Comparison", "ExperimentResult", "NetworkResult", "RecoveredResult"]


class NetworkResult(BaseModel):
    """One trained network: the dense one (``p = 0``) or a ticket.

    Attributes:
        p: blocks asked to be removed.
        removed: their names, in execution order.
        blocks: residual blocks left, those that cannot be removed counted.
        params: parameters (elements) left.
        macs: multiply-accumulates of one image.
        accuracy: on the test images after the last epoch, in [0, 1].
        train_seconds: wall-clock time of all epochs, evaluation not included.
        latency_ms: median time of one forward pass of ``latency_batch_size`` images.
        latency_iqr_ms: interquartile range of that time.
    """

    model_config = ConfigDict(frozen=True)

    p: int
    removed: tuple[str, ...]
    blocks: int
    params: int
    macs: int
    accuracy: float
    train_seconds: float
    latency_ms: float
    latency_iqr_ms: float


class RecoveredResult(BaseModel):
    """The trained dense network without some blocks, as it is and recovered, not trained again.

    Attributes:
        criterion: what ranked the blocks of the trained network.
        method: of `blockprune.recover`.
        samples: training images that the recovery read.
        cut: the network that has lost its blocks; ``train_seconds`` is 0.
        recovered: the same with the weights of the recovery; ``train_seconds`` is what that took.
    """

    model_config = ConfigDict(frozen=True)

    criterion: str
    method: str
    samples: int
    cut: NetworkResult
    recovered: NetworkResult


class Comparison(BaseModel):
    """A network against the dense one.

    Attributes:
        p: of the network compared.
        difference_points: accuracy minus the dense accuracy, in percentage points.
        winning: ``difference_points + xi_points >= 0``.
        macs_saved_percent: share of the dense network's MACs that is gone.
        training_speed_up: dense training time divided by this one's.
        latency_speed_up: dense latency divided by this one's.
    """

    model_config = ConfigDict(frozen=True)

    p: int
    difference_points: float
    winning: bool
    macs_saved_percent: float
    training_speed_up: float
    latency_speed_up: float


class ExperimentResult(BaseModel):
    """A dense network and its tickets, trained alike.

    Attributes:
        model: name of the dense network.
        data: name of the data set.
        image_shape: ``(channels, height, width)``; MACs and latency are for this shape.
        train_images: number of training images.
        test_images: number of test images; accuracies are multiples of one over this.
        criterion: what ranked the blocks.
        seed: of the weights, the scoring batch and the data order.
        epochs: that every network was trained for.
        batch_size: images a step of training.
        latency_batch_size: images of one timed forward pass.
        threads: of torch, while training and timing.
        device: that the networks ran on.
        xi_points: tolerance of a winning ticket, in percentage points.
        scores: of every removable block, in execution order; higher is kept.
        protected: names of the blocks that the policy never removes.
        min_blocks_per_stage: residual blocks that every stage keeps.
        dense: the dense network.
        tickets: in the order of ``p``.
        recovered: the dense network, cut after training; None if that was not asked for.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    data: str
    image_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    criterion: str
    seed: int
    epochs: int
    batch_size: int
    latency_batch_size: int
    threads: int
    device: str
    xi_points: float
    scores: dict[str, float]
    protected: tuple[str, ...]
    min_blocks_per_stage: int
    dense: NetworkResult
    tickets: tuple[NetworkResult, ...]
    recovered: RecoveredResult | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Each ticket against the dense network, in the order of ``tickets``."""
        return tuple(self._compare(ticket) for ticket in self.tickets)

    def to_json(self) -> str:
        """Return the result as indented JSON, the comparisons included."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ExperimentResult:
        """Read what :meth:`to_json` wrote; ``pydantic.ValidationError`` where it does not fit."""
        return cls.model_validate_json(text)

    def _compare(self, ticket: NetworkResult) -> Comparison:
        # Accuracies are counts divided by a count: rounding away the last digits keeps a
        # difference of exactly xi a win.
        difference = round(100 * (ticket.accuracy - self.dense.accuracy), 9)
        return Comparison(
            p=ticket.p,
            difference_points=difference,
            winning=difference + self.xi_points >= 0,
            macs_saved_percent=100 * (1 - ticket.macs / self.dense.macs),
            training_speed_up=self.dense.train_seconds / ticket.train_seconds,
            latency_speed_up=self.dense.latency_ms / ticket.latency_ms,
        )
