"""Resampling of image batches: each image by itself, so that the batch does not matter."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from blockprune.robustness.draws import Array

__all__ = ["blurred", "length_scale", "moved", "sampled", "streaked", "zoomed"]

NATIVE_SIZE = 32
"""Height and width in pixels that the published parameters are for."""


def length_scale(images: Array) -> float:
    """Return what a length in pixels at 32 x 32 is multiplied by.

    Images larger than 32 in both directions scale it in proportion to the shorter side.
    Smaller ones keep it: what is a fraction of a pixel would blur nothing.
    """
    height, width = images.shape[-2:]
    return max(1.0, float(min(height, width)) / NATIVE_SIZE)


def blurred(images: Array, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Return images ``(..., H, W)`` under a Gaussian of ``sigma`` pixels."""
    deviations = (*(0.0 for _ in images.shape[:-2]), sigma, sigma)
    found: Array = ndimage.gaussian_filter(images, deviations, mode=mode, truncate=truncate)
    return found


def zoomed(images: Array, factor: float) -> Array:
    """Return images ``(..., H, W)`` enlarged about their centre, linearly between pixels.

    The factor is met exactly; the published code rounds it to whole pixels.
    """
    rows, columns = (_zoom_matrix(size, factor) for size in images.shape[-2:])
    return rows @ (images @ columns.T)


def _zoom_matrix(size: int, factor: float) -> Array:
    centre = (size - 1) / 2
    places = np.clip(centre + (np.arange(size) - centre) / factor, 0, size - 1)
    below = np.minimum(places.astype(np.int64), size - 2)
    share = places - below
    matrix = np.zeros((size, size))
    matrix[np.arange(size), below] = 1 - share
    matrix[np.arange(size), below + 1] += share
    return matrix


def moved(images: Array, down: Array, right: Array) -> Array:
    """Return images ``(N, C, H, W)`` moved by whole pixels, each by its own; edges repeat."""
    count, channels, height, width = images.shape
    rows = np.clip(np.arange(height) + down[:, None].astype(np.int64), 0, height - 1)
    columns = np.clip(np.arange(width) + right[:, None].astype(np.int64), 0, width - 1)
    return images[
        np.arange(count)[:, None, None, None],
        np.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def streaked(images: Array, radius: float, sigma: float, degrees: Array) -> Array:
    """Return images ``(N, C, H, W)`` blurred to one side, each along its own angle.

    Pixel ``i`` of ``2 ceil(radius) + 1`` on the line has the weight ``exp(-i^2 / (2 sigma^2))``,
    which is the motion blur of ImageMagick that the published images were made with.
    """
    angles = np.deg2rad(degrees)
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    found = np.zeros_like(images)
    for step, weight in zip(steps, weights, strict=True):
        down = np.ceil(step * np.cos(angles) - 0.5)
        right = np.ceil(step * np.sin(angles) - 0.5)
        found += weight * moved(images, down, right)
    return found


def sampled(images: Array, rows: Array, columns: Array) -> Array:
    """Return what images ``(N, C, H, W)`` show at places ``(N, H, W)`` in pixels.

    Linear between pixels; beyond the edge pixels (not repeated) the image is mirrored.
    """
    height, width = images.shape[-2:]
    places = np.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], axis=-1)
    found: Array = functional.grid_sample(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(places),
        padding_mode="reflection",
        align_corners=True,
    ).numpy()
    return found
