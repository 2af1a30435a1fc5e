"""How long each block takes, from timing the operations of the dense model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from blockprune.blocks import BlockAnalysis
from blockprune.costs import Chain, WatchedModel, goes_first
from blockprune.errors import MeasurementError
from blockprune.profiling.latency import measure_latency

__all__ = ["LatencyTable"]


class LatencyTable:
    """Milliseconds that a ticket is expected to take, for any set of removed blocks.

    In each round the dense model runs once and every operation of it is timed, so that all blocks
    are measured at the same time and drift falls on all of them. With `t(n)` the median time of
    operation `n` over the rounds, `T` the median of the whole and `D(S)` the operations that die
    with the blocks `S`::

        latency(S) = latency(dense) * (1 - sum over n in D(S) of t(n) / T)

    Operations are timed one by one, on a GPU each with a wait, so it is an estimate: good enough
    to rank blocks and to say about how many must go. A limit is confirmed on a real ticket.

    Args:
        analysis: of the model.
        repeats: rounds.

    Attributes:
        total: median latency of the dense model, in milliseconds.

    Raises:
        MeasurementError: `repeats` is no count.
        TraceError: the model refuses the inputs.
    """

    def __init__(self, analysis: BlockAnalysis, *, repeats: int = 20) -> None:
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise MeasurementError(f"repeats must be a whole number from 1 on, got {repeats!r}.")
        self._analysis = analysis
        traced = analysis.traced
        inputs = traced.call.kwargs or traced.call.args
        [dense] = measure_latency(traced.root, inputs, batch_sizes=None, repeats=repeats)
        self.total = dense.median_ms
        self._shares = _shares(analysis, repeats)

    def __call__(self, removed: Iterable[str]) -> float:
        """Return the expected latency without these blocks, in milliseconds."""
        gone = self._analysis.removed_nodes(removed)
        dead = frozenset().union(*gone.values())
        saved = sum(share for chain, share in self._shares.items() if goes_first(chain, dead))
        return self.total * max(0.0, 1 - saved)


def _shares(analysis: BlockAnalysis, repeats: int) -> dict[Chain, float]:
    """Return the share of each operation in the time of all that were watched."""
    watched = WatchedModel(analysis.traced)
    rounds: dict[Chain, list[float]] = {}
    wholes: list[float] = []
    # The first round also loads kernels and fills caches.
    for number in range(repeats + 1):
        executions, whole = watched.run()
        if number:
            wholes.append(whole)
            for chain, seconds in _summed(executions).items():
                rounds.setdefault(chain, []).append(seconds)
    whole = statistics.median(wholes)
    return {chain: statistics.median(times) / whole for chain, times in rounds.items()}


def _summed(executions: Iterable[tuple[Chain, float]]) -> dict[Chain, float]:
    total: dict[Chain, float] = {}
    for chain, seconds in executions:
        total[chain] = total.get(chain, 0.0) + seconds
    return total
