"""Cache slots of the attention modules that are left.

In transformers each attention keeps its keys and values in the slot `layer_idx` of a cache, and
the length of what has been seen is read off the first slot (of each kind, where `layer_types` tells
kinds apart). Where branches went and the layers stay, slots would stay empty, the first one among
them; so those left move up to the first slots of their kind.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from blockprune.errors import VerificationError

__all__ = ["fill_cache_slots"]


def fill_cache_slots(ticket: nn.Module, reference: nn.Module, verify: Callable[[], object]) -> None:
    """Let the attention modules of `ticket`, which is changed, use the first slots of a cache.

    Args:
        ticket: a ticket that keeps its class.
        reference: the model with all attention modules, whose slots a cache has.
        verify: raises `VerificationError` where the ticket is not right with it; it is undone then.
    """
    kinds = getattr(getattr(ticket, "config", None), "layer_types", None) or []
    slots, left = _by_place(reference), _by_place(ticket)
    changes: list[tuple[nn.Module, int]] = []
    for place, modules in left.items():
        if len(modules) == len(slots.get(place, ())):
            continue
        free = [(slot, _kind(kinds, slot)) for slot, _ in slots.get(place, [])]
        for slot, module in modules:
            first = next((f for f in free if f[1] == _kind(kinds, slot)), None)
            if first is not None:
                free.remove(first)
                changes.append((module, first[0]))
    if all(module.layer_idx == slot for module, slot in changes):
        return
    old = [(module, vars(module)["layer_idx"]) for module, _ in changes]
    _assign(changes)
    try:
        verify()
    except VerificationError:
        _assign(old)
        warnings.warn(
            "attention modules keep their slots of a cache, since they compute with the number; "
            "generation with a cache may differ from generation without.",
            stacklevel=5,
        )


def _assign(slots: list[tuple[nn.Module, int]]) -> None:
    for module, slot in slots:
        setattr(module, "layer_idx", slot)  # noqa: B010 - a module's own attribute, unknown to it


def _by_place(model: nn.Module) -> dict[str, list[tuple[int, nn.Module]]]:
    """Return slot and module of each attention, by its name without the layer's number."""
    found: dict[str, list[tuple[int, nn.Module]]] = {}
    for name, module in model.named_modules():
        slot: Any = vars(module).get("layer_idx")
        if type(slot) is int:
            place = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            found.setdefault(place, []).append((slot, module))
    return {place: sorted(pairs, key=lambda pair: pair[0]) for place, pairs in found.items()}


def _kind(kinds: list[str], slot: int) -> str:
    return kinds[slot] if slot < len(kinds) else ""
