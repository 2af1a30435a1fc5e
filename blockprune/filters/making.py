"""From scores and a target to a plan of filters: a share of every layer, then the remainder.

The protocol of the structured lottery at a matched size: every layer first loses the same share
of its filters, the largest with which the target is not exceeded; then layers are drawn at random,
and lose one filter each, until no further one fits. Within a layer the lowest scores go.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from blockprune.errors import InfeasibleBudgetError, PlanError, close_names
from blockprune.filters.layers import FilterLayer
from blockprune.filters.plans import FilterPlan, LayerCut, Target

__all__ = ["make_filter_plan"]

Gone = dict[str, int]
"""Name of layer to the number of filters that go."""


def make_filter_plan(
    layers: Sequence[FilterLayer],
    scores: Mapping[str, Tensor],
    *,
    count: int | None = None,
    params: int | None = None,
    macs: int | None = None,
    seed: int = 0,
    min_filters: int = 1,
) -> FilterPlan:
    """Return which filters go so that as much vanishes as is asked for, and never more.

    Args:
        layers: of the model, from `filter_layers`.
        scores: name of each layer to the importance of its filters, of shape (filters,).
        count: filters to remove; met exactly.
        params: parameters to remove, such as a block ticket lacks: at most so many go.
        macs: multiply-accumulate operations to remove, at most, for the batch that `layers` were
            found with.
        seed: of the layers drawn for the remainder.
        min_filters: that stay in each layer at the least.

    Raises:
        PlanError: not one target is given, or it makes no sense; scores do not fit the layers; or
            there is no layer.
        InfeasibleBudgetError: less than that can go, or one filter is more already; says what can.

    Example:
        >>> import torch
        >>> from blockprune.filters import filter_layers, filter_scores, make_filter_plan
        >>> from blockprune.models import resnet20
        >>> model, images = resnet20(), torch.zeros(1, 3, 32, 32)
        >>> scores = filter_scores(model, "l1", None, example_inputs=images)
        >>> make_filter_plan(filter_layers(model, images), scores, count=32).count
        32
    """
    target, asked = _target(count=count, params=params, macs=macs)
    _check(layers, scores, min_filters)
    room = {layer.name: max(layer.filters - min_filters, 0) for layer in layers}

    def reached(gone: Gone) -> int:
        return _removed(layers, gone)[target]

    most = reached(room)
    if asked > most:
        raise InfeasibleBudgetError(
            f"{target}={asked} cannot go: with min_filters={min_filters} at most {most} of the "
            f"{len(layers)} layers that may lose filters can."
        )
    gone = _even_share(layers, room, lambda found: reached(found) <= asked)
    _add_remainder(gone, room, lambda found: reached(found) <= asked, seed)
    if asked and not any(gone.values()):
        least = min(reached({name: 1}) for name in room if room[name])
        raise InfeasibleBudgetError(
            f"{target}={asked} is less than any one filter: the smallest has {least}. "
            "Ask for that, or for 0."
        )
    total = _removed(layers, gone)
    return FilterPlan(
        cuts={
            layer.name: LayerCut(
                filters=layer.filters,
                remove=_lowest(scores[layer.name], gone[layer.name]),
                axes=dict(layer.axes),
            )
            for layer in layers
            if gone[layer.name]
        },
        params=total["params"],
        macs=total["macs"],
        target=target,
        asked=asked,
        seed=seed,
    )


def _target(**targets: int | None) -> tuple[Target, int]:
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise PlanError(f"give one of {', '.join(targets)}: how much is to go; got {found}.")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{name} is a number that goes (int, at least 0), not {value!r}.")
    kinds: dict[str, Target] = {"count": "count", "params": "params", "macs": "macs"}
    return kinds[name], value


def _check(layers: Sequence[FilterLayer], scores: Mapping[str, Tensor], min_filters: int) -> None:
    if not layers:
        raise PlanError(
            "no layer of this model may lose filters: it has no inner convolution of a residual "
            "branch. filter_refusals(model, example_inputs) gives the reason for each convolution."
        )
    if isinstance(min_filters, bool) or not isinstance(min_filters, int) or min_filters < 1:
        raise PlanError(f"min_filters is a count of at least 1, not {min_filters!r}.")
    for layer in layers:
        if layer.name not in scores:
            raise PlanError(
                f"there are no scores of layer {layer.name!r}.{close_names(layer.name, scores)} "
                "Score the model that the layers are of."
            )
        found = scores[layer.name]
        if tuple(found.shape) != (layer.filters,):
            raise PlanError(
                f"layer {layer.name!r} has {layer.filters} filters and its scores have the shape "
                f"{tuple(found.shape)}; one score a filter is needed."
            )
        if not bool(torch.isfinite(found).all()):
            raise PlanError(f"a score of layer {layer.name!r} is not a finite number.")


def _removed(layers: Sequence[FilterLayer], gone: Gone) -> dict[Target, int]:
    """Return how many filters, parameters and MACs vanish; see `blockprune.filters.layers`."""
    params = macs = 0
    for layer in layers:
        here = gone.get(layer.name, 0)
        params += here * layer.params
        macs += here * layer.macs
        for reader, (params_twice, macs_twice) in layer.shared.items():
            params -= here * gone.get(reader, 0) * params_twice
            macs -= here * gone.get(reader, 0) * macs_twice
    return {"count": sum(gone.values()), "params": params, "macs": macs}


def _even_share(layers: Sequence[FilterLayer], room: Gone, fits: Callable[[Gone], bool]) -> Gone:
    """Return what goes with the largest share that fits, of all layers alike, rounded down."""

    def at(share: int, of: int) -> Gone:
        return {layer.name: min(layer.filters * share // of, room[layer.name]) for layer in layers}

    # Every share at which some layer loses one filter more is a multiple of this.
    steps = math.lcm(*(layer.filters for layer in layers))
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        if fits(at(middle, steps)):
            low = middle
        else:
            high = middle - 1
    return at(low, steps)


def _add_remainder(gone: Gone, room: Gone, fits: Callable[[Gone], bool], seed: int) -> None:
    """Let layers drawn at random lose one filter each for as long as one fits."""
    draws = random.Random(seed)
    names = [name for name in gone if gone[name] < room[name]]
    while names:
        name = draws.choice(names)
        gone[name] += 1
        if not fits(gone):
            gone[name] -= 1
            # Nor will it later: a filter is worth at least what it has in common with this one.
            names.remove(name)
        elif gone[name] == room[name]:
            names.remove(name)


def _lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the lowest scores, ascending; of equal ones the first go."""
    order = torch.argsort(scores.detach().cpu(), stable=True)
    return tuple(sorted(order[:count].tolist()))
