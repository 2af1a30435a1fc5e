"""How far apart two trainings of one subnetwork end, as papers/004 measures it.

*Stability to pruning* compares the weights of the subnetwork trained within the whole network with
those of the subnetwork trained alone, in the same data order; *stability to data order* compares
the subnetwork trained alone in two data orders. The control is a random mask with the same
layer-wise proportions, `random_like`.

Source: papers/004, "Stabilizing the lottery ticket hypothesis" (Frankle et al., 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from blockprune.errors import MaskError
from blockprune.sparsity.analyses import surviving
from blockprune.sparsity.masks import Mask

__all__ = ["angle_degrees", "distance"]


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], mask: Mask) -> float:
    """Return ``||m * W - m * W'||_2``, in the unit of a weight; 0 for equal weights.

    Args:
        a: weights, by name; the mask need not be applied to them.
        b: the other weights.
        mask: the subnetwork.

    Raises:
        MaskError: the weights do not have the mask's names and shapes.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, distance
        >>> mask = Mask({"fc.weight": torch.tensor([True, True, False])})
        >>> a, b = {"fc.weight": torch.zeros(3)}, {"fc.weight": torch.tensor([3.0, 4.0, 9.0])}
        >>> distance(a, b, mask)
        5.0
    """
    return float(torch.linalg.vector_norm(surviving(a, mask) - surviving(b, mask)))


def angle_degrees(a: Mapping[str, Tensor], b: Mapping[str, Tensor], mask: Mask) -> float:
    """Return the angle between ``m * W`` and ``m * W'``, in degrees, from 0 to 180.

    Of the unit vectors ``u`` and ``v`` it is ``2 atan2(||u - v||, ||u + v||)``, which is exactly 0
    for equal weights and right for small angles, where an arc cosine is neither.

    Args:
        a: weights, by name; the mask need not be applied to them.
        b: the other weights.
        mask: the subnetwork.

    Raises:
        MaskError: the weights do not have the mask's names and shapes; or all that survive are 0 in
            one of them, so that there is no angle.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, angle_degrees
        >>> mask = Mask({"fc.weight": torch.tensor([True, True])})
        >>> a, b = ({"fc.weight": torch.tensor(v)} for v in ([2.0, 0.0], [0.0, 3.0]))
        >>> angle_degrees(a, b, mask), angle_degrees(a, a, mask)
        (90.0, 0.0)
    """
    u, v = _direction(surviving(a, mask)), _direction(surviving(b, mask))
    apart, along = torch.linalg.vector_norm(u - v), torch.linalg.vector_norm(u + v)
    return math.degrees(2 * math.atan2(float(apart), float(along)))


def _direction(values: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(values)
    if bool(length == 0):
        raise MaskError(
            f"all of the {values.numel()} weights that survive are 0, so they make no angle. "
            "distance is defined for them."
        )
    unit: Tensor = values / length
    return unit
