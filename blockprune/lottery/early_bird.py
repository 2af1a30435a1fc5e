"""Early-bird tickets: the training goes on until what would be cut no longer changes.

After every epoch a criterion draws a mask, the blocks that would stay. Two masks are as far apart
as the share of candidates that one keeps and the other does not::

    distance(M, M') = |M xor M'| / candidates

The ticket is drawn at the first epoch whose mask lies no farther than a limit from each of those
of the epochs before it in the window. Blocks are few: one block swapped for another on ResNet32,
with 12 candidates, is already 2 / 12, so that at the usual 0.1 the masks must be equal.

Source: You et al., "Drawing early-bird tickets", 2020; a window of 5 and 0.1 are of its code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["has_settled", "mask_distance"]


def mask_distance(one: Collection[str], other: Collection[str], candidates: int) -> float:
    """Return the share of the candidates that only one of two masks names.

    Args:
        one: names of the blocks that go, or of those that stay.
        other: likewise.
        candidates: how many blocks may go.

    Example:
        >>> from blockprune.lottery.early_bird import mask_distance
        >>> mask_distance({"layer1.1", "layer1.2"}, {"layer1.1", "layer2.3"}, candidates=8)
        0.25
    """
    return len(set(one) ^ set(other)) / candidates


def has_settled(
    masks: Sequence[Collection[str]], candidates: int, *, window: int = 5, distance: float = 0.1
) -> bool:
    """Return whether the newest mask is close to each of the others in the window.

    Args:
        masks: one for each epoch so far, the newest last.
        candidates: how many blocks may go.
        window: consecutive epochs that are compared; False before there are as many.
        distance: highest distance, itself close enough.

    Example:
        >>> from blockprune.lottery.early_bird import has_settled
        >>> masks = [{"a", "b"}, {"a", "c"}, {"a", "c"}, {"a", "c"}]
        >>> has_settled(masks, 8, window=4), has_settled(masks, 8, window=3)
        (False, True)
    """
    if len(masks) < window:
        return False
    newest = masks[-1]
    return all(mask_distance(newest, mask, candidates) <= distance for mask in masks[-window:-1])
