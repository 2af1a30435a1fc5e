"""The importance of every filter of the layers that may lose some.

For the weights `w` of one filter, their number `n`, the loss `L` of one batch and `g = dL/dw`, a
filter's score is the mean over its weights of a number for each weight, higher being kept:

==========  =============================  =======================================================
criterion   number for each weight         reads
==========  =============================  =======================================================
``l1``      `|w|`                          nothing
``l2``      `w^2`                          nothing
``snip``    `|w g|`                        the first batch, batch normalisation in training mode
``grasp``   `w (H g)`                      the first batch in two halves, T = 200, the same mode
``taylor``  `|w (sum over batches of g)|`  every batch, in evaluation mode
``random``  one draw for each filter       nothing
==========  =============================  =======================================================

These are the definitions of `blockprune.criteria`, taken filter by filter. `H` is the Hessian over
all weights of the model. Before batch normalisation in training mode a filter's scale has no effect
on the loss, so that the sum of `w (H g)` over a filter is `-||g||^2`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from blockprune.criteria import ScoringContext
from blockprune.criteria.base import LossFunction, batches_of
from blockprune.criteria.derivatives import (
    distinct,
    failures,
    gradient_of,
    loss_of,
    running_statistics,
    summed,
)
from blockprune.criteria.gradient import saliencies, sensitivities
from blockprune.errors import CriterionError, close_names
from blockprune.filters.layers import filter_layers
from blockprune.randomness import preserved_rng
from blockprune.tracing import as_call, isolated, structural_copy

__all__ = ["FILTER_CRITERIA", "filter_scores"]

GRASP_TEMPERATURE = 200.0

Weights = dict[str, nn.Parameter]
"""Name of layer to the weight of its convolution."""


def filter_scores(
    model: nn.Module,
    criterion: str,
    data: Any,
    *,
    example_inputs: Any,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the importance of each filter of each layer that may lose filters.

    Args:
        model: the dense network, which stays as it is.
        criterion: one of `FILTER_CRITERIA`; see `blockprune.filters.scores` for their formulas.
        data: one `(inputs, targets)` pair or an iterable of them, as `blockprune.score_blocks`
            takes them; None where the criterion reads none.
        example_inputs: to find the layers by: a Tensor, a tuple of arguments or a dict of keywords.
        loss_fn: `(outputs, targets) -> scalar`; None: the model's own loss, else cross entropy.
        seed: of all that is random in scoring.

    Returns:
        Name of layer to scores in double precision, of shape (filters,), on the CPU.

    Raises:
        CriterionError: an unknown criterion, one that needs data and has none, frozen layers, a
            loss or scores that are not finite.
        DataError: data that is empty, malformed, or refused by the model.
        MissingExtraError: torch-pruning is not installed.
        TraceError: the model does not run on the example inputs, or cannot be followed.

    Example:
        >>> import torch
        >>> from blockprune.filters import filter_scores
        >>> from blockprune.models import resnet20
        >>> data = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
        >>> scores = filter_scores(resnet20(), "snip", data, example_inputs=data[0][:2])
        >>> len(scores), scores["layer1.0.conv1"].shape
        (9, torch.Size([16]))

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017 (l1); Lee et al., "SNIP",
    2019; Wang et al., "Picking winning tickets before training", 2020 (grasp); Molchanov et al.,
    "Importance estimation for neural network pruning", 2019 (taylor).
    """
    if criterion not in _SCORES:
        raise CriterionError(
            f"there is no filter criterion {criterion!r}; there are {', '.join(_SCORES)}."
            f"{close_names(criterion, _SCORES)}"
        )
    if data is None and criterion in _READ_DATA:
        raise CriterionError(
            f"{criterion!r} reads data with labels, and data is None. Pass (inputs, targets) or an "
            "iterable of them, or take 'l1', 'l2' or 'random', which read none."
        )
    names = [layer.name for layer in filter_layers(model, example_inputs)]
    if not names:
        return {}
    with isolated(), preserved_rng():
        own = structural_copy(model).eval()
        device = next(own.parameters()).device
        batches = None if data is None else batches_of(own, data, device)
        context = ScoringContext(
            own, (), batches, as_call(own, example_inputs), loss_fn=loss_fn, seed=seed
        )
        weights = {name: context.parameter(f"{name}.weight") for name in names}
        if criterion in _READ_DATA:
            _check_trainable(criterion, weights)
        scores = _SCORES[criterion](context, weights)
    for name, found in scores.items():
        if not bool(torch.isfinite(found).all()):
            raise CriterionError(f"{criterion!r} gives layer {name!r} a score that is not finite.")
    return scores


def _l1(_context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    return {name: _means(weight.detach().abs()) for name, weight in weights.items()}


def _l2(_context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    # Squares of small numbers vanish in half precision.
    return {name: _means(_wide(weight) ** 2) for name, weight in weights.items()}


def _random(context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(context.seed)
    return {
        name: torch.rand(len(weight), generator=draws, dtype=torch.float64)
        for name, weight in weights.items()
    }


def _snip(context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    values = sensitivities(context, list(weights.values()))
    return {name: _means(found) for name, found in zip(weights, values, strict=True)}


def _taylor(context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    theta = list(weights.values())
    with torch.enable_grad(), running_statistics(context), failures("taylor"):
        batches = context.all_batches()
        gradients = summed(gradient_of(loss_of(context, batch), theta) for batch in batches)
    products = (weight.detach() * g for weight, g in zip(theta, gradients, strict=True))
    return {name: _means(found.abs()) for name, found in zip(weights, products, strict=True)}


def _grasp(context: ScoringContext, weights: Weights) -> dict[str, Tensor]:
    theta = distinct((weights, context.all_trainable_weights()))
    halves = saliencies(context, theta, GRASP_TEMPERATURE, of=_means)
    # `weights` come first in `theta`.
    return dict(zip(weights, summed(halves), strict=False))


def _check_trainable(criterion: str, weights: Weights) -> None:
    for name, weight in weights.items():
        if not weight.requires_grad:
            raise CriterionError(
                f"layer {name!r} cannot be scored by {criterion!r}: its weight is frozen "
                "(requires_grad=False). Unfreeze it, or use a criterion without gradients, such "
                "as 'l1'."
            )


def _means(values: Tensor) -> Tensor:
    """Return the mean over each slice along the first axis, in double precision."""
    return _wide(values).flatten(1).mean(dim=1)


def _wide(tensor: Tensor) -> Tensor:
    """Return double precision on the CPU: not every device has it."""
    return tensor.detach().cpu().double()


_SCORES: Final[dict[str, Callable[[ScoringContext, Weights], dict[str, Tensor]]]] = {
    "l1": _l1,
    "l2": _l2,
    "snip": _snip,
    "grasp": _grasp,
    "taylor": _taylor,
    "random": _random,
}
_READ_DATA: Final = frozenset({"snip", "grasp", "taylor"})

FILTER_CRITERIA: Final = tuple(_SCORES)
"""The criteria that `filter_scores` knows."""
