"""Which adds of an eager model close which residual branches, found without any trace.

Of a block only its owner's name and its parameters' names are taken. In the owner's own frame the
branch is the operand of an add that alone, and not the other one too, was computed from all of
these parameters, while both were computed from one activation.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.blocks import ResidualBlock

from .ancestry import Ancestry, read_by
from .calls import Add, Adds, OpenModules

__all__ = ["BranchNotFoundError", "Finder", "Switch", "SwitchedOff", "paths_of"]


class BranchNotFoundError(Exception):
    """No add of the eager model, or not the expected number of them, closes a branch."""


@dataclasses.dataclass(frozen=True)
class Switch:
    """An operand to multiply by zero: whose add, the how many-th of it, and which operand."""

    owner: str
    place: int
    operand: int


@dataclasses.dataclass(eq=False)
class _Candidate:
    """An operand of an add, and what distinguishes it from the other one."""

    switch: Switch
    call: int
    own: set[Any]  # operations that only this operand depends on
    reads: set[int]  # the parameters that they read
    other_reads: set[int]  # the same of the other operand
    has_common_activation: bool
    other_is_entry: bool  # the other operand is what this one was computed from
    result: Any = None

    def may_be(self, parameters: set[int]) -> bool:
        """Whether this can be the branch that has these parameters."""
        return (
            parameters <= self.reads
            and not parameters & self.other_reads
            and self.has_common_activation
        )


def paths_of(model: nn.Module) -> dict[int, str]:
    """Return the first name of every module by its identity."""
    return {id(module): path for path, module in model.named_modules()}


class Finder(Adds):
    """Watches a differentiable run of a dense model, and then finds branches in it."""

    def __init__(self, opened: OpenModules, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__(opened)
        self._paths = paths_of(opened.model)
        self._parameters = dict(opened.model.named_parameters(remove_duplicate=False))
        self._owners = {id(opened.model.get_submodule(block.owner)) for block in blocks}
        self._candidates: dict[str, list[_Candidate]] = defaultdict(list)
        self._seen: list[_Candidate] = []

    def before(self, add: Add) -> None:
        """Compare what the operands were computed from."""
        self._seen = []
        if id(add.frame.module) not in self._owners:
            return
        ancestries = [Ancestry([operand]) for operand in add.operands]
        own = [mine.computed() - other.nodes for mine, other in _both(ancestries)]
        reads = [read_by(nodes) for nodes in own]
        owner = self._paths[id(add.frame.module)]
        for index, (mine, other) in enumerate(_both(ancestries)):
            self._seen.append(
                _Candidate(
                    switch=Switch(owner, add.place, index),
                    call=add.frame.call,
                    own=own[index],
                    reads=reads[index],
                    other_reads=reads[1 - index],
                    has_common_activation=(
                        not mine.computed().isdisjoint(other.nodes)
                        or _is_constant_input(add.operands[1 - index], add)
                    ),
                    other_is_entry=mine.includes(add.operands[1 - index]),
                )
            )
        self._candidates[owner] += self._seen

    def after(self, add: Add, result: Tensor) -> None:
        """Remember the sum, by which an operand of a later add is known to hold this one."""
        for candidate in self._seen:
            candidate.result = result.grad_fn

    def find(
        self, block: ResidualBlock, blocks: Sequence[ResidualBlock], outputs: Iterable[Tensor]
    ) -> list[Switch]:
        """Return where `block`, one of all `blocks` of the model, is switched off.

        Raises:
            BranchNotFoundError: no add qualifies, or another number than there are such blocks.
        """
        wanted = {id(self._parameters[name]) for name in block.parameters}
        used = wanted & Ancestry(outputs).parameters()
        if not used:
            raise BranchNotFoundError(f"{block.name}: no output depends on any of its parameters")
        owner = self._paths[id(self.opened.model.get_submodule(block.owner))]
        found = _closing(self._candidates[owner], used)
        alike = [other.name for other in blocks if _is_alike(other, block)]
        if not found or len(found) % len(alike):
            raise BranchNotFoundError(
                f"{block.name}: {len(found)} adds in the forward of {owner or 'the root'!r} close "
                f"a branch with its parameters, for {len(alike)} such blocks"
            )
        # A module that is called repeatedly repeats all of its branches.
        return [candidate.switch for candidate in found[alike.index(block.name) :: len(alike)]]

    def forget(self) -> None:
        """Let go of autograd's graph."""
        self._candidates.clear()
        self._seen = []


def _is_constant_input(operand: Tensor, add: Add) -> bool:
    """Whether this is a tensor the call was given that autograd does not know, such as zeros."""
    return not operand.requires_grad and any(operand is given for given in add.frame.given)


def _both(pair: Sequence[Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    return (pair[0], pair[1]), (pair[1], pair[0])


def _closing(candidates: Iterable[_Candidate], parameters: set[int]) -> list[_Candidate]:
    """Return the operands that are the branch, in order; sums that merely hold one are left out."""
    by_call: dict[int, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.may_be(parameters):
            by_call[candidate.call].append(candidate)
    chosen: list[_Candidate] = []
    for call in by_call.values():
        found: list[_Candidate] = []
        # Beside a parallel branch the shortcut is a sum; otherwise it is the branch's own input.
        for candidate in [c for c in call if c.other_is_entry] or call:
            if not any(earlier.result in candidate.own for earlier in found):
                found.append(candidate)
        chosen += found
    return chosen


def _is_alike(other: ResidualBlock, block: ResidualBlock) -> bool:
    """Whether two blocks differ in nothing but the number after their name."""
    return (
        other.name.partition("#")[0] == block.name.partition("#")[0]
        and other.owner == block.owner
        and other.parameters == block.parameters
    )


class SwitchedOff(Adds):
    """Multiplies operands by zero; afterwards `missed` holds the switches never come across."""

    def __init__(self, opened: OpenModules, switches: Iterable[Switch]) -> None:
        super().__init__(opened)
        self._paths = paths_of(opened.model)
        self._operands: Mapping[tuple[str, int], int] = {
            (switch.owner, switch.place): switch.operand for switch in switches
        }
        self.missed = set(self._operands)

    def before(self, add: Add) -> None:
        """Exchange the operand for zeros."""
        place = (self._paths[id(add.frame.module)], add.place)
        if place not in self._operands:
            return
        self.missed.discard(place)
        index = self._operands[place]
        if add.is_in_place and index == 0:
            # The sum is written into the branch itself, which others may hold.
            add.operands[0].zero_()
        else:
            add.operands[index] = torch.zeros_like(add.operands[index])
