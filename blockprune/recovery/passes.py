"""Running the dense model up to the targets of gaps, and the cut one up to their streams.

Both are copies whose regions follow their recorded graphs node by node, so that any value in them
can be looked at by name. A run ends as soon as it has what it was made for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from blockprune.randomness import seed_rng
from blockprune.recovery.gaps import Location
from blockprune.surgery import follow
from blockprune.tracing import Call, CallInterpreter, isolated

__all__ = ["Inspected"]


class Inspected:
    """A model whose values can be looked at.

    They can be differentiated by what requires gradients, whatever mode is set around a run.

    Args:
        model: a copy of the dense model with parameters of its own; it is changed.
        graphs: region path to the graph that it is to follow there.
    """

    def __init__(self, model: nn.Module, graphs: Mapping[str, fx.Graph]) -> None:
        self.model = follow(model, graphs, lambda path: partial(_Looking, run=self, path=path))
        self._wanted: Collection[Location] = ()
        self._seen: dict[Location, list[Any]] = {}
        self._ends = False

    def values(self, call: Call, *places: Location) -> dict[Location, list[Any]]:
        """Return all values that these places have in one whole run."""
        return self.outputs_and_values(call, places)[1]

    def outputs_and_values(
        self, call: Call, places: Collection[Location], seed: int = 0
    ) -> tuple[Any, dict[Location, list[Any]]]:
        """Return what one whole run returns, and all values that these places have in it.

        `seed` is that of what the run draws.
        """
        with self._looking(places, ends=False):
            outputs = self._run(call, seed)
        return outputs, self._seen

    def value(self, call: Call, place: Location) -> Tensor:
        """Return the first value of a place; the run ends there."""
        with self._looking([place], ends=True), contextlib.suppress(_Seen):
            self._run(call)
        found: Tensor = self._seen[place][0]
        return found

    def _run(self, call: Call, seed: int = 0) -> Any:
        given = call.map(lambda tensor: tensor.detach().clone())
        with isolated():
            seed_rng(seed)
            return self.model(*given.args, **given.kwargs)

    @contextlib.contextmanager
    def _looking(self, places: Collection[Location], *, ends: bool) -> Iterator[None]:
        self._wanted, self._ends = set(places), ends
        self._seen = {place: [] for place in places}
        try:
            yield
        finally:
            self._wanted = ()

    def note(self, place: Location, value: Any) -> None:
        """Keep a value that was computed, if it is looked for."""
        if place not in self._wanted:
            return
        # Somebody may write into it later on.
        kept = value if self._ends or not isinstance(value, Tensor) else value.clone()
        self._seen[place].append(kept)
        if self._ends:
            raise _Seen


class _Seen(BaseException):
    """What was looked for is there; no code of the model is to take this for an error."""


class _Looking(CallInterpreter):
    def __init__(self, *args: Any, run: Inspected, path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_of = run
        self.path = path

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.run_of.note(Location(self.path, n.name), value)
        return value
