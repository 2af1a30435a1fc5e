"""From a plan to a ticket: rewrite the graphs, take out what died, prove the result."""

from __future__ import annotations

from blockprune.surgery.record import TicketRecord, record_of
from blockprune.surgery.remove import cut_blocks, remove_blocks

__all__ = ["TicketRecord", "cut_blocks", "record_of", "remove_blocks"]
