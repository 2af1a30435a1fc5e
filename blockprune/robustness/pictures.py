"""Pictures of a few test images, clean and as what was measured makes of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from blockprune.robustness.attacks import attack
from blockprune.robustness.corruptions import corrupt
from blockprune.robustness.normalising import Normalised, PixelData, logits_of
from blockprune.robustness.record import AttackChoice, CorruptionAccuracy, Picture, View

__all__ = ["PICTURES", "pictures_of"]

PICTURES: Final = 4
LARGEST_SIDE: Final = 96
"""Pixels of a picture's longer side; larger images are made smaller."""


def pictures_of(
    model: Normalised,
    data: PixelData,
    indices: Sequence[int],
    *,
    corruptions: Sequence[CorruptionAccuracy],
    attacks: Sequence[AttackChoice],
    seed: int,
) -> tuple[Picture, ...]:
    """Return the images at the first of some indices, corrupted and attacked as hard as measured.

    Args:
        model: what is attacked, and decides.
        data: the test images.
        indices: of images that the model is right on.
        corruptions: measured; the one with the lowest accuracy is shown.
        attacks: each shown at its largest epsilon.
        seed: as in the measurement.
    """
    rows = list(indices[:PICTURES])
    if not rows:
        return ()
    chosen = data.rows(torch.tensor(rows))
    views = {"clean": chosen.images}
    if corruptions:
        worst = min(corruptions, key=lambda one: one.accuracy)
        made = [
            corrupt(data.images[row : row + 1], worst.name, worst.severity, seed=seed,
                    first_index=row)
            for row in rows
        ]  # fmt: skip
        views[f"{worst.name.replace('_', ' ')} {worst.severity}"] = torch.cat(made)
    for choice in attacks:
        found = attack(model, chosen.images, chosen.labels, choice, choice.epsilons[-1], seed=seed)
        views[choice.name] = found.images
    decided = {name: logits_of(model, seen).argmax(dim=1).tolist() for name, seen in views.items()}
    return tuple(
        Picture(
            index=row,
            label=int(chosen.labels[place]),
            views=tuple(
                View(name=name, decided=decided[name][place], png=_png(seen[place]))
                for name, seen in views.items()
            ),
        )
        for place, row in enumerate(rows)
    )


def _png(image: Tensor) -> str:
    """Return pixels ``(C, H, W)`` in [0, 1] as a PNG file in base64, in grey unless C is 3."""
    from PIL import Image

    shown = image.detach().float().cpu()
    side = max(shown.shape[1:])
    if side > LARGEST_SIDE:
        size = [max(1, round(n * LARGEST_SIDE / side)) for n in shown.shape[1:]]
        shown = functional.interpolate(shown[None], size=size, mode="area")[0]
    levels = (shown.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = levels.permute(1, 2, 0).numpy() if len(levels) == 3 else levels[0].numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
