"""Corruptions that lay weather over the image."""

from __future__ import annotations

import numpy as np

from blockprune.robustness.draws import Array, Draws
from blockprune.robustness.warping import blurred, length_scale, streaked, zoomed

__all__ = ["brightness_of", "fog", "frost", "snow", "spatter"]

# Of the three channels in what an eye calls bright (ITU-R BT.601).
_LUMINANCE = np.array([0.299, 0.587, 0.114])

ICE = np.array([0.82, 0.92, 1.0])
WATER = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255


def brightness_of(images: Array) -> Array:
    """Return ``(N, 1, H, W)``: what an eye calls bright, or the one channel there is."""
    if images.shape[1] == 1:
        return images
    seen: Array = np.einsum("nchw,c->nhw", images, _LUMINANCE)[:, None]
    return seen


def _colour(colour: Array, images: Array) -> Array:
    """Return a colour as it is on these images: its brightness where they are grey."""
    seen = colour if images.shape[1] == 3 else (colour @ _LUMINANCE)[None]
    return seen.reshape(-1, 1, 1)


def plasma(draws: Draws, height: int, width: int, decay: float) -> Array:
    """Return clouds ``(N, 1, height, width)`` in [0, 1], by the diamond-square algorithm.

    The noise of a step is ``decay`` times smaller than that of the step before.
    """
    size = 1 << (max(height, width) - 1).bit_length()
    clouds = np.zeros((draws.count, size, size))
    step, wobble = size, 100.0
    while step >= 2:
        half = step // 2

        def noise(points: Array, amount: float = wobble) -> Array:
            return points / 4 + amount * draws.uniform(*points.shape[1:], low=-amount, high=amount)

        corners = clouds[:, ::step, ::step]
        sums = corners + np.roll(corners, -1, axis=1)
        clouds[:, half::step, half::step] = noise(sums + np.roll(sums, -1, axis=2))
        middles = clouds[:, half::step, half::step]
        beside = corners + np.roll(corners, -1, axis=2)
        clouds[:, ::step, half::step] = noise(middles + np.roll(middles, 1, axis=1) + beside)
        below = corners + np.roll(corners, -1, axis=1)
        clouds[:, half::step, ::step] = noise(middles + np.roll(middles, 1, axis=2) + below)
        step, wobble = half, wobble / decay
    clouds -= clouds.min(axis=(1, 2), keepdims=True)
    clouds /= clouds.max(axis=(1, 2), keepdims=True)
    shown: Array = clouds[:, None, :height, :width]
    return shown


def fog(images: Array, severity: int, draws: Draws) -> Array:
    """Add clouds: ``(x + c * f) * m / (m + c)``, `m` the brightest value of the image."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    most = images.max(axis=(1, 2, 3), keepdims=True)
    clouds = plasma(draws, images.shape[2], images.shape[3], decay)
    found: Array = (images + amount * clouds) * most / (most + amount)
    return found


def frost(images: Array, severity: int, draws: Draws) -> Array:
    """Lay ice over the image: ``a * x + b * ice``.

    The published ice is one of five photographs, which are not ours to ship. Here it is the
    ridges of clouds, ``1 - |2 f - 1|``, in the colour of ice: the two weights are the
    published ones, the pattern is not.
    """
    own, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    ridges = 1 - np.abs(2 * plasma(draws, images.shape[2], images.shape[3], decay=2.0) - 1)
    return own * images + ice * ridges * _colour(ICE, images)


def snow(images: Array, severity: int, draws: Draws) -> Array:
    """Whiten the image and let flakes fall, streaked along their way.

    The flakes are as published, but for whole bytes in between.
    """
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    scale = length_scale(images)
    flakes = zoomed(mean + spread * draws.normal(1, *images.shape[2:]), zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = streaked(flakes, radius * scale, sigma * scale, draws.uniform(low=-135, high=-45))
    white = np.maximum(images, brightness_of(images) * 1.5 + 0.5)
    return kept * images + (1 - kept) * white + flakes + flakes[:, :, ::-1, ::-1]


def spatter(images: Array, severity: int, draws: Draws) -> Array:
    """Splash water (severity 1 to 3) or mud (4 and 5) on the image.

    Mud is as published. Water is drops of the published size and colour, as dense as their
    excess over the threshold; the published shading of their edges (OpenCV's Canny and distance
    transform) is left out.
    """
    mean, spread, sigma, least, amount, muddy = (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )[severity - 1]
    scale = length_scale(images)
    liquid = blurred(mean + spread * draws.normal(1, *images.shape[2:]), sigma * scale)
    if muddy:
        mud = blurred((liquid > least).astype(np.float64), amount * scale)
        mud = np.where(mud < 0.8, 0, mud)
        return images * (1 - mud) + mud * _colour(MUD, images)
    water = np.maximum(liquid - least, 0)
    most = water.max(axis=(1, 2, 3), keepdims=True)
    water = amount * water / np.where(most > 0, most, 1)
    return images + water * _colour(WATER, images)
