"""How many adds an eager model makes, and how many of them are around an identity shortcut."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from torch import nn

from .ancestry import Ancestry, read_by
from .branches import paths_of
from .calls import Add, Adds, OpenModules
from .outcome import Inputs, copied
from .running import all_trainable, run

__all__ = ["AddCount", "count_adds"]


@dataclasses.dataclass(frozen=True)
class AddCount:
    """Adds in one pass.

    Attributes:
        activations: of two tensors that were computed from one activation.
        residual: those in which one operand is what the other was computed from, by way of
            parameters, and has the shape of the sum.
        owners: how many of the latter each module makes, by its first name.
    """

    activations: int
    residual: int
    owners: Mapping[str, int]


def count_adds(model: nn.Module, inputs: Inputs) -> AddCount:
    """Run a copy of the model eagerly in eval mode and count its adds."""
    model = copied(model).eval()
    with all_trainable(model), OpenModules(model) as opened, _Counter(opened) as counter:
        run(model, inputs, differentiable=True)
    return AddCount(counter.activations, counter.owners.total(), dict(counter.owners))


class _Counter(Adds):
    def __init__(self, opened: OpenModules) -> None:
        super().__init__(opened)
        self.activations = 0
        self.owners: Counter[str] = Counter()
        self._paths = paths_of(opened.model)

    def before(self, add: Add) -> None:
        first, second = [Ancestry([operand]) for operand in add.operands]
        if first.computed().isdisjoint(second.nodes):
            return
        self.activations += 1
        whole = tuple(max(sizes) for sizes in zip(*(t.shape for t in add.operands), strict=False))
        for mine, other, shortcut in (
            (first, second, add.operands[1]),
            (second, first, add.operands[0]),
        ):
            is_entry = mine.includes(shortcut) and tuple(shortcut.shape) == whole
            if is_entry and read_by(mine.computed() - other.nodes):
                self.owners[self._paths[id(add.frame.module)]] += 1
                return
