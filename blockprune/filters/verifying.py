"""What is proved of a narrower network: it is the dense one with the lost channels read as zero.

The reference is the dense model in which each reader of a removed filter's channel is given zeros
there. Dropout is left out on both sides, for what it draws depends on the number of channels.

Fewer channels are summed in another order, and normalisation over few values magnifies the rounding
that comes of it. So what does not agree within a few units in the last place must agree in float64
within 1e-8 of the largest value, gradients within 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from blockprune.filters.layers import FilterLayer
from blockprune.filters.plans import FilterPlan
from blockprune.filters.slicing import fitted_filters
from blockprune.randomness import AlikeDraws
from blockprune.surgery.proof import Link, Proof
from blockprune.tracing import Call

__all__ = ["proof_of_filters"]


def proof_of_filters(
    model: nn.Module, plan: FilterPlan, layers: Sequence[FilterLayer], call: Call
) -> Proof:
    """Return the proof that a network is `model` with the removed filters' channels read as zero.

    Args:
        model: the dense model.
        plan: what goes.
        layers: that the plan cuts.
        call: the example inputs.
    """
    link = Link(
        f"the narrower {type(model).__name__}",
        "the dense one with the channels of the removed filters read as zero",
        partial(_reading_zeros, plan=plan, layers=layers),
        # Other sums are rounded otherwise.
        rounds_alike=False,
    )
    return Proof(
        model,
        call,
        links=(link,),
        fitted=lambda tensors: fitted_filters(tensors, plan),
        draws=_WithoutDropout,
        # Of units in the last place, in float64, where a thousand times as many are allowed.
        wide=1e4,
    )


def _reading_zeros(model: nn.Module, plan: FilterPlan, layers: Sequence[FilterLayer]) -> nn.Module:
    """Return `model`, which is changed: the channels that go are read as zero."""
    for layer in layers:
        hook = _zeroing(plan.cuts[layer.name].remove)
        for reader in layer.readers:
            model.get_submodule(reader).register_forward_pre_hook(hook, with_kwargs=True)
    return model


def _zeroing(channels: Sequence[int]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        gone = torch.zeros(module.in_channels, dtype=torch.bool, device=given.device)
        gone[list(channels)] = True
        # Filled, not multiplied: zero times infinity is no zero.
        zeroed = given.masked_fill(gone.view(-1, *[1] * len(module.kernel_size)), 0.0)
        return ((zeroed, *args[1:]), kwargs) if args else (args, {**kwargs, "input": zeroed})

    return hook


class _WithoutDropout(AlikeDraws):
    """Let dropout pass everything."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if "dropout" in getattr(func, "__name__", "") and args:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)
