"""Which operations read a parameter, and so which parameters vanish with a set of operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn

from blockprune.blocks.flow import Flow
from blockprune.blocks.naming import lies_in
from blockprune.blocks.rule import parameters_read
from blockprune.tracing import TracedModel

__all__ = ["ParameterReaders"]


class ParameterReaders:
    """The readers of every parameter of a traced model.

    A parameter is known by the tensor behind it (Python's object may be a new one each time it is
    asked for, as in scripted modules), so that shared weights and aliased modules count once. One
    that belongs to a module outside all regions is read by code that was not traced, and never
    vanishes.
    """

    def __init__(self, traced: TracedModel, flows: Sequence[Flow]) -> None:
        self._inner = {flow.region.path for flow in flows}
        self._names: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._readers: dict[int, set[fx.Node | None]] = {}
        self._read_by: dict[fx.Node, list[int]] = {}
        for name, parameter in traced.root.named_parameters(remove_duplicate=False):
            self._names.setdefault(parameter._cdata, name)
            self._sizes[parameter._cdata] = parameter.numel()
            if not any(lies_in(name, path) for path in self._inner):
                self._readers.setdefault(parameter._cdata, set()).add(None)
        for flow in flows:
            for node in flow.region.graph.nodes:
                for parameter in self._parameters(flow, node):
                    self._readers.setdefault(parameter._cdata, set()).add(node)
                    self._read_by.setdefault(node, []).append(parameter._cdata)

    def vanishing(self, dead: frozenset[fx.Node]) -> int:
        """Return how many parameters (elements) nobody reads once `dead` is gone."""
        return sum(
            self._sizes[parameter]
            for parameter in self._read_in(dead)
            if self._readers[parameter] <= dead
        )

    def names(self, dead: frozenset[fx.Node]) -> tuple[str, ...]:
        """Return the qualified names of all parameters that `dead` reads, in the model's order."""
        read = self._read_in(dead)
        return tuple(name for parameter, name in self._names.items() if parameter in read)

    def _read_in(self, nodes: Iterable[fx.Node]) -> set[int]:
        return {parameter for node in nodes for parameter in self._read_by.get(node, ())}

    def _parameters(self, flow: Flow, node: fx.Node) -> Iterator[nn.Parameter]:
        """Yield what `node` reads itself; a leaf that holds regions leaves theirs to them."""
        leaf = flow.region.qualified(str(node.target))
        regions = [path for path in self._inner if path and lies_in(path, leaf)]
        for name, parameter in parameters_read(node, flow):
            if not any(lies_in(flow.region.qualified(name), path) for path in regions):
                yield parameter
