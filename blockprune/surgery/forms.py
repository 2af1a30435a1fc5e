"""Two forms of one model, compared as a user would run them.

Where layers that became a pass-through are taken out of their lists, what comes of it is compared
with the ticket that was proved before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from blockprune.randomness import AlikeDraws
from blockprune.surgery.comparing import (
    OUTPUT_ULPS,
    Outcome,
    difference_of,
    fresh,
    gradients_differ,
    gradients_of,
    is_coarse,
    types_of,
)
from blockprune.tracing import Call, isolated, structural_copy

__all__ = ["differ"]


def differ(one: nn.Module, other: nn.Module, call: Call, names: Callable[[str], str]) -> str:
    """Say how two models differ as functions, in both modes and in gradients; "" if they agree.

    `names` turns the name of a parameter of `other` into its name in `one`.
    """
    with isolated():
        for mode in ("eval", "train"):
            try:
                expected = _drawn_alike(one, call, mode)
            except Exception:
                if mode == "eval":
                    raise
                # The model itself does not run in train mode on these inputs.
                continue
            try:
                found = _drawn_alike(other, call, mode)
            except Exception as error:
                return f"it fails in {mode} mode: {type(error).__name__}: {error}"
            difference = _outcomes_differ(found, expected, names, 0.0 if is_coarse(one) else 1.0)
            if difference:
                return f"in {mode} mode, {difference}"
    return ""


def _drawn_alike(model: nn.Module, call: Call, mode: str) -> Outcome:
    """Run a model so that its draws do not depend on what else was drawn before."""
    model = structural_copy(model).train(mode == "train")

    def run(differentiate: bool) -> Outcome:
        inputs = fresh(call)
        with torch.set_grad_enabled(differentiate), AlikeDraws():
            outputs = model(*inputs.args, **inputs.kwargs)
            return outputs, gradients_of(outputs, model) if differentiate else None

    try:
        return run(differentiate=True)
    except Exception:
        # Some networks overwrite what their backward needs.
        return run(differentiate=False)


def _outcomes_differ(
    found: Outcome, expected: Outcome, names: Callable[[str], str], room: float
) -> str:
    if types_of(found[0]) != types_of(expected[0]):
        return f"it returns {types_of(found[0])} instead of {types_of(expected[0])}"
    difference = difference_of(found[0], expected[0], room * OUTPUT_ULPS)
    if difference or expected[1] is None:
        return str(difference or "")
    if found[1] is None:
        return "its backward pass fails, which it did not before"
    gradients = {names(name): gradient for name, gradient in found[1].items()}
    return str(gradients_differ(gradients, expected[1], room) or "")
