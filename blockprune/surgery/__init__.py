"""From a plan to a ticket: rewrite the graphs, take out what died, prove the result."""

from __future__ import annotations

from blockprune.surgery.record import (
    GapRecord,
    RecoveryRecord,
    TicketRecord,
    attach,
    record_of,
    translated,
)
from blockprune.surgery.remove import cut_blocks, cuts_of, remove_blocks
from blockprune.surgery.rewrite import ticket_graph
from blockprune.surgery.zeroing import follow

__all__ = [
    "GapRecord",
    "RecoveryRecord",
    "TicketRecord",
    "attach",
    "cut_blocks",
    "cuts_of",
    "follow",
    "record_of",
    "remove_blocks",
    "ticket_graph",
    "translated",
]
