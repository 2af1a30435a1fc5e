"""What a ticket measures as it is, and by each method of `recover`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

import blockprune
from blockprune.recovery import METHODS

BATCH = 64
CLOSED_FORMS = [method for method in METHODS if method != "distill"]


def batches(images: Tensor, size: int = BATCH) -> list[tuple[Tensor, None]]:
    """Return unlabelled batches."""
    return [(part, None) for part in images.split(size)]


def recovered(
    ticket: nn.Module,
    dense: nn.Module,
    data: Any,
    measure: Callable[[nn.Module], Any],
    methods: Sequence[str] = CLOSED_FORMS,
) -> dict[str, Any]:
    """Return what a ticket measures as it is, and by each closed form, with the time that took."""
    found: dict[str, Any] = {"nothing": {"value": measure(ticket), "seconds": 0.0}}
    for method in methods:
        found[method] = recovered_by(method, ticket, dense, data, measure)
        print(f"{method}: {found[method]['value']}", flush=True)
    return found


def recovered_by(
    method: str,
    ticket: nn.Module,
    dense: nn.Module,
    data: Any,
    measure: Callable[[nn.Module], Any],
) -> dict[str, Any]:
    """Return what a ticket measures by one method, the time that took, and what it did."""
    start = time.process_time()
    working = blockprune.recover(ticket, dense, data, method)
    seconds = time.process_time() - start
    record = blockprune.recovery_of(working)
    return {
        "value": measure(working),
        "seconds": seconds,
        "residuals": [(gap.residual_before, gap.residual_after) for gap in record.gaps],
        "ridges": [gap.ridge for gap in record.gaps if gap.ridge is not None],
    }
