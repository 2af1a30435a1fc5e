"""One run of a traced model, watched operation by operation, through regions inside regions.

A region may lie inside a module that another region calls as one operation, and may be called many
times. What goes with such an operation goes with all that runs inside it, so every execution is
known by its *chain*: the operations that are under way, from the outermost region's to its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from blockprune.randomness import seed_rng
from blockprune.tracing import (
    CallInterpreter,
    Followed,
    TracedModel,
    assemble,
    isolated,
    structural_copy,
)

__all__ = ["Chain", "WatchedModel", "goes_first"]

Chain = tuple[fx.Node, ...]


class WatchedModel:
    """A copy of a traced model, in evaluation mode, whose regions follow their graphs.

    Args:
        traced: the model; it is left as it is.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._call = traced.call
        self._seen: list[tuple[Chain, float]] = []
        self._wait = _waiting(traced)
        watching = _watching(self._seen.append, self._wait)
        graphs = {region.path: region.graph for region in traced.regions}
        with isolated():
            self._model = assemble(
                structural_copy(traced.root),
                graphs,
                lambda path, module, graph: Followed(module, graph, watching),
            ).eval()

    def run(self) -> tuple[list[tuple[Chain, float]], float]:
        """Run the model once on the inputs it was traced with.

        Returns:
            The chain of each execution with its seconds, in the order in which they ended, where
            what runs inside an operation is part of its time; and the seconds of the whole.
        """
        self._seen.clear()
        inputs = self._call.map(lambda tensor: tensor.detach().clone())
        with isolated(), torch.no_grad():
            seed_rng(0)
            self._wait()
            start = time.perf_counter()
            self._model(*inputs.args, **inputs.kwargs)
            self._wait()
            return list(self._seen), time.perf_counter() - start


def goes_first(chain: Chain, dead: Collection[fx.Node]) -> bool:
    """Whether the last operation of a chain goes, and none that it runs inside of."""
    return chain[-1] in dead and not any(outer in dead for outer in chain[:-1])


def _watching(
    note: Callable[[tuple[Chain, float]], None], wait: Callable[[], None]
) -> type[CallInterpreter]:
    under_way: list[fx.Node] = []

    class Watching(CallInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            under_way.append(n)
            wait()
            start = time.perf_counter()
            result = super().run_node(n)
            wait()
            note((tuple(under_way), time.perf_counter() - start))
            under_way.pop()
            return result

    return Watching


def _waiting(traced: TracedModel) -> Callable[[], None]:
    """Return what waits for the device of the model: a GPU runs behind the code that feeds it."""
    device = next((parameter.device for parameter in traced.root.parameters()), None)
    if device is None or device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)
