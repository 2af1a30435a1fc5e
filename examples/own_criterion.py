"""Rank the blocks of a model of your own with a criterion of your own.

A criterion is any callable that gives every block a number; the lowest goes first. This one is the
mean absolute weight of a block, so it needs no data.

    python examples/own_criterion.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import blockprune
from blockprune.criteria import ScoringContext


class Mixer(nn.Module):
    """A residual perceptron: ``x + down(gelu(up(norm(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def mean_weight(context: ScoringContext) -> dict[str, float]:
    """Return the mean of ``|w|`` over the weights of each block."""
    scores = {}
    for block in context.blocks:
        weights = [weight.detach().abs().flatten() for weight in context.weights(block).values()]
        scores[block.name] = torch.cat(weights).mean().item()
    return scores


def main() -> None:
    """Cut two of six mixers and check the ticket by hand."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(10, 32), *(Mixer(32) for _ in range(6)), nn.Linear(32, 3))
    inputs = torch.randn(8, 10)
    ticket = blockprune.prune(dense, criterion=mean_weight, p=2, example_inputs=inputs)
    plan = blockprune.plan_of(ticket)
    for name, score in plan.scores.items():
        print(f"block {name}: {score:.4f} {'removed' if name in plan.remove else 'kept'}")

    kept = [layer for name, layer in dense.named_children() if name not in plan.remove]
    print(
        "equal to the layers that are left:",
        torch.equal(nn.Sequential(*kept)(inputs), ticket(inputs)),
    )


if __name__ == "__main__":
    main()
