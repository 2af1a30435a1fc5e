"""Criteria: how important is each block? Higher is more important; the lowest goes first.

A new criterion is one callable in a file of its family and one row here.
"""

from __future__ import annotations

from blockprune.batches import Batch
from blockprune.criteria.activation import (
    AngularDistance,
    BlockInfluence,
    ExpectAbs,
    HRank,
    Pls,
)
from blockprune.criteria.base import Criterion, NoDataWarning, ScoringContext
from blockprune.criteria.combined import Consensus
from blockprune.criteria.control import Random
from blockprune.criteria.derivatives import ZeroScoresWarning
from blockprune.criteria.fisher import Fisher
from blockprune.criteria.gradient import GradNorm, Grasp, Snip, Taylor
from blockprune.criteria.meters import evaluate
from blockprune.criteria.output import Cka, Kl, LossIncrease
from blockprune.criteria.recovered import RecoveredLoss
from blockprune.criteria.synflow import SynFlow
from blockprune.criteria.weights import L1, L2
from blockprune.criteria.zero_cost import JacobCov, Naswot
from blockprune.errors import CriterionError, close_names
from blockprune.losses import main_output

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "AngularDistance",
    "Batch",
    "BlockInfluence",
    "Cka",
    "Consensus",
    "Criterion",
    "ExpectAbs",
    "Fisher",
    "GradNorm",
    "Grasp",
    "HRank",
    "JacobCov",
    "Kl",
    "LossIncrease",
    "Naswot",
    "NoDataWarning",
    "Pls",
    "Random",
    "RecoveredLoss",
    "ScoringContext",
    "Snip",
    "SynFlow",
    "Taylor",
    "ZeroScoresWarning",
    "criterion_of",
    "evaluate",
    "main_output",
]

CRITERIA: dict[str, Criterion] = {
    # From nothing but the seed, the weights, or gradients without data.
    "random": Random(),
    "l1": L1(),
    "l2": L2(),
    "synflow": SynFlow(),
    # From gradients of the loss on one batch: the first derivative, then the second.
    "snip": Snip(),
    "snip_sum": Snip("sum"),
    "grasp": Grasp(),
    "grasp_sum": Grasp("sum"),
    # From gradients of the loss over all batches.
    "taylor": Taylor(),
    "grad_norm": GradNorm(),
    "fisher": Fisher(),
    # From one batch, by what the whole untrained network does with and without the block.
    "naswot": Naswot(),
    "jacob_cov": JacobCov(),
    # From what flows through the blocks, over all batches.
    "hrank": HRank(),
    "expectabs": ExpectAbs(),
    "block_influence": BlockInfluence(),
    "angular_distance": AngularDistance(),
    "pls": Pls(),
    # From what the model returns with one block left out, over all batches.
    "kl": Kl(),
    "cka": Cka(),
    "loss_increase": LossIncrease(),
    # The same after a refit of what is left.
    "recovered_loss": RecoveredLoss(),
    # From the ranks under others.
    "consensus": Consensus(),
}


def criterion_of(criterion: str | Criterion) -> tuple[str, Criterion]:
    """Return the name and the callable of a criterion given as either.

    Raises:
        CriterionError: no criterion has that name, or it is not callable.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise CriterionError(
                f"There is no criterion {criterion!r}.{close_names(criterion, CRITERIA)} "
                f"Known: {', '.join(CRITERIA)}; or pass a callable."
            )
        return criterion, CRITERIA[criterion]
    if not callable(criterion):
        raise CriterionError(
            f"A criterion is a name or a callable, not {type(criterion).__name__}. "
            f"Known names: {', '.join(CRITERIA)}."
        )
    return str(getattr(criterion, "__name__", type(criterion).__name__)), criterion
