"""Cutting tensors by filter: the state of a dense model becomes that of a narrower one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blockprune.errors import StalePlanError
from blockprune.filters.plans import FilterPlan

__all__ = ["fitted_filters"]


def fitted_filters(state: Mapping[str, Tensor], plan: FilterPlan) -> dict[str, Tensor]:
    """Return what is left of a dense model's state once the filters of `plan` are gone.

    Weights of any moment of training can be cut down so, and whatever else is kept under the names
    of parameters: velocities of the optimiser, averages, gradients.

    Args:
        state: name to tensor, of the dense model; names that the plan cuts may be missing.
        plan: made for that model.

    Returns:
        The same names; tensors that lose nothing are those of `state`, not copies.

    Raises:
        StalePlanError: a tensor has not the number of filters that the plan was made for.

    Example:
        >>> import torch
        >>> from blockprune.filters import FilterPlan, LayerCut, fitted_filters
        >>> cut = LayerCut(filters=3, remove=(0,), axes={"conv.bias": 0})
        >>> plan = FilterPlan(
        ...     cuts={"conv": cut}, params=1, macs=0, target="count", asked=1, seed=0
        ... )
        >>> fitted_filters({"conv.bias": torch.tensor([1.0, 2.0, 3.0])}, plan)["conv.bias"]
        tensor([2., 3.])
    """
    narrow = dict(state)
    for name, cut in plan.cuts.items():
        for key, axis in cut.axes.items():
            if key in narrow:
                narrow[key] = _kept(name, key, narrow[key], axis, cut.filters, cut.kept)
    return narrow


def _kept(
    layer: str, key: str, tensor: Tensor, axis: int, filters: int, kept: tuple[int, ...]
) -> Tensor:
    if tensor.dim() <= axis or tensor.shape[axis] != filters:
        raise StalePlanError(
            f"the plan was made for a model whose layer {layer!r} has {filters} filters, along "
            f"axis {axis} of {key!r}; here that has the shape {tuple(tensor.shape)}. Give the "
            "state of the dense model that the plan was made for."
        )
    return tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
