"""What a ticket cannot keep of the dense model, said in warnings.

A module that became part of a graph is not called any more, so the hooks that a user has put on it
do not run. A normalisation that a removed branch shared with what stays sees less in training than
it did.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from blockprune.surgery.comparing import fresh
from blockprune.surgery.record import translated
from blockprune.surgery.remnants import Dissolved
from blockprune.tracing import Call, isolated, structural_copy

__all__ = ["warn_of_lost_hooks", "warn_of_lost_statistics"]

_HOOKS = {
    "_forward_pre_hooks": "forward",
    "_forward_hooks": "forward",
    "_backward_pre_hooks": "backward",
    "_backward_hooks": "backward",
}


def warn_of_lost_hooks(
    model: nn.Module, ticket: nn.Module, renamed: Mapping[str, str], *, stacklevel: int
) -> None:
    """Say so where a module with the user's hooks is not called in the ticket.

    Hooks of modules that went with a branch are no loss, unless the module holds others. Those of a
    weight that stays are lost, as the ticket has weights of its own.
    """
    left = {translated(name, renamed): part for name, part in ticket.named_modules()}
    for name, module in model.named_modules():
        part = left.get(name)
        is_lost = isinstance(part, Dissolved) or (part is None and module._modules)
        kinds = {kind for registry, kind in _HOOKS.items() if _users(vars(module)[registry])}
        if is_lost and kinds:
            warnings.warn(
                f"the {' and '.join(sorted(kinds, reverse=True))} hooks of {name or 'the root'!r} "
                "are not carried into the ticket: it calls no such module. Register them on the "
                "ticket, or on the layers inside.",
                stacklevel=stacklevel,
            )

    own = {translated(name, renamed) for name, _ in ticket.named_parameters()}
    hooked = [name for name, weight in model.named_parameters() if _has_hooks(weight)]
    if names := [name for name in hooked if name in own]:
        warnings.warn(
            f"the hooks of {', '.join(map(repr, names))} are not carried into the ticket, which "
            "has weights of its own. Register them on those of the ticket.",
            stacklevel=stacklevel,
        )


def warn_of_lost_statistics(
    model: nn.Module, shared: Iterable[str], call: Call, *, stacklevel: int
) -> None:
    """Say so where a module that a removed branch called too keeps statistics in train mode.

    `shared`: names of the modules that both removed branches and what stays call.
    """
    found = {name: model.get_submodule(name) for name in shared}
    if not any(next(module.buffers(), None) is not None for module in found.values()):
        return
    copy = structural_copy(model)
    before = {name: buffer.clone() for name, buffer in copy.named_buffers()}
    _run_in_train_mode(copy, call)
    after = dict(copy.named_buffers())
    names = [
        name
        for name in sorted(found)
        if any(
            not torch.equal(before[key], after[key])
            for key in (f"{name}.{inner}" for inner, _ in found[name].named_buffers())
        )
    ]
    if names:
        warnings.warn(
            f"{', '.join(map(repr, names))}: called by a removed branch and by what stays. In "
            "training its statistics will be those of the calls that stay, as if the removed "
            "branch were not there, not as if its output were multiplied by zero.",
            stacklevel=stacklevel,
        )


def _users(hooks: Mapping[int, Any]) -> bool:
    """Whether any of the hooks is not one of torch's own, which compute weights."""
    return any(not (type(hook).__module__ or "").startswith("torch.") for hook in hooks.values())


def _has_hooks(weight: nn.Parameter) -> bool:
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))


def _run_in_train_mode(copy: nn.Module, call: Call) -> None:
    """Run a copy of a model as far as it runs in train mode on these inputs."""
    inputs = fresh(call)
    try:
        with isolated(), torch.no_grad():
            copy.train()(*inputs.args, **inputs.kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError):
        # It may want other inputs in train mode; what ran before has been seen.
        return
