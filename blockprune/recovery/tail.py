"""What lies between a linear operation and the stream that it adds into.

For the operation's result y and the stream u, the tail is u = c + A y. Where A only moves numbers
and multiplies each channel by a number (a normalisation with fixed statistics, a layer scale, a
reshape, windows that are put back), A^T A is diagonal, and a fit of u becomes a weighted one of y:

    min over Y  sum w (u_wanted - u - A (Y - y))^2  =  min over Y  sum A^T(w A 1) (Y - R)^2 + const,
    R = y + A^T(w (u_wanted - u)) / A^T(w A 1)

A is never written down. A^T is what autograd does, and A what it does of A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Tail"]


class Tail:
    """The map from what an operation returned, a leaf, to a stream that was computed from it."""

    def __init__(self, stream: Tensor, leaf: Tensor) -> None:
        self._stream, self._leaf = stream, leaf

    @staticmethod
    def reaches(stream: Tensor, leaf: Tensor) -> bool:
        """Whether a stream depends on a leaf at all."""
        if not stream.requires_grad:
            return False
        [back] = torch.autograd.grad(
            stream, leaf, torch.ones_like(stream), retain_graph=True, allow_unused=True
        )
        return back is not None

    def forward(self, change: Tensor) -> Tensor:
        """Return A times a change of the leaf, of the shape of the stream."""
        probe = torch.zeros_like(self._stream, requires_grad=True)
        [back] = torch.autograd.grad(self._stream, self._leaf, probe, create_graph=True)
        if not back.requires_grad:
            return torch.zeros_like(self._stream)
        [found] = torch.autograd.grad(back, probe, change, allow_unused=True)
        return torch.zeros_like(self._stream) if found is None else found

    def backward(self, change: Tensor) -> Tensor:
        """Return A^T times a change of the stream, of the shape of the leaf."""
        [found] = torch.autograd.grad(self._stream, self._leaf, change, retain_graph=True)
        return found
