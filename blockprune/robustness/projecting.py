"""Bounds on changes of pixels that hold to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_pixels", "within"]


def cast_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return detached images in another dtype; pixels in [0, 1] stay there."""
    return images.detach().to(dtype).clamp(0, 1)


def within(clean: Tensor, changed: Tensor, epsilon: float | None) -> Tensor:
    """Return ``changed`` cut to [0, 1] and to within ``epsilon`` of ``clean``, in its dtype.

    ``|changed - clean| <= epsilon`` holds for the exact difference of the two floating-point
    numbers, which takes up to one step of their dtype from the bound.

    Args:
        clean: pixels in [0, 1].
        changed: of the same shape; a NaN becomes the clean pixel.
        epsilon: above 0; None: only [0, 1].

    Example:
        >>> import torch
        >>> from blockprune.robustness.projecting import within
        >>> within(torch.tensor([0.25, 0.9]), torch.tensor([0.3, 2.0]), 0.25)
        tensor([0.3000, 1.0000])
    """
    changed = torch.where(changed.isnan(), clean.to(changed.dtype), changed).to(clean.dtype)
    if epsilon is None:
        return changed.clamp(0, 1)
    wide = clean.double()
    upper = _inside(clean, wide + epsilon, epsilon)
    lower = _inside(clean, wide - epsilon, epsilon)
    return torch.maximum(torch.minimum(changed, upper), lower).clamp(0, 1)


def _inside(clean: Tensor, bound: Tensor, epsilon: float) -> Tensor:
    """Return the bound in the dtype of ``clean``, a step nearer where it is as far as epsilon.

    Also where it is just as far: double precision may have rounded that difference down.
    """
    rounded = bound.to(clean.dtype)
    far = (rounded.double() - clean.double()).abs() >= epsilon
    return torch.where(far, torch.nextafter(rounded, clean), rounded)
