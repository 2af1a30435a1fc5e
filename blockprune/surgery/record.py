"""What a ticket remembers of how it was made: its plan, and the inputs it was cut with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import fx, nn

from blockprune.plan import PruningPlan
from blockprune.tracing import Call

__all__ = ["GapRecord", "RecoveryRecord", "TicketRecord", "attach", "record_of", "translated"]

_KEY = "blockprune"


class GapRecord(BaseModel):
    """What a recovery did for one gap: a run of removed blocks.

    Attributes:
        blocks: names of the removed blocks.
        weights: names of the weights that were fitted; none where no linear operation reaches it,
            and for "distill", which trains all.
        residual_before: squared error of the stream against the dense model's, as a share of the
            squares of the dense one, in the cut network with the gaps before it recovered.
        residual_after: the same with the fitted weights.
        ridge: what the fit was held to the weights as they were with; None where nothing was
            fitted.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    blocks: tuple[str, ...]
    weights: tuple[str, ...]
    residual_before: float
    residual_after: float
    ridge: float | None = None


class RecoveryRecord(BaseModel):
    """How a ticket was recovered. Its weights are then no longer those of the dense model.

    Attributes:
        method: "norms", "scale", "map", "moments", "refit" or "distill".
        samples: how many samples of the data were read.
        gaps: in order of execution; empty for "norms".
        before: the recovery of the ticket that this one began with; None if it had none.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    method: str
    samples: int
    gaps: tuple[GapRecord, ...] = ()
    before: RecoveryRecord | None = None


@dataclasses.dataclass(frozen=True)
class TicketRecord:
    """The origin of a ticket.

    Attributes:
        plan: everything removed from the dense model, under the dense model's names.
        call: the example inputs, each tensor as a `TensorFact`.
        preserve_root: whether the root's class was kept on purpose.
        removed: names of all branches that went, and of layers bypassed.
        leaf_modules: names and patterns of modules that were not to be looked into.
        verified: the modes in which the ticket was proved equal to its reference.
        compared: each comparison of that proof in words, such as "train: outputs, 62 gradients".
        renamed: for each layer that moved up in its list, its name to that in the dense model.
        recovery: what was done to its weights after the cut.
    """

    plan: PruningPlan
    call: Call
    preserve_root: bool
    removed: tuple[str, ...]
    leaf_modules: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    recovery: RecoveryRecord | None = None


def attach(ticket: nn.Module, record: TicketRecord) -> None:
    """Store the record where a deep copy keeps it."""
    if isinstance(ticket, fx.GraphModule):
        _meta(ticket)[_KEY] = record
    else:
        ticket.__dict__[f"_{_KEY}"] = record


def record_of(model: nn.Module) -> TicketRecord | None:
    """Return the record of a ticket, None for any other model."""
    if isinstance(model, fx.GraphModule):
        found = _meta(model).get(_KEY)
    else:
        found = model.__dict__.get(f"_{_KEY}")
    return found if isinstance(found, TicketRecord) else None


def _meta(module: fx.GraphModule) -> dict[str, Any]:
    # The dense model may call something of its own by that name.
    meta: dict[str, Any] = vars(module).get("meta", {})
    return meta


def translated(name: str, renamed: Mapping[str, str]) -> str:
    """Return `name` with the innermost module in it that was renamed under its other name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in renamed:
            return ".".join([renamed[prefix], *parts[end:]])
    return name
