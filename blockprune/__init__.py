"""blockprune: genuinely shallower networks, by removing whole residual blocks.

`prune` is the one call. The steps behind it are values that can be looked at: `find_blocks` gives
an analysis, `score_blocks` a table, `make_plan` a plan, `remove_blocks` a ticket.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockprune.api import make_plan, prune
    from blockprune.blocks import (
        BlockAnalysis,
        Reason,
        Rejection,
        ResidualBlock,
        Stage,
        find_blocks,
    )
    from blockprune.errors import (
        ApproximationWarning,
        BlockNotFoundError,
        BlockNotRemovableError,
        BlockpruneError,
        CheckpointError,
        CriterionError,
        DataError,
        InfeasibleBudgetError,
        MaskError,
        MeasurementError,
        MissingExtraError,
        ModelSpecError,
        PlanError,
        RecoveryError,
        SpecError,
        StalePlanError,
        TicketError,
        TraceError,
        TrainingDivergedError,
        VerificationError,
    )
    from blockprune.plan import PruningPlan
    from blockprune.recovery import recover, recovery_of
    from blockprune.scoring import NoDataWarning, ScoreTable, score_blocks, score_criteria
    from blockprune.surgery import remove_blocks
    from blockprune.tickets import load_ticket, plan_of, save_ticket

__version__ = "0.1.0"

__all__ = [
    "ApproximationWarning",
    "BlockAnalysis",
    "BlockNotFoundError",
    "BlockNotRemovableError",
    "BlockpruneError",
    "CheckpointError",
    "CriterionError",
    "DataError",
    "InfeasibleBudgetError",
    "MaskError",
    "MeasurementError",
    "MissingExtraError",
    "ModelSpecError",
    "NoDataWarning",
    "PlanError",
    "PruningPlan",
    "Reason",
    "RecoveryError",
    "Rejection",
    "ResidualBlock",
    "ScoreTable",
    "SpecError",
    "Stage",
    "StalePlanError",
    "TicketError",
    "TraceError",
    "TrainingDivergedError",
    "VerificationError",
    "find_blocks",
    "load_ticket",
    "make_plan",
    "plan_of",
    "prune",
    "recover",
    "recovery_of",
    "remove_blocks",
    "save_ticket",
    "score_blocks",
    "score_criteria",
]

# Names are fetched on first use, so that the command line starts without importing torch.
_HOMES = {
    "ApproximationWarning": "blockprune.errors",
    "BlockAnalysis": "blockprune.blocks",
    "BlockNotFoundError": "blockprune.errors",
    "BlockNotRemovableError": "blockprune.errors",
    "BlockpruneError": "blockprune.errors",
    "CheckpointError": "blockprune.errors",
    "CriterionError": "blockprune.errors",
    "DataError": "blockprune.errors",
    "InfeasibleBudgetError": "blockprune.errors",
    "MaskError": "blockprune.errors",
    "MeasurementError": "blockprune.errors",
    "MissingExtraError": "blockprune.errors",
    "ModelSpecError": "blockprune.errors",
    "NoDataWarning": "blockprune.scoring",
    "PlanError": "blockprune.errors",
    "PruningPlan": "blockprune.plan",
    "Reason": "blockprune.blocks",
    "RecoveryError": "blockprune.errors",
    "Rejection": "blockprune.blocks",
    "ResidualBlock": "blockprune.blocks",
    "ScoreTable": "blockprune.scoring",
    "SpecError": "blockprune.errors",
    "Stage": "blockprune.blocks",
    "StalePlanError": "blockprune.errors",
    "TicketError": "blockprune.errors",
    "TraceError": "blockprune.errors",
    "TrainingDivergedError": "blockprune.errors",
    "VerificationError": "blockprune.errors",
    "find_blocks": "blockprune.blocks",
    "load_ticket": "blockprune.tickets",
    "make_plan": "blockprune.api",
    "plan_of": "blockprune.tickets",
    "prune": "blockprune.api",
    "recover": "blockprune.recovery",
    "recovery_of": "blockprune.recovery",
    "remove_blocks": "blockprune.surgery",
    "save_ticket": "blockprune.tickets",
    "score_blocks": "blockprune.scoring",
    "score_criteria": "blockprune.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blockprune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
