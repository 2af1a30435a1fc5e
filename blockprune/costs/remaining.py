"""What is left of a model without any set of its blocks, counted and not cut.

The costs of a set are not the sum of its blocks' costs: nested blocks share their operations, a
shared weight goes with the last call that reads it, and what two branches both read goes with the
second of them. So a set is asked for what dies with it as a whole, and each operation that dies
is counted once, as often as it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from blockprune.blocks import BlockAnalysis, Flow, parameters_read
from blockprune.costs.counting import Costs, NodeCounter, Used, model_costs
from blockprune.costs.executions import Chain, WatchedModel, goes_first
from blockprune.tracing import Region, TracedModel, copy_graph, isolated

__all__ = ["Quantity", "RemainingCosts", "RemainingQuantity"]

Quantity = Literal["macs", "params"]


class RemainingCosts:
    """The costs of the tickets of one model, for any set of removed blocks.

    For a set `S` of blocks, with `D(S)` the operations that die when all of `S` goes::

        macs(S)   = macs(nothing removed) - sum over n in D(S) of  macs(n) * (executions of n)
        params(S) = number of parameters that an operation outside D(S) reads

    MACs and activation bytes are those of the batch that was analysed; an operation of a region
    that is called with several shapes is counted on the first. What no forward reads is dropped
    with the root where the root is a graph; inside other regions it is counted as staying, so
    that a ticket never has more parameters than said. Activation bytes leave out the clones that
    a ticket may need in the place of a merge.

    Args:
        analysis: of the model; building runs it a few times, a question runs nothing of it
            but operations not counted yet.

    Attributes:
        dense: the costs of the model as it was analysed.

    Example:
        >>> import torch
        >>> from blockprune.blocks import find_blocks
        >>> from blockprune.models import resnet20
        >>> remaining = RemainingCosts(find_blocks(resnet20(), torch.zeros(1, 3, 32, 32)))
        >>> remaining.dense.macs - remaining.without(["layer1.1", "layer2.1"]).macs
        9437184
    """

    def __init__(self, analysis: BlockAnalysis) -> None:
        traced = analysis.traced
        self._analysis = analysis
        self._chains = _chains(traced)
        self._chains_of: dict[fx.Node, list[Chain]] = {}
        for chain in self._chains:
            self._chains_of.setdefault(chain[-1], []).append(chain)
        self._counters = {region.path: NodeCounter(region) for region in traced.regions}
        self._used: dict[fx.Node, Used] = {}
        self._sizes, self._readers = _readers(traced)
        self.dense = model_costs(traced.root, traced.call)
        self._uncut = _uncut(traced, self.dense)

    def without(self, names: Iterable[str]) -> Costs:
        """Return the costs of the ticket without these blocks, and those nested in them.

        Raises:
            BlockpruneError: a name is not that of a removable block.
        """
        gone = self._analysis.removed_nodes(names)
        dead = frozenset[fx.Node]().union(*gone.values())
        macs, activation_bytes = self._uncut.macs, self._uncut.activation_bytes
        with isolated():
            for path, nodes in gone.items():
                for node in nodes:
                    used = self._count(path, node)
                    chains = self._chains_of.get(node, ())
                    times = sum(self._chains[c] for c in chains if goes_first(c, dead))
                    macs -= used.macs * times
                    activation_bytes -= used.activation_bytes * times
        return Costs(self._params(dead), macs, activation_bytes)

    def of(self, quantity: Quantity) -> RemainingQuantity:
        """Return one of the quantities as a function of the removed blocks."""
        return RemainingQuantity(self, quantity)

    def _count(self, path: str, node: fx.Node) -> Used:
        if node not in self._used:
            self._used[node] = self._counters[path].count(node)
        return self._used[node]

    def _params(self, dead: frozenset[fx.Node]) -> int:
        return sum(
            self._sizes[parameter]
            for parameter, readers in self._readers.items()
            if any(reader is None or self._lives(reader, dead) for reader in readers)
        )

    def _lives(self, node: fx.Node, dead: frozenset[fx.Node]) -> bool:
        """Whether some execution of `node` is left."""
        chains = self._chains_of.get(node)
        return chains is None or any(dead.isdisjoint(chain) for chain in chains)


@dataclass(frozen=True)
class RemainingQuantity:
    """One quantity of what is left, as a budget reads it.

    Attributes:
        costs: of the tickets.
        quantity: "macs" or "params".
    """

    costs: RemainingCosts
    quantity: Quantity

    @property
    def total(self) -> int:
        """Of the dense model."""
        return self._of(self.costs.dense)

    def __call__(self, removed: Iterable[str]) -> int:
        """Of the ticket without these blocks."""
        return self._of(self.costs.without(removed))

    def _of(self, costs: Costs) -> int:
        return costs.macs if self.quantity == "macs" else costs.params


def _chains(traced: TracedModel) -> Counter[Chain]:
    """Return how often each operation is executed, by its chain."""
    if [region.path for region in traced.regions] == [""]:
        return Counter((node,) for node in traced.regions[0].graph.nodes)
    return Counter(chain for chain, _ in WatchedModel(traced).run()[0])


def _readers(traced: TracedModel) -> tuple[dict[int, int], dict[int, set[fx.Node | None]]]:
    """Return the size of each parameter, and who reads it; None stands for what is not traced.

    Parameters and modules are known by identity, since either may have several names.
    """
    in_regions = {id(m) for region in traced.regions for m in region.module.modules()}
    kept_unread = {id(m) for r in traced.regions if r.path for m in r.module.modules()}
    sizes = {id(parameter): parameter.numel() for parameter in traced.root.parameters()}
    readers: dict[int, set[fx.Node | None]] = {}
    unread: set[int] = set()
    for module in traced.root.modules():
        for parameter in module.parameters(recurse=False):
            if id(module) not in in_regions:
                readers.setdefault(id(parameter), set()).add(None)
            elif id(module) in kept_unread:
                unread.add(id(parameter))
    for region in traced.regions:
        for node, parameter in _reads(region, traced):
            readers.setdefault(id(parameter), set()).add(node)
    for parameter_id in unread - readers.keys():
        readers[parameter_id] = {None}
    return sizes, readers


def _reads(region: Region, traced: TracedModel) -> Iterator[tuple[fx.Node, nn.Parameter]]:
    """Yield each operation of a region with what it brings in; inner regions read their own."""
    own = {id(module) for module in region.module.modules()}
    inner = [r.module for r in traced.regions if r is not region and id(r.module) in own]
    theirs = {id(module) for outer in inner for module in outer.modules()}
    flow = Flow(region)
    for node in region.graph.nodes:
        for name, parameter in parameters_read(node, flow):
            if id(region.module.get_submodule(name.rpartition(".")[0])) not in theirs:
                yield node, parameter


def _uncut(traced: TracedModel, dense: Costs) -> Costs:
    """Return the costs of the ticket with nothing removed: a root's graph has no dead code."""
    root = next((region for region in traced.regions if region.path == ""), None)
    if root is None:
        return dense
    return model_costs(fx.GraphModule(root.module, copy_graph(root.graph)[0]), traced.call)
