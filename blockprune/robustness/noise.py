"""Corruptions that draw for each pixel."""

from __future__ import annotations

import numpy as np

from blockprune.robustness.draws import Array, Draws

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(images: Array, severity: int, draws: Draws) -> Array:
    """Add normal noise: ``x + c * n``, of ``c = 0.04 ... 0.10``."""
    scale = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + scale * draws.normal(*images.shape[1:])


def shot_noise(images: Array, severity: int, draws: Draws) -> Array:
    """Count photons: ``Poisson(c * x) / c``, of ``c = 500 ... 50`` at white."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return draws.poisson(images * photons) / photons


def impulse_noise(images: Array, severity: int, draws: Draws) -> Array:
    """Make a share 0.01 ... 0.07 of the values 0 or 1, as often the one as the other."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit = draws.uniform(*images.shape[1:]) < share
    salt = draws.uniform(*images.shape[1:]) < 0.5
    return np.where(hit, salt, images)


def speckle_noise(images: Array, severity: int, draws: Draws) -> Array:
    """Add noise in proportion: ``x + c * x * n``, of ``c = 0.06 ... 0.20``."""
    scale = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return images + images * scale * draws.normal(*images.shape[1:])
