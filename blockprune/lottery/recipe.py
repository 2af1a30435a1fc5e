"""How a network is trained, as one value that can be written down and compared."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PAPER_RECIPE", "Recipe"]

MOST_EPOCHS = 100_000

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """Stochastic gradient descent with momentum, and how its learning rate moves.

    With ``t`` the iterations done divided by those of an epoch, the rate is

    - ``t / warmup_epochs * lr`` while ``t < warmup_epochs``, whatever the schedule; then
    - ``"milestones"``: ``lr * gamma ** (milestones passed)``; without milestones, constant;
    - ``"one_cycle"``: ``lr * (1 + cos(pi * s)) / 2``, with ``s`` the share done of what
      follows the warm-up. Momentum stays as it is;
    - ``"linear"``: ``lr + (final_lr - lr) * s``.

    A field out of range, or an unknown one, raises ``pydantic.ValidationError`` (a
    ``ValueError``) that names it.

    Example:
        >>> from blockprune.lottery.recipe import Recipe
        >>> recipe = Recipe(epochs=10, lr=0.1, milestones=(5,))
        >>> recipe.learning_rate(0, 100), round(recipe.learning_rate(500, 100), 9)
        (0.1, 0.01)

    Source: Smith and Topin, "Super-convergence", 2019, for the one-cycle schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1, le=MOST_EPOCHS, description="Passes over the training data.")
    lr: Positive = Field(default=0.01, description="Highest learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the velocity.")
    nesterov: bool = Field(default=True, description="Look ahead along the velocity.")
    weight_decay: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="L2 penalty on every parameter."
    )
    schedule: Literal["milestones", "one_cycle", "linear"] = Field(
        default="milestones", description="What the learning rate does after the warm-up."
    )
    final_lr: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description='Where "linear" ends.'
    )
    milestones: tuple[int, ...] = Field(
        default=(), description="Epochs (0-based) that begin with the rate times gamma."
    )
    gamma: Positive = Field(default=0.1, description="Factor at each milestone.")
    warmup_epochs: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Epochs in which the rate rises to lr."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of the moving average of the weights, which is then what a run ends with.",
    )
    batch_size: int = Field(default=128, ge=1, description="Samples a step, in each process.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Of the data order and of all that training draws."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set nesterov=False.")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})."
            )
        if self.schedule != "milestones" and self.milestones:
            raise ValueError(
                f"milestones mean nothing to the {self.schedule} schedule; leave them out."
            )
        if self.final_lr and (self.schedule != "linear" or self.final_lr > self.lr):
            raise ValueError(
                f"final_lr ({self.final_lr}) is where the linear schedule ends, at or below lr."
            )
        if self.schedule == "one_cycle" and self.warmup_epochs == 0:
            raise ValueError("one_cycle rises before it falls; it needs warmup_epochs above 0.")
        bounds = (0, *self.milestones, self.epochs)
        if any(later <= earlier for earlier, later in pairwise(bounds)):
            raise ValueError(
                f"milestones must rise inside 1 .. {self.epochs - 1}, got {self.milestones}."
            )
        return self

    def learning_rate(self, iteration: int, iterations_per_epoch: int) -> float:
        """Return the rate of the step numbered ``iteration`` (0-based, over the whole run)."""
        # The first step of a warm-up counts as done, or it would be a step of length zero.
        warmup = self.warmup_epochs * iterations_per_epoch
        if iteration < warmup:
            return self.lr * min(1.0, (iteration + 1) / warmup)
        share = (iteration - warmup) / (self.epochs * iterations_per_epoch - warmup)
        if self.schedule == "one_cycle":
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "linear":
            return self.lr + (self.final_lr - self.lr) * share
        passed = sum(iteration >= start * iterations_per_epoch for start in self.milestones)
        return self.lr * self.gamma**passed


PAPER_RECIPE = Recipe(epochs=200, lr=0.01, milestones=(100, 150), batch_size=128)
"""What the paper's laboratory trains its CIFAR-10 networks with; the paper itself does not say."""
