"""What a plan reads of an analysis and of scores: protocols, so that no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from blockprune.granularity import Granularity

__all__ = ["Analysis", "Block", "Scores", "Stage"]


class Block(Protocol):
    """What a plan reads of a `blockprune.blocks.ResidualBlock`."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> int: ...
    @property
    def contains(self) -> tuple[str, ...]: ...


class Stage(Protocol):
    """What a plan reads of a `blockprune.blocks.Stage`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def fixed(self) -> int: ...


class Analysis(Protocol):
    """What a plan reads of a `blockprune.blocks.BlockAnalysis`."""

    @property
    def blocks(self) -> Sequence[Block]: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def preserve_root(self) -> bool: ...
    @property
    def leaf_modules(self) -> tuple[str, ...]: ...


class Scores(Protocol):
    """What a plan reads of a `blockprune.scoring.ScoreTable`."""

    @property
    def criterion(self) -> str: ...
    @property
    def granularity(self) -> str: ...
    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def fingerprint(self) -> str: ...
