"""Lists of layers: which layers can be taken out of one, and what those behind are called then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import fx, nn

from blockprune.blocks import carried_names, carry_name
from blockprune.surgery.record import translated

__all__ = ["Removal", "is_in_list", "moved_up", "removals", "renumber", "take_out"]


@dataclasses.dataclass(frozen=True)
class Removal:
    """Layers that go from one list.

    Attributes:
        path: of the list, a `ModuleList` or `Sequential`, in the model.
        keys: of the layers in it that go.
        kept: of the layers in it that stay, in order.
        positions: where in the list the layers stood.
    """

    path: str
    keys: tuple[str, ...]
    kept: tuple[str, ...]
    positions: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many layers the list held."""
        return len(self.keys) + len(self.kept)


def is_in_list(model: nn.Module, name: str) -> bool:
    """Whether the module `name` is an element of a `ModuleList` or a `Sequential`."""
    path, _, _ = name.rpartition(".")
    if not path:
        return False
    holder = model.get_submodule(path)
    is_numbered = all(key.isdecimal() for key in holder._modules)
    return isinstance(holder, nn.ModuleList | nn.Sequential) and is_numbered


def removals(model: nn.Module, layers: Iterable[str]) -> list[Removal]:
    """Return what goes from which list of `model` when these elements of lists go."""
    found: dict[str, list[str]] = {}
    for name in layers:
        path, _, key = name.rpartition(".")
        found.setdefault(path, []).append(key)
    result = []
    for path, keys in found.items():
        every = list(model.get_submodule(path)._modules)
        gone = tuple(key for key in every if key in keys)
        kept = tuple(key for key in every if key not in keys)
        result.append(Removal(path, gone, kept, tuple(every.index(key) for key in gone)))
    return result


def take_out(ticket: nn.Module, gone: Sequence[Removal]) -> None:
    """Take the layers out of `ticket`, which is changed; those behind them keep their names."""
    for removal in gone:
        holder = ticket.get_submodule(removal.path)
        for key in removal.keys:
            del holder._modules[key]


def moved_up(gone: Sequence[Removal]) -> dict[str, str]:
    """Return, for each layer behind one that goes, the name it would move up to, to its name."""
    moved: dict[str, str] = {}
    for removal in gone:
        for new, old in enumerate(removal.kept):
            if str(new) != old:
                moved[f"{removal.path}.{new}"] = f"{removal.path}.{old}"
    return moved


def renumber(ticket: nn.Module, gone: Sequence[Removal]) -> None:
    """Give the layers left the names that a shallower model of the same class has."""
    for removal in gone:
        holder = ticket.get_submodule(removal.path)
        kept = list(holder._modules.values())
        holder._modules.clear()
        holder._modules.update({str(position): layer for position, layer in enumerate(kept)})
    names = {old: new for new, old in moved_up(gone).items()}
    for module in ticket.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                for position, name in carried_names(node).items():
                    carry_name(node, position, translated(name, names))
