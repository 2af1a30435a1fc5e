"""The proof that a narrower network is right, carried out on the spot.

The reference is the dense model in which each reader of a removed filter's channel is given zeros
there. Outputs, gradients of what is kept and running statistics are compared, in eval and in train
mode, on structural copies, so that neither model notices. Dropout is left out on both sides, for
what it draws depends on the number of channels; every other draw is one of its shape alone.

Fewer channels are summed in another order, and normalisation over few values magnifies the rounding
that comes of it. So what does not agree within a few units in the last place is computed again in
float64, where it must agree within 1e-8 of the largest value, gradients within 1e-7. In half
precision a few units are some percent: there float64 is asked as well, wherever the model runs in
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockprune.errors import VerificationError
from blockprune.filters.layers import FilterLayer
from blockprune.filters.plans import FilterPlan
from blockprune.filters.slicing import fitted_filters
from blockprune.randomness import AlikeDraws, seed_rng
from blockprune.surgery.comparing import (
    GRADIENT_ULPS,
    OUTPUT_ULPS,
    SEED,
    Difference,
    difference_of,
    fresh,
    gradients_of,
    is_coarse,
    snapshot,
)
from blockprune.tracing import Call, copy_model, isolated, refused, structural_copy

__all__ = ["verify_filters"]

# Of units in the last place, in float64, where `difference_of` allows a thousand times as many.
WIDE = 1e4


class _Outcome(NamedTuple):
    outputs: Any
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def fitted(self, plan: FilterPlan) -> _Outcome:
        """Return it without what the filters that go take along."""
        return _Outcome(
            self.outputs,
            fitted_filters(self.gradients, plan),
            fitted_filters(self.buffers, plan),
        )


def verify_filters(
    model: nn.Module,
    narrow: nn.Module,
    plan: FilterPlan,
    layers: Sequence[FilterLayer],
    call: Call,
) -> None:
    """Prove that `narrow` is `model` with the channels of the removed filters read as zero.

    Raises:
        VerificationError: says in which mode what differs, and by how much.
        TraceError: the dense model does not run on the call.
    """
    with isolated():
        apart: str | None = None
        try:
            _prove(model, narrow, plan, layers, call)
        except _ApartInNumbers as error:
            apart = str(error)
        if apart is None and not is_coarse(model):
            return
        wide = copy_model(model).double(), copy_model(narrow).double()
        try:
            _prove(*wide, plan, layers, call.map(_widened), WIDE)
        except VerificationError as error:
            raise VerificationError(apart or str(error)) from None
        except Exception:
            # The model does not run in float64: then its own precision is all there is.
            if apart is not None:
                raise VerificationError(apart) from None


class _ApartInNumbers(VerificationError):
    """Finite numbers differ by more than a few units in the last place, and nothing else does."""


def _prove(
    model: nn.Module,
    narrow: nn.Module,
    plan: FilterPlan,
    layers: Sequence[FilterLayer],
    call: Call,
    room: float = 1.0,
) -> None:
    for mode in ("eval", "train"):
        candidate = _runs_on(model, plan, layers, call, mode)
        if candidate is None:
            continue
        given, differentiate, expected = candidate
        try:
            found = _outcome(structural_copy(narrow), given, mode, differentiate)
        except Exception as error:
            raise VerificationError(
                f"the narrower {type(model).__name__} fails where the dense one runs, in {mode} "
                f"mode: {type(error).__name__}: {error}"
            ) from error
        difference = _difference(found, expected.fitted(plan), room)
        if difference:
            kind = _ApartInNumbers if difference.may_be_rounding else VerificationError
            raise kind(
                f"the narrower {type(model).__name__} is not the dense one with the channels of "
                f"the removed filters read as zero, in {mode} mode: {difference}"
            )


def _runs_on(
    model: nn.Module, plan: FilterPlan, layers: Sequence[FilterLayer], call: Call, mode: str
) -> tuple[Call, bool, _Outcome] | None:
    """Return inputs that the reference runs on, whether it has gradients, and what it gives.

    None where the dense model itself does not run in train mode on these inputs.

    Raises:
        TraceError: it does not run in eval mode.
    """
    # A single value a channel cannot be normalised in train mode; two samples can.
    doubled = call.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor)
    for differentiate in (True, False):  # some networks overwrite what their backward needs
        for given in (call, doubled):
            try:
                reference = _reference(model, plan, layers)
                return given, differentiate, _outcome(reference, given, mode, differentiate)
            except Exception as error:
                refusal = error
    if mode == "eval":
        raise refused(model, call, refusal) from refusal
    return None


def _reference(model: nn.Module, plan: FilterPlan, layers: Sequence[FilterLayer]) -> nn.Module:
    """Return a copy of the dense model in which the channels that go are read as zero."""
    reference = structural_copy(model)
    for layer in layers:
        hook = _zeroing(plan.cuts[layer.name].remove)
        for reader in layer.readers:
            reference.get_submodule(reader).register_forward_pre_hook(hook, with_kwargs=True)
    return reference


def _zeroing(channels: Sequence[int]) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["input"]
        gone = torch.zeros(module.in_channels, dtype=torch.bool, device=given.device)
        gone[list(channels)] = True
        # Filled, not multiplied: zero times infinity is no zero.
        zeroed = given.masked_fill(gone.view(-1, *[1] * len(module.kernel_size)), 0.0)
        return ((zeroed, *args[1:]), kwargs) if args else (args, {**kwargs, "input": zeroed})

    return hook


def _outcome(model: nn.Module, call: Call, mode: str, differentiate: bool) -> _Outcome:
    model.train(mode == "train")
    seed_rng(SEED)
    given = fresh(call)
    with torch.set_grad_enabled(differentiate), _WithoutDropout():
        outputs = model(*given.args, **given.kwargs)
        gradients = gradients_of(outputs, model) if differentiate else {}
    return _Outcome(snapshot(outputs), gradients, dict(model.named_buffers()))


def _difference(found: _Outcome, expected: _Outcome, room: float) -> Difference | None:
    """Return the first difference beyond `room` times a few units in the last place."""
    difference = difference_of(found.outputs, expected.outputs, OUTPUT_ULPS * room)
    if difference:
        return replace(difference, what=f"its output has {difference}")
    for name, buffer in found.buffers.items():
        difference = difference_of(buffer, expected.buffers[name], OUTPUT_ULPS * room)
        if difference:
            return replace(difference, what=f"the buffer {name!r} has {difference}")
    # A gradient may be zero but for rounding, and rounding is that of the whole backward pass.
    scale = max((float(g.abs().max()) for g in expected.gradients.values()), default=0.0)
    for name, gradient in found.gradients.items():
        # What is missing here does not reach the output.
        wanted = expected.gradients.get(name, torch.zeros_like(gradient))
        difference = difference_of(gradient, wanted, GRADIENT_ULPS * room, scale)
        if difference:
            return replace(difference, what=f"the gradient of {name!r} has {difference}")
    return None


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _WithoutDropout(AlikeDraws):
    """Let dropout pass everything; make other draws functions of their name and shape."""

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
