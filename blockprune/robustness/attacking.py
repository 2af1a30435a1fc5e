"""Accuracy of one network under attacks, made on it and on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockprune.errors import DataError
from blockprune.robustness.attacks import attack, zero_gradients
from blockprune.robustness.masking import masked_gradients
from blockprune.robustness.normalising import Normalised, PixelData, logits_of
from blockprune.robustness.record import AttackChoice, AttackCurve

__all__ = ["EXAMPLES", "AttackWork", "UnderAttack"]

UNBOUNDED = 0.5
"""An epsilon at which every image can become grey, so that a working attack always wins."""

EXAMPLES = 8
"""Images that a report shows."""


@dataclass(frozen=True)
class UnderAttack:
    """What the attacks found; the fields are those of `RobustnessResult`."""

    images: int = 0
    curves: tuple[AttackCurve, ...] = ()
    zero_gradients: float | None = None
    flags: tuple[str, ...] = ()
    examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Tried:
    """What one attack at one epsilon did.

    Attributes:
        right: which images are right clean and attacked.
        lengths: of the changes, in L2; 0 where the image was wrong already.
        parts: what ran.
    """

    right: Tensor
    lengths: Tensor
    parts: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.right.double().mean().item()


@dataclass(frozen=True)
class AttackWork:
    """The networks and the images of the attacks; `done` is called after each part."""

    model: Normalised
    dense: Normalised | None
    data: PixelData
    seed: int
    batch_size: int
    done: Callable[[str], None]

    def run(self, attacks: Sequence[AttackChoice], samples: int | None) -> UnderAttack:
        """Attack ``samples`` of the images (None: all) in every way."""
        order = self._drawn(samples)
        chosen = self.data.rows(order)
        flat = zero_gradients(self.model, chosen.images, chosen.labels, batch_size=self.batch_size)
        self.done("gradients")
        curves, fooled = [], torch.zeros(len(chosen), dtype=torch.bool)
        for choice in attacks:
            curve, last = self._curve(choice, chosen)
            curves.append(curve)
            fooled |= last
            self.done(choice.name)
        right = self._right(self.model, chosen.images, chosen.labels)
        shown = torch.cat([(right & fooled).nonzero(), (right & ~fooled).nonzero()]).flatten()
        return UnderAttack(
            images=len(chosen),
            curves=tuple(curves),
            zero_gradients=flat,
            flags=self._flags(curves, chosen, right.double().mean().item(), flat),
            examples=tuple(order[shown[:EXAMPLES]].tolist()),
        )

    def _drawn(self, samples: int | None) -> Tensor:
        if samples is None or samples >= len(self.data):
            return torch.arange(len(self.data))
        if samples < 1:
            raise DataError(f"samples is the number of images attacked, 1 or more; got {samples}.")
        own = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.data), generator=own)[:samples].sort().values

    def _right(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return (
            logits_of(model, images, batch_size=self.batch_size).argmax(dim=1).cpu() == labels.cpu()
        )

    def _under(
        self, source: nn.Module, choice: AttackChoice, epsilon: float, chosen: PixelData
    ) -> _Tried:
        """Attack on the source, and see what this network makes of it.

        Images that are wrong clean are not attacked: they count as wrong already.
        """
        right = self._right(self.model, chosen.images, chosen.labels)
        rows = right.nonzero().flatten()
        images, labels = chosen.images[rows], chosen.labels[rows]
        made = attack(
            source, images, labels, choice, epsilon, seed=self.seed, batch_size=self.batch_size
        )
        lengths = torch.zeros(len(right), dtype=torch.float64)
        if len(rows):
            right[rows] = self._right(self.model, made.images, labels)
            moved = made.images.double().cpu() - images.double().cpu()
            lengths[rows] = moved.flatten(1).norm(dim=1)
        return _Tried(right, lengths, made.parts)

    def _points(
        self, source: nn.Module, choice: AttackChoice, chosen: PixelData
    ) -> tuple[_Tried, ...]:
        """Return what each epsilon does."""
        if choice.name != "deepfool":
            return tuple(self._under(source, choice, e, chosen) for e in choice.epsilons)
        # Its changes do not depend on the radius: those that are longer do not count.
        widest = self._under(source, choice, choice.epsilons[-1], chosen)
        clean = self._right(self.model, chosen.images, chosen.labels)
        return tuple(
            _Tried(widest.right | (clean & (widest.lengths > radius)), widest.lengths, widest.parts)
            for radius in choice.epsilons
        )

    def _curve(self, choice: AttackChoice, chosen: PixelData) -> tuple[AttackCurve, Tensor]:
        """Return the curve, and which images the largest epsilon turned."""
        own = self._points(self.model, choice, chosen)
        across = None
        if self.dense is not None:
            across = tuple(point.share for point in self._points(self.dense, choice, chosen))
        last = own[-1]
        turned = last.lengths[~last.right & (last.lengths > 0)]
        least = choice.name == "deepfool" and len(turned) > 0
        curve = AttackCurve(
            choice=choice,
            parts=last.parts,
            accuracies=tuple(point.share for point in own),
            transferred=across,
            median_distance=turned.median().item() if least else None,
        )
        return curve, ~last.right

    def _flags(
        self, curves: Sequence[AttackCurve], chosen: PixelData, clean: float, flat: float
    ) -> tuple[str, ...]:
        """Return the signs of masked gradients; most need a PGD among the attacks."""
        named = {curve.choice.name: curve for curve in curves}
        pgd, fgsm = named.get("pgd"), named.get("fgsm")
        if pgd is None:
            return masked_gradients(clean, {}, images=len(chosen), zero_gradients=flat)
        iterative = _by_epsilon(pgd, pgd.accuracies)
        iterative[UNBOUNDED] = self._under(self.model, pgd.choice, UNBOUNDED, chosen).share
        return masked_gradients(
            clean,
            iterative,
            images=len(chosen),
            one_step=None if fgsm is None else _by_epsilon(fgsm, fgsm.accuracies),
            transferred=None if pgd.transferred is None else _by_epsilon(pgd, pgd.transferred),
            zero_gradients=flat,
        )


def _by_epsilon(curve: AttackCurve, accuracies: Sequence[float]) -> dict[float, float]:
    return dict(zip(curve.choice.epsilons, accuracies, strict=True))
