"""How many of the branches that a model is known to have were found, and verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .study import verdict_of

__all__ = ["FAILED", "STATUSES", "is_failed", "status_of"]

STATUSES = ("complete", "found", "none", "partly", "unseen", "wrong", "crash")
FAILED = ("wrong", "crash")


def status_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the status of a row that says how many branches are `expected`, and why it is that.

    - complete: every branch was found, and all tickets verified.
    - found: every branch was found, and no ticket was asked for.
    - none: there is none, and none was found.
    - partly, unseen: some, or all, were not found.
    - wrong: a ticket differs or is refused, or there are more blocks than branches.
    - crash: an error that is none of the package's own, or a limit.
    """
    if "error" in row:
        return "crash", str(row["error"])
    if "refusal" in row:
        return "wrong" if "branches" in row else "unseen", str(row["refusal"])
    verdict, why = verdict_of(row)
    if verdict == "failed":
        return "wrong", why
    found, expected = row["branches"], row["expected"]
    if found > expected:
        return "wrong", f"{found} blocks where there are {expected} branches"
    if found == expected:
        if not expected:
            return "none", ""
        return ("found" if verdict == "analysed" else "complete"), why
    return ("partly" if found else "unseen"), _missed(row)


def is_failed(row: Mapping[str, Any]) -> bool:
    """Whether a row is a failure, and not merely less than was hoped for."""
    if "expected" in row:
        return status_of(row)[0] in FAILED
    return verdict_of(row)[0] == "failed"


def _missed(row: Mapping[str, Any]) -> str:
    """Say why branches were not found, the most frequent reason first."""
    reasons: Counter[str] = Counter()
    for miss in row["missed"]:
        reasons[miss["why"]] += miss["adds"]
    return "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
