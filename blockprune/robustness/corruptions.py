"""The corruptions of ImageNet-C and CIFAR-10-C, made on the fly for any images.

Each is the published one with its five settings for CIFAR, which are for 32 x 32 pixels: lengths
in pixels grow in proportion for larger images and are kept for smaller ones, where a share of a
pixel would do nothing. What differs from the published code:

- values are not cut to whole bytes, except where bytes are what corrupts (pixelate, JPEG);
- zooms are exact rather than rounded to whole pixels;
- ``frost`` has ice of its own, since the published photographs are not ours to ship, and water
  in ``spatter`` has no shaded edges;
- colour on an image of one channel is its brightness; ``saturate`` does nothing to grey up to
  severity 3.

On 8 x 8 pixels all are defined, but ``pixelate`` leaves 7, 7, 6, 6 and 5 pixels a side, and JPEG
works on the image as one block.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", 2019; https://github.com/hendrycks/robustness.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from blockprune.errors import DataError, close_names
from blockprune.robustness import blurs, digital, noise, weather
from blockprune.robustness.draws import Array, Draws

__all__ = ["CORRUPTIONS", "check_corruption", "check_pixels", "corrupt"]

Corruption = Callable[[Array, int, Draws], Array]

CORRUPTIONS: dict[str, Corruption] = {
    # The fifteen that benchmarks average.
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blurs.defocus_blur,
    "glass_blur": blurs.glass_blur,
    "motion_blur": blurs.motion_blur,
    "zoom_blur": blurs.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    # Four more, held out for tuning.
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blurs.gaussian_blur,
    "spatter": weather.spatter,
    "saturate": digital.saturate,
}

SMALLEST = 4
"""Height and width in pixels that the corruptions need."""

_CHUNK_VALUES = 2**22


def corrupt(
    images: Tensor, name: str, severity: int, *, seed: int = 0, first_index: int = 0
) -> Tensor:
    """Return corrupted images.

    What happens to an image depends on ``(seed, name, severity)`` and on its index in the data
    set alone: not on the batch, nor on torch's or numpy's generators, which are left alone.

    Args:
        images: ``(N, C, H, W)``, floating point in [0, 1], `C` 1 or 3, `H` and `W` at least 4.
        name: of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of what is drawn.
        first_index: of ``images[0]`` in the data set.

    Returns:
        Images of the same shape, dtype and device, in [0, 1].

    Raises:
        DataError: there is no such corruption or severity, or these are no such images.

    Example:
        >>> import torch
        >>> from blockprune.robustness import corrupt
        >>> images = torch.rand(6, 1, 8, 8)
        >>> whole = corrupt(images, "snow", 3)
        >>> torch.equal(whole[4:], corrupt(images[4:], "snow", 3, first_index=4))
        True

    Source: Hendrycks and Dietterich, 2019 (this module's docstring says what differs).
    """
    check_corruption(name, severity)
    check_pixels(images)
    if first_index < 0:
        raise DataError(f"first_index must be 0 or more, got {first_index}.")
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise DataError(
            f"Images of {height} x {width} pixels cannot be corrupted; "
            f"{SMALLEST} x {SMALLEST} is the least."
        )
    rows = max(1, _CHUNK_VALUES // images[:1].numel()) if len(images) else 1
    parts = []
    for start in range(0, len(images), rows):
        chunk = images[start : start + rows].detach().cpu().double().numpy()
        draws = Draws(seed, name, severity, first_index + start, len(chunk))
        found = np.clip(CORRUPTIONS[name](chunk, severity, draws), 0.0, 1.0)
        parts.append(torch.from_numpy(np.ascontiguousarray(found)).to(images))
    return torch.cat(parts) if parts else images.detach().clone()


def check_corruption(name: str, severity: int) -> None:
    """Raise `DataError` unless there is a corruption of that name and severity."""
    if name not in CORRUPTIONS:
        raise DataError(
            f"There is no corruption {name!r}.{close_names(name, CORRUPTIONS)} "
            f"Known: {', '.join(CORRUPTIONS)}."
        )
    if severity not in range(1, 6):
        raise DataError(f"A corruption has the severities 1 to 5, got {severity}.")


def check_pixels(images: Tensor) -> None:
    """Raise `DataError` unless these are images ``(N, 1 or 3, H, W)`` in [0, 1]."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise DataError(
            "Images are floating-point tensors (N, C, H, W) with 1 or 3 channels; got "
            f"{images.dtype} {tuple(images.shape)}."
        )
    # Written so that a NaN fails it too.
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        raise DataError(
            f"Pixels lie in [0, 1]; these lie in [{images.min():.4g}, {images.max():.4g}]. "
            "Images that were normalised are brought back by blockprune.robustness.pixels_of."
        )
