"""A moment of training as one type: nobody asks whether a number means epochs or batches."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Step"]


class Step(BaseModel):
    """A moment of training: whole epochs done, and batches done of the epoch that follows.

    Example:
        >>> from blockprune.lottery.steps import Step
        >>> Step.of_iterations(25, per_epoch=10)
        Step(epoch=2, iteration=5)
        >>> Step(epoch=2, iteration=5).iterations(per_epoch=10)
        25
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(default=0, ge=0, description="Whole passes over the training data.")
    iteration: int = Field(default=0, ge=0, description="Batches of the pass that follows.")

    @classmethod
    def of_iterations(cls, iterations: int, per_epoch: int) -> Self:
        """Return the moment after so many batches in all."""
        epoch, iteration = divmod(iterations, per_epoch)
        return cls(epoch=epoch, iteration=iteration)

    def iterations(self, per_epoch: int) -> int:
        """Return how many batches in all have been done."""
        return self.epoch * per_epoch + self.iteration

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" + {self.iteration} it" if self.iteration else "")
