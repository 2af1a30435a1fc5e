"""Corruptions of tone, shape and storage."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from blockprune.robustness.draws import Array, Draws
from blockprune.robustness.warping import blurred, sampled
from blockprune.robustness.weather import brightness_of

__all__ = [
    "brightness",
    "contrast",
    "elastic_transform",
    "jpeg_compression",
    "pixelate",
    "saturate",
]


def brightness(images: Array, severity: int, draws: Draws) -> Array:
    """Add 0.05 ... 0.3 to the value of hue, saturation and value."""
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    return _in_hsv(images, 2, 1.0, added)


def saturate(images: Array, severity: int, draws: Draws) -> Array:
    """Change the saturation `s` to ``a * s + b``.

    Grey has no saturation: severities 1 to 3 leave it as it is, and 4 and 5 tint it red
    (the hue of grey by convention), of which an image of one channel keeps the brightness.
    """
    factor, added = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[severity - 1]
    return _in_hsv(images, 1, factor, added)


def _in_hsv(images: Array, component: int, factor: float, added: float) -> Array:
    # Here, since its import takes longer than the work.
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    colours = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
    hsv = rgb_to_hsv(colours.transpose(0, 2, 3, 1))
    hsv[..., component] = np.clip(hsv[..., component] * factor + added, 0, 1)
    found: Array = hsv_to_rgb(hsv).transpose(0, 3, 1, 2)
    return found if images.shape[1] == 3 else brightness_of(found)


def contrast(images: Array, severity: int, draws: Draws) -> Array:
    """Draw the values to the mean of their channel: ``(x - mean) * c + mean``."""
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    means = images.mean(axis=(2, 3), keepdims=True)
    found: Array = (images - means) * kept + means
    return found


def elastic_transform(images: Array, severity: int, draws: Draws) -> Array:
    """Move three points at random, the image with them, then let it ripple.

    Lengths are shares of the shorter side, as published: the ripples' height and width, and
    how far the points go. Severity 1 does not ripple.
    """
    size = min(images.shape[2:])
    height, sigma, reach = (
        np.array(
            (
                (0.0, 0.0, 0.08),
                (0.05, 0.2, 0.07),
                (0.08, 0.06, 0.06),
                (0.1, 0.04, 0.05),
                (0.1, 0.03, 0.03),
            )[severity - 1]
        )
        * size
    )
    found = sampled(images, *_affine_places(images, reach, draws))
    if height == 0:
        return found
    ripples = draws.uniform(2, *images.shape[2:], low=-1, high=1)
    ripples = height * blurred(ripples, sigma, mode="reflect", truncate=3.0)
    rows, columns = np.indices(images.shape[2:])
    return sampled(found, rows + ripples[:, 0], columns + ripples[:, 1])


def _affine_places(images: Array, reach: float, draws: Draws) -> tuple[Array, Array]:
    """Return where each pixel comes from once three points moved by up to ``reach`` pixels."""
    shape = np.array(images.shape[2:])
    centre = shape // 2
    arm = max(1, int(shape.min()) // 3)
    corners = np.array([[arm, arm], [arm, -arm], [-arm, -arm]], dtype=np.float64) + centre
    gone = corners + draws.uniform(3, 2, low=-reach, high=reach)
    ones = np.ones((len(images), 3, 1))
    # Before numpy 2 a stack of matrices is not solved for one matrix.
    wanted = np.broadcast_to(corners, gone.shape)
    back = np.linalg.solve(np.concatenate([gone, ones], axis=2), wanted)
    rows, columns = np.indices(images.shape[2:]).astype(np.float64)
    row, column, shift = (back[:, k, :, None, None] for k in range(3))
    places = row * rows + column * columns + shift
    return places[:, 0], places[:, 1]


def pixelate(images: Array, severity: int, draws: Draws) -> Array:
    """Make the image 0.95 ... 0.65 times as large in bytes, and as large as it was."""
    from PIL import Image

    kept = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[2:]
    small = max(1, int(width * kept)), max(1, int(height * kept))
    box = Image.Resampling.BOX
    return _each(images, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(images: Array, severity: int, draws: Draws) -> Array:
    """Store the image as JPEG of quality 80 ... 40, and read it."""
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[severity - 1]

    def stored(image: Any) -> Any:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(images, stored)


def _each(images: Array, change: Callable[[Any], Any]) -> Array:
    """Return what PIL makes of each image, in bytes."""
    from PIL import Image

    pixels = np.clip(np.round(images * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    found = np.empty_like(pixels)
    for row, own in enumerate(pixels):
        image = Image.fromarray(own.squeeze(-1) if own.shape[-1] == 1 else own)
        found[row] = np.asarray(change(image)).reshape(own.shape)
    return found.transpose(0, 3, 1, 2) / 255
