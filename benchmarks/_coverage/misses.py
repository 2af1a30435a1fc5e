"""Residual adds of an eager model that no block was made of, and why."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from blockprune.blocks import BlockAnalysis

__all__ = ["Miss", "misses", "normalised"]


@dataclasses.dataclass(frozen=True)
class Miss:
    """Adds of one module that are around an identity shortcut, and no block.

    Attributes:
        owner: the module whose forward adds.
        adds: how many of its adds are no blocks.
        why: what the analysis says of the module, or of one around it.
    """

    owner: str
    adds: int
    why: str


def misses(analysis: BlockAnalysis, owners: Mapping[str, int]) -> Iterator[Miss]:
    """Yield the modules that make more residual adds (`owners`) than they have blocks."""
    found = Counter(block.owner for block in analysis.blocks)
    for owner, adds in owners.items():
        if adds > found[owner]:
            yield Miss(owner, adds - found[owner], _why(analysis, owner))


def _why(analysis: BlockAnalysis, owner: str) -> str:
    around = [path for path in analysis.traced.opaque if _is_within(owner, path)]
    if around:
        outermost = min(around, key=len)
        return f"not looked into: {normalised(analysis.traced.opaque[outermost])}"
    refused = [r.reason for r in analysis.rejections if r.name.partition("#")[0] == owner]
    return f"refused as {' or '.join(dict.fromkeys(refused))}" if refused else "in no graph"


def _is_within(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}.")


def normalised(reason: str) -> str:
    """Return a reason without what distinguishes one model from another."""
    reason = re.sub(r" ?\(at .*\)", "", reason)
    reason = re.sub(r"'[^']*'", "'...'", reason)
    reason = re.sub(r"\d+", "N", reason)
    return reason if len(reason) <= 120 else reason[:117] + "..."
