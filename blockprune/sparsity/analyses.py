"""What masks and the weights under them tell, as papers/003 asks: sparsity, overlap, spread, signs.

Weights are given by name, such as the ``state_dict`` of a trained ticket.

Source: papers/003, "Considering layerwise importance in the lottery ticket hypothesis"
(Vandersmissen and Oramas, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blockprune.errors import MaskError, close_names
from blockprune.sparsity.masks import Mask

__all__ = [
    "LayerRow",
    "Overlap",
    "Spread",
    "common",
    "flipped",
    "layer_sparsity",
    "overlap",
    "overlap_by_layer",
    "partial_reinit",
    "sign_flips",
    "spread",
    "surviving",
]


class LayerRow(NamedTuple):
    """One cell of the heat map of layers and rounds.

    Attributes:
        level: the place of the mask in the sequence, from 0 on.
        layer: the name of its weight.
        kept: weights that survive.
        total: weights of the dense layer.
        sparsity: share that is pruned, in [0, 1].
    """

    level: int
    layer: str
    kept: int
    total: int
    sparsity: float


def layer_sparsity(masks: Sequence[Mask]) -> list[LayerRow]:
    """Return how sparse each layer is in each of the masks, one round after the other.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, layer_sparsity
        >>> full = Mask({"fc.weight": torch.ones(4, dtype=torch.bool)})
        >>> half = Mask({"fc.weight": torch.arange(4) < 2})
        >>> [row.sparsity for row in layer_sparsity([full, half])]
        [0.0, 0.5]
    """
    return [
        LayerRow(level, name, layer.kept, layer.total, layer.sparsity)
        for level, mask in enumerate(masks)
        for name, layer in mask.layers.items()
    ]


@dataclass(frozen=True)
class Overlap:
    """How many connections tickets share; every share is in [0, 1].

    Attributes:
        shared: connections that survive in all of the tickets.
        of_all: their share of the connections that can be pruned.
        of_surviving: their share of those of the ticket that keeps fewest, so that a ticket within
            another overlaps wholly; 0 where that one keeps nothing.
        expected_of_all: what `of_all` would be on average for random tickets of these densities,
            independent of one another: the product of the densities.
        expected_of_surviving: what `of_surviving` would be.
    """

    shared: int
    of_all: float
    of_surviving: float
    expected_of_all: float
    expected_of_surviving: float


def overlap(first: Mask, second: Mask, *more: Mask) -> Overlap:
    """Return how many connections two or more tickets share, over all layers.

    Raises:
        MaskError: the masks are not of the same layers.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, overlap
        >>> a = Mask({"fc.weight": torch.tensor([True, True, False, False])})
        >>> b = Mask({"fc.weight": torch.tensor([False, True, True, False])})
        >>> found = overlap(a, b)
        >>> found.of_all, found.of_surviving, found.expected_of_surviving
        (0.25, 0.5, 0.5)
    """
    masks = (first, second, *more)
    return _overlap([mask.kept for mask in masks], common(*masks).kept, first.total)


def overlap_by_layer(first: Mask, second: Mask, *more: Mask) -> dict[str, Overlap]:
    """Return how many connections two or more tickets share in each layer.

    Raises:
        MaskError: the masks are not of the same layers.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, overlap_by_layer
        >>> mask = Mask.full(torch.nn.Linear(3, 2))
        >>> overlap_by_layer(mask, mask)["weight"].of_surviving
        1.0
    """
    masks = (first, second, *more)
    by_layer = [mask.layers for mask in masks]
    return {
        name: _overlap([layers[name].kept for layers in by_layer], shared.kept, shared.total)
        for name, shared in common(*masks).layers.items()
    }


def common(first: Mask, *more: Mask) -> Mask:
    """Return the mask of the connections that survive in all of the tickets.

    Raises:
        MaskError: the masks are not of the same layers.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, common
        >>> mask = Mask.full(torch.nn.Linear(3, 2))
        >>> common(mask, mask) == mask
        True
    """
    for other in more:
        _check_same(first, other)
    keep = {
        name: torch.stack([kept, *(other.keep[name] for other in more)]).all(dim=0)
        for name, kept in first.keep.items()
    }
    return Mask(keep, first.aliases)


@dataclass(frozen=True, eq=False)
class Spread:
    """The standard deviation of each connection's values.

    Attributes:
        overlapping: of connections that tickets share, flat, float64.
        others: of those that they do not share.
    """

    overlapping: Tensor
    others: Tensor

    @property
    def mean_overlapping(self) -> float | None:
        """Mean over the shared connections; None where there are none."""
        return float(self.overlapping.mean()) if self.overlapping.numel() else None

    @property
    def mean_others(self) -> float | None:
        """Mean over the connections that are not shared; None where there are none."""
        return float(self.others.mean()) if self.others.numel() else None


def spread(
    states: Sequence[Mapping[str, Tensor]],
    masks: Mask | Sequence[Mask],
    *,
    overlapping: Mask | None = None,
) -> Spread:
    """Return how much the values of shared connections vary, and how much those of others.

    For the values ``v_1 .. v_n`` that a connection has, ``sqrt(mean (v - mean v)^2)``, in the unit
    of a weight. A state whose mask has pruned the connection has no value of it, and of one value
    there is no spread: such connections are left out.

    Over tickets: one trained state and one mask for each. Over the rounds up to a ticket, as in the
    paper's Figure 2: the states of the rounds, that ticket's mask for each of them, and in
    `overlapping` what it shares with other tickets.

    Args:
        states: trained weights, by name; two or more.
        masks: one for each state; or the mask of the shared connections alone, and then every
            state has a value of every connection.
        overlapping: the shared connections; None: those that all of `masks` keep.

    Raises:
        MaskError: fewer than two states; not one mask for each; names or shapes that do not agree.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, spread
        >>> states = [{"fc.weight": torch.tensor(v)} for v in ([1.0, 5.0], [3.0, 5.0])]
        >>> found = spread(states, Mask({"fc.weight": torch.tensor([True, False])}))
        >>> found.mean_overlapping, found.mean_others
        (1.0, 0.0)
    """
    if len(states) < 2:
        raise MaskError(f"a spread needs at least 2 states, and {len(states)} were given.")
    if isinstance(masks, Mask):
        shared = masks if overlapping is None else overlapping
        ones = {name: torch.ones_like(keep) for name, keep in masks.keep.items()}
        having = [Mask(ones, masks.aliases)] * len(states)
    else:
        having = list(masks)
        if len(having) != len(states):
            raise MaskError(
                f"{len(states)} states need as many masks, and {len(having)} were given."
            )
        shared = common(*having) if overlapping is None else overlapping
    _check_same(having[0], shared)
    values = torch.stack([_flat(state, having[0]) for state in states])
    exists = torch.stack([_bits(_check_same(shared, mask)) for mask in having])
    enough = exists.sum(dim=0) >= 2
    deviations = _deviations(values, exists)
    together = _bits(shared)
    return Spread(deviations[together & enough], deviations[~together & enough])


def sign_flips(
    first: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    mask: Mask,
    *between: Mapping[str, Tensor],
) -> float:
    """Return the share of the surviving connections whose sign changed, in [0, 1].

    A sign changes between a positive and a negative value. Zero has no sign and agrees with both,
    so a weight that starts at zero has not flipped. Over rounds, one value that differs from the
    others is a flip: give what lies between as well.

    Args:
        first: weights, by name.
        last: weights after it.
        mask: the connections to look at; 0 where none survives.
        between: further states.

    Raises:
        MaskError: the weights do not have the mask's names and shapes.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, sign_flips
        >>> mask = Mask({"fc.weight": torch.tensor([True, True, True, False])})
        >>> before = {"fc.weight": torch.tensor([1.0, -1.0, 0.0, 1.0])}
        >>> after = {"fc.weight": torch.tensor([-1.0, -2.0, 3.0, -1.0])}
        >>> round(sign_flips(before, after, mask), 4)
        0.3333
    """
    found = flipped([first, *between, last], mask)
    return float(found.double().mean()) if found.numel() else 0.0


def flipped(states: Sequence[Mapping[str, Tensor]], mask: Mask) -> Tensor:
    """Return, for each surviving connection, whether its sign is not the same in all states.

    Flat, in the order of the mask's layers; see `sign_flips` for zeros.

    Raises:
        MaskError: the weights do not have the mask's names and shapes.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, flipped
        >>> mask = Mask({"fc.weight": torch.tensor([True, True])})
        >>> states = [{"fc.weight": torch.tensor(v)} for v in ([1.0, 2.0], [1.0, -1.0])]
        >>> flipped(states, mask).tolist()
        [False, True]
    """
    values = torch.stack([surviving(state, mask) for state in states])
    return (values > 0).any(dim=0) & (values < 0).any(dim=0)


def partial_reinit(
    fresh_weights: Mapping[str, Tensor], theta0: Mapping[str, Tensor], overlap_mask: Mask
) -> dict[str, Tensor]:
    """Return new initial weights that keep those of theta_0 on the shared connections.

    Args:
        fresh_weights: of the network initialised anew; all that is not shared is from here.
        theta0: the initial weights of the tickets.
        overlap_mask: the shared connections, as from `common`.

    Raises:
        MaskError: the weights do not have the mask's names and shapes.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, partial_reinit
        >>> mask = Mask({"fc.weight": torch.tensor([True, False])})
        >>> fresh, old = ({"fc.weight": torch.full((2,), v)} for v in (5.0, 1.0))
        >>> partial_reinit(fresh, old, mask)["fc.weight"]
        tensor([1., 5.])
    """
    weights = {name: tensor.detach().clone() for name, tensor in fresh_weights.items()}
    for name, keep in overlap_mask.items():
        new, old = _weight(fresh_weights, name, keep), _weight(theta0, name, keep)
        weights[name] = torch.where(keep.to(new.device), old.to(new), new)
    return weights


def surviving(weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """Return the values of the surviving connections, flat, float64, on the CPU.

    Raises:
        MaskError: the weights do not have the mask's names and shapes.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, surviving
        >>> mask = Mask({"fc.weight": torch.tensor([True, False])})
        >>> surviving({"fc.weight": torch.tensor([3.0, 4.0])}, mask)
        tensor([3.], dtype=torch.float64)
    """
    return _flat(weights, mask)[_bits(mask)]


def _overlap(kept: Sequence[int], shared: int, total: int) -> Overlap:
    fewest = min(kept)
    expected = math.prod(number / total for number in kept) if total else 0.0
    return Overlap(
        shared=shared,
        of_all=shared / total if total else 0.0,
        of_surviving=shared / fewest if fewest else 0.0,
        expected_of_all=expected,
        expected_of_surviving=expected * total / fewest if fewest else 0.0,
    )


def _deviations(values: Tensor, exists: Tensor) -> Tensor:
    """Return the standard deviation of each column over the rows that exist."""
    count = exists.sum(dim=0).clamp(min=1)
    mean = torch.where(exists, values, 0).sum(dim=0) / count
    return (torch.where(exists, values - mean, 0).square().sum(dim=0) / count).sqrt()


def _flat(weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    parts = [
        _weight(weights, name, keep).detach().cpu().double().flatten()
        for name, keep in mask.keep.items()
    ]
    return torch.cat([*parts, torch.empty(0, dtype=torch.float64)])


def _bits(mask: Mask) -> Tensor:
    parts = [keep.flatten() for keep in mask.keep.values()]
    return torch.cat([*parts, torch.empty(0, dtype=torch.bool)])


def _weight(weights: Mapping[str, Tensor], name: str, keep: Tensor) -> Tensor:
    if name not in weights:
        raise MaskError(f"the weights have no {name}.{close_names(name, weights)}")
    if weights[name].shape != keep.shape:
        raise MaskError(
            f"{name} is {tuple(weights[name].shape)}, and {tuple(keep.shape)} in the mask."
        )
    return weights[name].detach()


def _check_same(first: Mask, other: Mask) -> Mask:
    """Return `other`, where it is of the layers of `first`.

    Raises:
        MaskError: it is not.
    """
    ours = {name: tuple(keep.shape) for name, keep in first.keep.items()}
    theirs = {name: tuple(keep.shape) for name, keep in other.keep.items()}
    if list(ours.items()) != list(theirs.items()):
        differing = sorted(dict(ours.items() ^ theirs.items())) or ["the order of the layers"]
        raise MaskError(
            f"the masks are of different networks: they differ in {', '.join(differing[:3])}."
        )
    return other
