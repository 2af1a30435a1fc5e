"""From importances to masks: exactly as many weights go as asked for, and none comes back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from blockprune.errors import CriterionError, MaskError, close_names
from blockprune.sparsity.masks import Mask

__all__ = ["prune_lowest", "random_like", "random_mask", "weights_to_prune"]

Scope = Literal["global", "layers"]


def prune_lowest(
    scores: Mapping[str, Tensor],
    mask: Mask,
    count: int,
    *,
    scope: Scope = "global",
    per_layer: Mapping[str, int] | None = None,
) -> Mask:
    """Return the mask without the `count` surviving weights of lowest importance.

    Exactly so many: of equal importances the one that comes first goes first, in the order of the
    layers in the mask and then of the flattened weight. What is pruned stays pruned.

    Args:
        scores: the importance of each weight, by layer, of its shape; those of pruned weights
            are not looked at.
        mask: what survives now; unchanged.
        count: weights to prune.
        scope: "global" compares weights across layers; "layers" prunes a number of each.
        per_layer: that number, 0 where a layer is missing; with "layers" only. None: the layers
            share `count` in proportion to what survives in each, rounded down, and the largest
            remainders get what is left over.

    Raises:
        MaskError: `count` is negative or more than survive, in all or in a layer; `per_layer` does
            not add up to it, or names an unknown layer.
        CriterionError: the importances of a layer are missing, of another shape, or NaN.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, prune_lowest
        >>> mask = Mask({"fc.weight": torch.ones(2, 2, dtype=torch.bool)})
        >>> scores = {"fc.weight": torch.tensor([[3.0, 1.0], [1.0, 1.0]])}
        >>> prune_lowest(scores, mask, 2).keep["fc.weight"]
        tensor([[ True, False],
                [False,  True]])

    Source: Frankle and Carbin, "The lottery ticket hypothesis", 2019.
    """
    _check_count(count, mask.kept)
    values = {name: _surviving(scores, name, keep) for name, keep in mask.keep.items()}
    if scope == "global":
        if per_layer is not None:
            raise MaskError('per_layer says how many of each layer go: that is scope="layers".')
        every = torch.cat([*values.values(), torch.empty(0, dtype=torch.float64)])
        sizes = [len(v) for v in values.values()]
        going = torch.split_with_sizes(_lowest(every, count), sizes)
        return _without(mask, dict(zip(values, going, strict=True)))
    if scope != "layers":
        raise MaskError(f"scope is 'global' or 'layers', not {scope!r}.")
    counts = _counts(mask, count, per_layer)
    return _without(mask, {name: _lowest(v, counts[name]) for name, v in values.items()})


def weights_to_prune(mask: Mask, share: float) -> int:
    """Return how many weights a share of those remaining is, rounded down.

    The share counts as the decimal that it is written as, so that 0.29 of 100 is 29. With 0.2 a
    round, 1000 weights become 800, 640, 512.

    Args:
        mask: what survives now.
        share: in [0, 1].

    Raises:
        MaskError: the share is not in [0, 1].

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, weights_to_prune
        >>> weights_to_prune(Mask({"fc.weight": torch.ones(800, dtype=torch.bool)}), 0.2)
        160
    """
    if not 0 <= share <= 1:
        raise MaskError(f"a share of the remaining weights is in [0, 1], not {share!r}.")
    return math.floor(Fraction(str(float(share))) * mask.kept)


def random_like(mask: Mask, seed: int) -> Mask:
    """Return a random mask that keeps exactly as many weights of each layer as `mask` does.

    The control of papers/003 and papers/004: where only layer-wise proportions matter, it does as
    well. With one seed, fewer weights are a part of more, so the controls of successive rounds are
    nested as the rounds' masks are.

    Args:
        mask: whose counts it takes; unchanged.
        seed: of the draw; torch's own generators stay as they are.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, random_like
        >>> mask = Mask({"fc.weight": torch.arange(100) < 30})
        >>> control = random_like(mask, seed=0)
        >>> control.layers == mask.layers, control == mask
        (True, False)
    """
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, layer in mask.layers.items():
        chosen = torch.randperm(layer.total, generator=generator)[: layer.kept]
        flat = torch.zeros(layer.total, dtype=torch.bool)
        flat[chosen] = True
        keep[name] = flat.reshape(mask.keep[name].shape)
    return Mask(keep, mask.aliases)


def random_mask(full: Mask, count: int, seed: int) -> Mask:
    """Return the mask without `count` of its weights, drawn at random across all layers.

    Args:
        full: what may be pruned, such as `Mask.full`; unchanged.
        count: weights to prune.
        seed: of the draw; torch's own generators stay as they are.

    Raises:
        MaskError: `count` is negative or more than survive.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, random_mask
        >>> random_mask(Mask.full(torch.nn.Linear(10, 10)), 20, seed=0).kept
        80
    """
    _check_count(count, full.kept)
    generator = torch.Generator().manual_seed(seed)
    going = torch.zeros(full.kept, dtype=torch.bool)
    going[torch.randperm(full.kept, generator=generator)[:count]] = True
    sizes = {name: layer.kept for name, layer in full.layers.items()}
    parts = torch.split_with_sizes(going, list(sizes.values()))
    return _without(full, dict(zip(sizes, parts, strict=True)))


def _lowest(values: Tensor, count: int) -> Tensor:
    """Return which `count` of the values are lowest; of equal ones the first."""
    if count == 0:
        return torch.zeros(len(values), dtype=torch.bool)
    # Selection takes linear time, which a sort of tens of millions of weights does not.
    threshold = values.kthvalue(count).values
    going = values < threshold
    equal = (values == threshold).nonzero().flatten()
    going[equal[: count - int(going.count_nonzero())]] = True
    return going


def _without(mask: Mask, going: Mapping[str, Tensor]) -> Mask:
    """Return the mask without some of its surviving weights."""
    keep = {}
    for name, survives in mask.keep.items():
        left = survives.clone()
        left[survives] = ~going[name]
        keep[name] = left
    return Mask(keep, mask.aliases)


def _surviving(scores: Mapping[str, Tensor], name: str, keep: Tensor) -> Tensor:
    """Return the importances of the surviving weights of a layer, flat."""
    if name not in scores:
        raise CriterionError(f"no importances were given for {name}.{close_names(name, scores)}")
    found = scores[name]
    if found.shape != keep.shape:
        raise CriterionError(
            f"the importances of {name} are {tuple(found.shape)}, and its weights "
            f"{tuple(keep.shape)}: one number for each weight is needed."
        )
    values = found.detach().cpu()[keep].to(torch.float64)
    if bool(values.isnan().any()):
        raise CriterionError(
            f"{int(values.isnan().sum())} of the importances of {name} are NaN, so they have no "
            "order. Look for NaN or infinite values in its weights, or in the data."
        )
    return values


def _counts(mask: Mask, count: int, per_layer: Mapping[str, int] | None) -> dict[str, int]:
    """Return how many weights go of each layer."""
    if per_layer is None:
        return _proportional({name: layer.kept for name, layer in mask.layers.items()}, count)
    for name in per_layer:
        if name not in mask.keep:
            raise MaskError(f"the mask has no layer {name!r}.{close_names(name, mask.keep)}")
    counts = {name: per_layer.get(name, 0) for name in mask.keep}
    for name, layer in mask.layers.items():
        _check_count(counts[name], layer.kept, f" of {name}")
    if sum(counts.values()) != count:
        raise MaskError(
            f"per_layer adds up to {sum(counts.values())} weights, and {count} were asked for."
        )
    return counts


def _proportional(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Share `count` out in proportion to sizes, by largest remainder; of equal ones the first."""
    everything = sum(sizes.values()) or 1
    counts = {name: count * size // everything for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(count * sizes[name] % everything))
    for name in itertools.islice(by_remainder, count - sum(counts.values())):
        counts[name] += 1
    return counts


def _check_count(count: int, survive: int, where: str = "") -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= survive:
        raise MaskError(
            f"{count!r} weights{where} cannot be pruned: {survive} survive, and a number from 0 to "
            "that is needed."
        )
