"""Recovery: a network that has lost blocks works again, without training."""

from __future__ import annotations

from blockprune.recovery.recover import METHODS, recover, recovery_of

__all__ = ["METHODS", "recover", "recovery_of"]
