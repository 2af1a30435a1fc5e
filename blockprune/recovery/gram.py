"""Sums over samples and positions that a least-squares fit needs, and nothing of the samples.

For D = [Z 1], targets R and weights m of the rows:

    G = sum m D^T D        (columns + 1, columns + 1)
    B = sum m D^T R        (columns + 1, outputs)
    S = sum m R^2          (outputs)

so that the weighted squared error of a matrix P is sum over outputs c of
S_c - 2 P_c . B_c + P_c^T G P_c. All are float64, for each group of channels by itself.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Gram", "with_ones"]


def with_ones(inputs: Tensor) -> Tensor:
    """Return [Z 1]."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)


@dataclasses.dataclass
class Gram:
    """The sums; the first dimension of each is the groups.

    Attributes:
        products: G.
        targets: B.
        squares: S.
        rows: how many rows with a weight have been added.
    """

    products: Tensor
    targets: Tensor
    squares: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, columns: int, outputs: int, device: torch.device) -> Gram:
        """Return sums over nothing."""

        def make(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        return cls(make(columns + 1, columns + 1), make(columns + 1, outputs), make(outputs))

    def add(self, inputs: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Add rows.

        Args:
            inputs: Z, (groups, rows, columns).
            wanted: R, (groups, rows, outputs).
            weights: m, (groups, rows).
        """
        inputs, wanted, weights = inputs.double(), wanted.double(), weights.double()
        design = with_ones(inputs)
        weighted = (design * weights.unsqueeze(-1)).transpose(1, 2)
        self.products += weighted @ design
        self.targets += weighted @ wanted
        self.squares += (weights.unsqueeze(-1) * wanted**2).sum(dim=1)
        self.rows += int((weights[0] > 0).sum())

    def errors(self, matrix: Tensor) -> Tensor:
        """Return the squared errors of a matrix, (groups, columns + 1, outputs), by output."""
        fitted = self.products @ matrix
        return self.squares + ((fitted - 2 * self.targets) * matrix).sum(dim=1)

    def __add__(self, other: Gram) -> Gram:
        return Gram(
            self.products + other.products,
            self.targets + other.targets,
            self.squares + other.squares,
            self.rows + other.rows,
        )
