"""Corruptions that spread each pixel over its surroundings."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from blockprune.robustness.draws import Array, Draws
from blockprune.robustness.warping import blurred, length_scale, streaked, zoomed

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"]


def gaussian_blur(images: Array, severity: int, draws: Draws) -> Array:
    """Blur by a Gaussian of 0.4 ... 1 pixels."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1)[severity - 1]
    return blurred(images, sigma * length_scale(images))


def defocus_blur(images: Array, severity: int, draws: Draws) -> Array:
    """Blur by a disc of radius 0.3 ... 1.5 pixels, its edge softened by a Gaussian."""
    radius, edge = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    scale = length_scale(images)
    found: Array = ndimage.correlate(
        images, _disc(radius * scale, edge * scale)[None, None], mode="mirror"
    )
    return found


def _disc(radius: float, edge: float) -> Array:
    # Two pixels more on each side hold the soft edge.
    reach = int(np.ceil(radius)) + 2
    places = np.arange(-reach, reach + 1)
    inside = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    disc: Array = ndimage.gaussian_filter(inside, edge, radius=min(reach, 1 + int(2 * edge)))
    disc /= disc.sum()
    return disc


def glass_blur(images: Array, severity: int, draws: Draws) -> Array:
    """Blur, let each pixel show one of its neighbours, blur again.

    As in the published code a pixel takes the value of the neighbour drawn, up or to the left
    by at most 1, and the neighbour keeps its own; the loops over the pixels run from the lower
    right, so that values can wander.
    """
    sigma, reach, rounds = (
        (0.05, 1, 1),
        (0.25, 1, 1),
        (0.4, 1, 1),
        (0.25, 1, 2),
        (0.4, 1, 2),
    )[severity - 1]
    scale = length_scale(images)
    reach = round(reach * scale)
    height, width = images.shape[-2:]
    found = blurred(images, sigma * scale)
    shifts = np.floor(draws.uniform(rounds, height, width, 2, low=-reach, high=reach))
    shifts = shifts.astype(np.int64)
    rows = np.arange(len(images))
    for turn in range(rounds):
        for y in range(height - reach, reach, -1):
            for x in range(width - reach, reach, -1):
                right, down = shifts[:, turn, y, x].T
                found[:, :, y, x] = found[rows, :, y + down, x + right]
    return blurred(found, sigma * scale)


def motion_blur(images: Array, severity: int, draws: Draws) -> Array:
    """Blur to one side along a line at -45 to 45 degrees."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    scale = length_scale(images)
    return streaked(images, radius * scale, sigma * scale, draws.uniform(low=-45, high=45))


def zoom_blur(images: Array, severity: int, draws: Draws) -> Array:
    """Average the image and enlargements of it, by 1, 1.01, ... up to 1.05 ... 1.25."""
    steps = (6, 11, 16, 21, 26)[severity - 1]
    total = images.copy()
    for step in range(steps):
        total += zoomed(images, 1 + step / 100)
    return total / (steps + 1)
