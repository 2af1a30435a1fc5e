"""Graphs as plain data, which a pickle keeps as they are.

A `GraphModule` pickles the code generated from its graph, and is traced again when it is read:
what followed `.train()` is then frozen in the mode of that moment, and operations in place are not
in place any more. As data every node stays what it was, with its metadata.
"""

from __future__ import annotations

import dataclasses
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name, map_aggregate

from blockprune.errors import TicketError

__all__ = ["WrittenGraph"]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A node that reads another: the name of that other."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Place:
    """A function, or a constant of torch, that is pickled by where it is found."""

    name: str


@dataclasses.dataclass(frozen=True)
class _WrittenNode:
    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    kind: Any
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WrittenGraph:
    """An `fx.Graph` as data; `read` gives the graph back."""

    nodes: tuple[_WrittenNode, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> WrittenGraph:
        """Return what is to be written of a graph.

        Raises:
            TicketError: the graph calls a function that cannot be found again by a name.
        """
        return cls(
            tuple(
                _WrittenNode(
                    node.op,
                    node.name,
                    _written(node.target),
                    *map_aggregate((node.args, node.kwargs), _written),
                    node.type,
                    dict(node.meta),
                )
                for node in graph.nodes
            )
        )

    def read(self) -> fx.Graph:
        """Return the graph."""
        graph, known = fx.Graph(), dict[str, fx.Node]()

        def found(value: Any) -> Any:
            if isinstance(value, _Place):
                return pkgutil.resolve_name(value.name)
            return known[value.name] if isinstance(value, _Reader) else value

        for node in self.nodes:
            args, kwargs = map_aggregate((node.args, node.kwargs), found)
            made = graph.create_node(
                node.op, found(node.target), args, kwargs, node.name, node.kind
            )
            made.meta = dict(node.meta)
            known[node.name] = made
        return graph


def _written(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Reader(value.name)
    if isinstance(value, torch.memory_format) or (callable(value) and not _is_picklable(value)):
        return _place_of(value)
    return value


def _is_picklable(function: Callable[..., Any]) -> bool:
    try:
        return pickle.loads(pickle.dumps(function)) is function
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return False


def _place_of(value: Any) -> _Place:
    for name in _names_of(value):
        try:
            if pkgutil.resolve_name(name) is value:
                return _Place(name)
        except (ValueError, ImportError, AttributeError):
            continue
    raise TicketError(
        f"this ticket calls {value!r}, which no pickle can hold. Keep it with "
        "blockprune.save_ticket, which writes weights and plan."
    )


def _names_of(value: Any) -> Iterator[str]:
    if isinstance(value, torch.memory_format):
        yield str(value)
        return
    yield _get_qualified_name(value)
    yield torch.overrides.resolve_name(value) or ""
