"""Signs that an attack failed because gradients are masked, not because the model is robust."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["masked_gradients"]

_ZERO_SHARE = 0.1
"""Share of images without a gradient that is no accident."""

_Z = 1.96


def masked_gradients(
    clean: float,
    iterative: Mapping[float, float],
    *,
    images: int,
    one_step: Mapping[float, float] | None = None,
    transferred: Mapping[float, float] | None = None,
    zero_gradients: float = 0.0,
) -> tuple[str, ...]:
    """Return why an iterative white-box attack cannot be trusted; nothing where it can.

    Differences of accuracy count beyond 1.96 standard errors of two shares of ``images``.

    Args:
        clean: accuracy without an attack, in [0, 1].
        iterative: accuracy under the iterative attack (PGD), by epsilon.
        images: number of images attacked.
        one_step: the same under FGSM.
        transferred: the same under the attack made on another model.
        zero_gradients: share of images whose loss gradient is all zeros.

    Returns:
        One sentence a sign.

    Example:
        >>> from blockprune.robustness.masking import masked_gradients
        >>> masked_gradients(0.9, {0.1: 0.2, 0.5: 0.0}, images=500, one_step={0.1: 0.4})
        ()
        >>> masked_gradients(0.9, {0.1: 0.9}, images=500, transferred={0.1: 0.3})[0]
        'The attack made on another model is stronger than the one made on this (0.300 against ...'

    Source: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security",
    2018, section 3.1.
    """
    signs = []
    if zero_gradients > _ZERO_SHARE:
        signs.append(f"The loss has no gradient at {zero_gradients:.0%} of the images.")
    signs += _stronger(
        "The attack made on another model is stronger than the one made on this",
        transferred,
        iterative,
        images,
    )
    signs += _stronger("One step is stronger than many", one_step, iterative, images)
    largest = max(iterative, default=0.0)
    if largest > 0 and clean > 0 and not _below(iterative[largest], clean, images):
        signs.append(
            f"Epsilon {largest:.3g} does not lower the accuracy ({iterative[largest]:.3f} "
            f"against {clean:.3f} clean)."
        )
    return tuple(signs)


def _stronger(
    what: str,
    other: Mapping[float, float] | None,
    own: Mapping[float, float],
    images: int,
) -> list[str]:
    for epsilon in sorted(set(other or ()) & set(own)):
        if other is not None and _below(other[epsilon], own[epsilon], images):
            return [f"{what} ({other[epsilon]:.3f} against {own[epsilon]:.3f} at {epsilon:.3g})."]
    return []


def _below(one: float, other: float, images: int) -> bool:
    """Whether one share is below another beyond noise."""
    variance = one * (1 - one) + other * (1 - other)
    # Shares of 0 and 1 have no variance by that formula; one image is noise all the same.
    return other - one > max(_Z * math.sqrt(variance / images), 1 / images)
