"""Whether a ticket and a dense model belong together."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.errors import RecoveryError, StalePlanError
from blockprune.recovery.folding import tensors_of
from blockprune.surgery import TicketRecord, record_of, translated
from blockprune.tracing import Call

__all__ = ["analysed", "record_of_ticket", "warn_of_another"]


def record_of_ticket(ticket: nn.Module) -> TicketRecord:
    """Return the record of a ticket.

    Raises:
        RecoveryError: the module is none.
    """
    record = record_of(ticket)
    if record is None:
        raise RecoveryError(
            f"this {type(ticket).__name__} is not a ticket: it carries no plan. Tickets come from "
            "blockprune.prune, remove_blocks and load_ticket."
        )
    return record


def analysed(dense_model: nn.Module, record: TicketRecord, example: Call) -> BlockAnalysis:
    """Return the analysis of a dense model that a ticket was cut by.

    Raises:
        StalePlanError: the ticket was cut from a model of another structure.
    """
    analysis = find_blocks(
        dense_model,
        example,
        record.plan.granularity,
        preserve_root=record.preserve_root,
        leaf_modules=record.leaf_modules,
    )
    if analysis.fingerprint != record.plan.fingerprint:
        raise StalePlanError(
            f"the ticket was cut from a model of another structure (fingerprint "
            f"{record.plan.fingerprint[:12]}..., this {type(dense_model).__name__} has "
            f"{analysis.fingerprint[:12]}...). Pass the model that it was cut from, and data of "
            "the kind that it was cut with."
        )
    return analysis


def warn_of_another(ticket: nn.Module, dense_model: nn.Module, record: TicketRecord) -> None:
    """Warn where no parameter of a ticket is that of the dense model, as in an untrained one."""
    earlier = record.recovery
    while earlier is not None:
        if earlier.method == "distill":
            return
        earlier = earlier.before
    dense = tensors_of(dense_model)
    named = ((translated(n, record.renamed), p) for n, p in ticket.named_parameters())
    pairs = [(parameter, dense[name]) for name, parameter in named if name in dense]
    # The first that both have answers it, as a rule.
    if not any(torch.equal(one, other) and not _is_constant(one) for one, other in pairs) and any(
        not _is_constant(one) for one, _ in pairs
    ):
        warnings.warn(
            "the ticket shares no weight with this dense model. Where it was not trained since it "
            "was cut, this is not the model that it was cut from, such as one without its trained "
            "weights; then it learns what that one computes.",
            UserWarning,
            stacklevel=3,
        )


def _is_constant(parameter: Tensor) -> bool:
    """Whether all numbers are alike, as those of a fresh norm are in any two models."""
    return not parameter.numel() or bool((parameter == parameter.flatten()[0]).all())
