"""What a tensor was computed from, read off autograd's graph of an eager run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ancestry", "read_by"]


class Ancestry:
    """Every node of autograd's graph that tensors depend on, their own nodes included.

    A node is only known by identity while something refers to it, so the nodes are held.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.values = {_value(tensor) for tensor in tensors if tensor.requires_grad}
        self.nodes: set[Any] = set()
        pending = [node for node, _ in self.values]
        while pending:
            node = pending.pop()
            if node not in self.nodes:
                self.nodes.add(node)
                above = [value for value in node.next_functions if value[0] is not None]
                self.values.update(above)
                pending.extend(above_node for above_node, _ in above)

    def includes(self, tensor: Tensor) -> bool:
        """Whether this was computed from `tensor` itself; what autograd does not know counts."""
        return not tensor.requires_grad or _value(tensor) in self.values

    def parameters(self) -> set[int]:
        """Return the identities of the leaf tensors among the nodes."""
        return {id(node.variable) for node in self.nodes if hasattr(node, "variable")}

    def computed(self) -> set[Any]:
        """Return the nodes that are operations, and no leaves."""
        return {node for node in self.nodes if not hasattr(node, "variable")}


def read_by(nodes: Iterable[Any]) -> set[int]:
    """Return the identities of the leaf tensors that these operations read themselves."""
    return {
        id(above.variable)
        for node in nodes
        for above, _ in node.next_functions
        if above is not None and hasattr(above, "variable")
    }


def _value(tensor: Tensor) -> tuple[Any, int]:
    """Return the node that gave a tensor, and which of its results it is."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr
