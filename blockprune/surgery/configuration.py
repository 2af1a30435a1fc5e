"""Keeping the configuration of a transformers model in step with its layers.

A shallower model of that library is more than a shorter list: `num_hidden_layers` and lists such as
`layer_types` say how many layers there are, caches are made from them, and each attention knows its
`layer_idx`. Which entry of a configuration belongs to which list is not read off names but tried:
the right one is that from which the model's own class builds a model with just the weights that are
left. That is also what `save_pretrained` and `from_pretrained` need.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from blockprune.errors import raise_if_out_of_memory
from blockprune.surgery.lists import Removal, moved_up
from blockprune.surgery.record import translated

__all__ = ["follow_configuration", "has_configuration"]

_Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Change:
    """One number of a configuration, within nested ones, that may count the layers of a list."""

    path: tuple[str, ...]
    index: int | None = None


def has_configuration(model: nn.Module) -> bool:
    """Whether `model` is of transformers, and so is described by a configuration; no graph is."""
    library = sys.modules.get("transformers")
    kind = getattr(library, "PreTrainedModel", None)
    is_of_library = kind is not None and isinstance(model, kind)
    return is_of_library and not isinstance(model, fx.GraphModule)


def follow_configuration(
    dense: nn.Module, ticket: nn.Module, gone: Sequence[Removal]
) -> tuple[nn.Module, str] | None:
    """Bring the configuration of `ticket`, which is changed, in step with what is left of it.

    Args:
        dense: the model that the ticket was cut from.
        ticket: a copy of it without the layers `gone`; those left have the names they had.
        gone: what was taken out of which list.

    Returns:
        The model that its class builds from the new configuration, without memory, and in words a
        number that it computes with and the ticket does not, if there is one. None where no such
        configuration was found, and the ticket is left as it is.
    """
    before = _build(dense, dense.config)
    if before is None or _shapes(before) != _shapes(dense):
        return None
    config, expected = dense.config, _shapes(dense)
    for removal in gone:
        expected = _without(expected, removal)
        found = _matching(dense, config, removal, expected)
        if found is None:
            return None
        config = found
    after = _build(dense, config)
    assert after is not None
    return after, _adopt(ticket, dense, before, after, moved_up(gone))


def _matching(dense: nn.Module, config: Any, removal: Removal, expected: _Shapes) -> Any:
    changes = list(_changes(config, removal))
    # Entries that follow from another do so as a rule, but may have been set to what they were.
    for with_derived in (False, True):
        for change in changes:
            candidate = _changed(config, change, removal, with_derived)
            stored = None if candidate is None else _stored(candidate)
            built = None if stored is None else _build(dense, stored)
            if built is not None and _shapes(built) == expected:
                return candidate
    return None


def _stored(config: Any) -> Any:
    """Return a configuration as it would be read from its file, or None where it could not."""
    try:
        return type(config).from_dict(json.loads(config.to_json_string(use_diff=True)))
    except Exception as error:
        raise_if_out_of_memory(error)
        # The class of the configuration says that this does not fit together.
        return None


def _build(dense: nn.Module, config: Any) -> nn.Module | None:
    """Return a model of the class of `dense` without memory, or None where there is none."""
    try:
        with torch.device("meta"):
            built = type(dense)(copy.deepcopy(config))
    except Exception as error:
        raise_if_out_of_memory(error)
        # A configuration that makes no sense to the class is not the one that is looked for.
        return None
    return built if isinstance(built, nn.Module) else None


def _shapes(model: nn.Module) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _without(shapes: _Shapes, removal: Removal) -> _Shapes:
    """Return the shapes that are left, under the names that a shorter list gives them."""
    names = {old: new for new, old in moved_up([removal]).items()}
    dropped = tuple(f"{removal.path}.{key}." for key in removal.keys)
    return {
        translated(name, names): shape
        for name, shape in shapes.items()
        if not name.startswith(dropped)
    }


def _changes(config: Any, removal: Removal) -> Iterator[_Change]:
    """Yield every number that is the length of the list, those called after layers first."""
    found = list(_numbers(config, removal.size, ()))
    yield from sorted(found, key=lambda change: "layer" not in change.path[-1])


def _numbers(config: Any, size: int, path: tuple[str, ...]) -> Iterator[_Change]:
    for name, value in vars(config).items():
        if type(value) is int and value == size:
            yield _Change((*path, name))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if type(item) is int and item == size:
                    yield _Change((*path, name), index)
        elif hasattr(value, "to_dict") and name != "generation_config":
            yield from _numbers(value, size, (*path, name))


def _changed(config: Any, change: _Change, removal: Removal, with_derived: bool) -> Any:
    """Return a copy of `config` with that number, and what goes with it, made smaller."""
    config = copy.deepcopy(config)
    holder = config
    for name in change.path[:-1]:
        holder = getattr(holder, name)
    name, left = change.path[-1], removal.size - len(removal.keys)
    old = getattr(holder, name)
    new: Any = left
    if change.index is not None:
        new = [left if i == change.index else number for i, number in enumerate(old)]
    try:
        derived = _derived(holder, name, old, new) if with_derived else {}
        for other, value in list(vars(holder).items()):
            is_per_layer = isinstance(value, list | tuple) and len(value) == removal.size
            if change.index is None and is_per_layer:
                kept = [v for i, v in enumerate(value) if i not in removal.positions]
                setattr(holder, other, type(value)(kept))
            elif other in derived:
                setattr(holder, other, derived[other])
        setattr(holder, name, new)
    except Exception as error:
        raise_if_out_of_memory(error)
        # The class of the configuration says that this does not fit together.
        return None
    return config


def _derived(holder: Any, name: str, old: Any, new: Any) -> dict[str, Any]:
    """Return the entries that the class of a configuration computes from entry `name`.

    An entry of `holder` that it has only because `name` is `old` becomes what it is for `new`.
    """
    before, after = (vars(type(holder)(**{name: value})) for value in (old, new))
    return {
        key: after[key]
        for key, value in before.items()
        if key != name and after.get(key) != value and vars(holder).get(key) == value
    }


def _adopt(
    ticket: nn.Module,
    dense: nn.Module,
    before: nn.Module,
    after: nn.Module,
    moved: Mapping[str, str],
) -> str:
    """Give the modules of `ticket` the configurations and indices that `after` has.

    Of plain attributes, only those follow that the dense model has from its configuration, and only
    indices, flags and names: numbers such as rates and scales are the model's own. Return the first
    such number that differs, in words.
    """
    drift = ""
    own, was = dict(dense.named_modules()), dict(before.named_modules())
    now = {translated(name, moved): module for name, module in after.named_modules()}
    for name, module in ticket.named_modules():
        twin = now.get(name)
        if twin is None or type(twin) is not type(module):
            continue
        for attribute, value in vars(twin).items():
            if hasattr(value, "to_dict"):
                setattr(module, attribute, value)
            elif isinstance(value, int | str) and attribute != "training":
                as_built = vars(was[name]).get(attribute)
                if vars(own[name]).get(attribute) == as_built == vars(module).get(attribute):
                    setattr(module, attribute, value)
            elif isinstance(value, float) and value != vars(module).get(attribute):
                kept = vars(module).get(attribute)
                drift = drift or f"{attribute} of {name!r} is {kept} here and {value} there"
    return drift
