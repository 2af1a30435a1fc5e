"""How a ticket is trained towards its dense model, as one value; and where a recovery stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Distillation", "OnProgress", "Progress"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Progress(BaseModel):
    """Where a recovery stands.

    Attributes:
        done: gaps fitted, or steps taken.
        total: of all.
        loss: of the latest step of a distillation; None for other methods.
    """

    model_config = ConfigDict(frozen=True)

    done: int
    total: int
    loss: float | None = None


OnProgress = Callable[[Progress], None]


class Distillation(BaseModel):
    """The recipe of `recover(..., "distill")`.

    With z the main output of the ticket and t that of the dense model, u the stream of the ticket
    at a merge that both have (in front of a gap: h is what the dense model has behind it) and h
    that of the dense model, each step lowers::

        temperature^2 * KL(softmax(t / temperature) | softmax(z / temperature))
        + stream * mean over merges of |u - h|^2 / |h|^2
        + labels * loss of the labels

    The optimiser is AdamW. Its rate rises over the share `warmup` of all steps and then falls to
    zero as a cosine.

    A field out of range, or an unknown one, raises `pydantic.ValidationError` (a `ValueError`).

    Example:
        >>> from blockprune.recovery import Distillation
        >>> recipe = Distillation(epochs=3, lr=1e-4, lora_rank=8)
        >>> recipe.learning_rate(0, 100) < recipe.learning_rate(9, 100) == 1e-4
        True

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015; Romero et al.,
        "FitNets: hints for thin deep nets", 2015, for the stream; Hu et al., "LoRA: low-rank
        adaptation of large language models", 2022.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    lr: Positive = Field(default=1e-3, description="Highest learning rate.")
    weight_decay: Weight = Field(default=0.0, description="Decoupled, as in AdamW.")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps.")
    max_grad_norm: Positive = Field(default=1.0, description="Longer gradients are shortened.")
    temperature: Positive = Field(default=2.0, description="Of the softmax of both outputs.")
    outputs: Literal["kl", "mse"] = Field(
        default="kl",
        description='"mse": relative squared error in place of KL, for outputs that are no logits.',
    )
    stream: Weight = Field(default=1.0, description="Weight of the stream.")
    labels: Weight = Field(default=0.0, description="Weight of the loss of the labels.")
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Train low-rank adapters of the linear operations alone, and merge them.",
    )
    fixed_norms: bool = Field(
        default=False,
        description="Batch normalisation keeps its running statistics, as for batches of a few.",
    )
    batch_size: int = Field(
        default=64, ge=1, description="Samples a step where the data are a single batch."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Of the data order and of what the network draws."
    )

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the rate of a step (0-based) of `steps`."""
        warmup = self.warmup * steps
        if step < warmup:
            return self.lr * min(1.0, (step + 1) / warmup)
        share = (step - warmup) / (steps - warmup)
        return self.lr * (1 + math.cos(math.pi * share)) / 2
