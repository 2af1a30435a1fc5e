"""The values that an analysis is made of. They hold no tensor and change nothing."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import fx

from blockprune.errors import BlockNotFoundError, BlockNotRemovableError, close_names
from blockprune.granularity import Granularity
from blockprune.tracing import TracedModel

if TYPE_CHECKING:
    from blockprune.blocks.cuts import Cuts

__all__ = ["BlockAnalysis", "Reason", "Rejection", "ResidualBlock", "Stage"]


class Reason(enum.StrEnum):
    """Why a merge is not a removable residual block."""

    PROJECTION_SHORTCUT = "projection_shortcut"
    INDEPENDENT_OPERANDS = "independent_operands"
    SCALED_SHORTCUT = "scaled_shortcut"
    SHAPE_CHANGE = "shape_change"
    BRANCH_ESCAPES = "branch_escapes"
    MUTATES_SHORTCUT = "mutates_shortcut"
    NO_PARAMETERS = "no_parameters"
    OPAQUE = "opaque"


@dataclasses.dataclass(frozen=True)
class ResidualBlock:
    """One removable residual block.

    Attributes:
        name: the owner's qualified name where the owner has one branch, else `owner.child`.
        owner: the module whose forward does the add.
        params: parameters (elements) that vanish from the ticket when this block alone goes.
        shape: of the shortcut for the example inputs, batch included.
        stage: index into `BlockAnalysis.stages`.
        branches: names of the branches it is made of (itself at granularity "branch").
        contains: names of the blocks nested in it, which go when it goes.
        parameters: qualified names of all parameters its branches read, shared ones included.
        is_exact: whether removing it is multiplying branches by zero. Where not, which only
            granularity "layer_approx" offers, normalisations of the layer go as well.
    """

    name: str
    owner: str
    params: int
    shape: tuple[int, ...]
    stage: int
    branches: tuple[str, ...]
    contains: tuple[str, ...]
    parameters: tuple[str, ...]
    is_exact: bool = True


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A merge, or an opaque module, that was looked at and refused.

    Attributes:
        name: the module whose forward does the add (`#k` where it does several).
        reason: a `Reason` code.
        detail: one sentence on what was found.
        shape: of the merge's result, None for an opaque module.
    """

    name: str
    reason: Reason
    detail: str
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """The residual merges of one shape.

    Attributes:
        shape: of their results for the example inputs, batch included.
        blocks: names of the removable ones, in order of execution.
        fixed: how many more there are that stay, such as the one with a projection shortcut.
    """

    shape: tuple[int, ...]
    blocks: tuple[str, ...]
    fixed: int


@dataclasses.dataclass(frozen=True)
class BlockAnalysis:
    """What `find_blocks` found in one model.

    Attributes:
        blocks: the removable blocks, in order of execution.
        rejections: every merge looked at and refused, in order of execution.
        granularity: "branch", "layer" or "layer_approx".
        fingerprint: identifies the structure (not the weights) that was analysed.
        stages: the residual merges grouped by shape.
        traced: the graphs behind it.
        preserve_root: whether it was made to keep the root's class.
    """

    blocks: tuple[ResidualBlock, ...]
    rejections: tuple[Rejection, ...]
    granularity: Granularity
    fingerprint: str
    stages: tuple[Stage, ...]
    traced: TracedModel = dataclasses.field(repr=False, compare=False)
    cuts: Cuts = dataclasses.field(repr=False, compare=False)
    preserve_root: bool = False

    @property
    def leaf_modules(self) -> tuple[str, ...]:
        """The modules that were not to be looked into, as asked for, classes by name."""
        return self.traced.leaf_modules

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the removable blocks, in order of execution."""
        return tuple(block.name for block in self.blocks)

    def block(self, name: str) -> ResidualBlock:
        """Return the block of that name.

        Raises:
            BlockNotRemovableError: it is a merge that was refused; the rejection is quoted.
            BlockNotFoundError: there is none; close names are given.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        if name in self.cuts.bypasses:
            raise BlockNotRemovableError(
                f"{name!r} cannot be removed exactly: without its branches, normalisations on the "
                'stream stay. granularity="layer_approx" removes it whole, as an approximation. '
                f"Removable {self.granularity} blocks: {_listed(self.names)}."
            )
        for rejection in self.rejections:
            if name in (rejection.name, rejection.name.partition("#")[0]):
                raise BlockNotRemovableError(
                    f"{name!r} cannot be removed: {rejection.reason} ({rejection.detail}). "
                    f"Removable {self.granularity} blocks: {_listed(self.names)}."
                )
        raise BlockNotFoundError(
            f"there is no residual block {name!r}.{close_names(name, self.names)} "
            f"Removable {self.granularity} blocks: {_listed(self.names)}."
        )

    def removed_nodes(self, names: Iterable[str]) -> dict[str, frozenset[fx.Node]]:
        """Return, for each region path, the graph nodes that die when these blocks go."""
        for name in (names := list(names)):
            self.block(name)
        return self.cuts.dead_nodes(self.cuts.of_blocks(names, self.granularity))

    def to_json(self) -> dict[str, Any]:
        """Return the analysis as plain values for a JSON file."""
        return {
            "granularity": self.granularity,
            "fingerprint": self.fingerprint,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "rejections": [dataclasses.asdict(rejection) for rejection in self.rejections],
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
