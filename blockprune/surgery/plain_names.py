"""Graphs whose names Python code cannot say.

A `GraphModule` runs code that is generated from its graph: `self.layers.conv(x, scale = 2)`. A
child may be called `"class"` or `"1x"`, though, and an argument `"from"`. Code is then generated
from a copy of the graph in which such calls and readings go by another name, an attribute of the
class made for the module. The graph itself, and the keys of the state, stay as they are.
"""

from __future__ import annotations

import keyword
import math
import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from blockprune.tracing import copy_graph

__all__ = ["with_plain_names"]

_PRINTED = frozenset({"device", "inf", "nan"})
"""Names that generated code uses for constants; an argument may be called the same."""


_Reading = Callable[[nn.Module], Any]
"""Reads, of the module that runs a graph, what a node of it calls or reads."""


def with_plain_names(graph: fx.Graph) -> tuple[fx.Graph, dict[str, _Reading]]:
    """Return a graph to generate code from, and what each alias in it is of a given module.

    `graph` is left as it is, and returned where it has plain names only.
    """
    arguments = {str(n.target).lstrip("*") for n in graph.nodes if n.op == "placeholder"}
    shadowed = arguments & _PRINTED
    if not (shadowed or any(_is_awkward(node) for node in graph.nodes)):
        return graph, {}
    graph, _ = copy_graph(graph)
    aliases: dict[str, _Reading] = {}

    def alias(of: _Reading) -> str:
        name = f"_plainly_{len(aliases)}"
        aliases[name] = of
        return name

    for node in list(graph.nodes):
        _spell_out(node, shadowed, alias)
        if _is_awkward(node):
            _go_by(node, alias)
    return graph, aliases


def _is_awkward(node: fx.Node) -> bool:
    if any(not name.isidentifier() or _is_misread(name) for name in node.kwargs):
        return True
    is_path = node.op in ("call_module", "get_attr", "call_method")
    return is_path and any(map(_is_misread, str(node.target).split(".")))


def _is_misread(name: str) -> bool:
    """Whether generated code would not read what is called `name`.

    Torch quotes a name that is no identifier, and takes keywords for identifiers. Python reads
    some letters of other alphabets as others.
    """
    if name.isidentifier():
        return keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name
    return '"' in name or "\\" in name or not name.isprintable()


def _go_by(node: fx.Node, alias: Callable[[_Reading], str]) -> None:
    """Let `node` call, or read, an attribute with a plain name."""
    if node.op == "get_attr":
        node.target = alias(_read(str(node.target)))
        return
    if node.op == "call_module":
        function = _read(str(node.target))
    elif node.op == "call_method":
        function = _constant(_method(str(node.target)))
    else:
        function = _constant(node.target)
    target = alias(_with_keywords(function, tuple(node.kwargs)))
    values = (*node.args, *node.kwargs.values())
    with node.graph.inserting_before(node):
        call = node.graph.create_node("call_module", target, values, name=node.name)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _read(path: str) -> _Reading:
    def read(module: nn.Module) -> Any:
        value: Any = module
        for part in path.split("."):
            value = getattr(value, part)
        return value

    return read


def _constant(value: Any) -> _Reading:
    return lambda module: value


def _method(name: str) -> Callable[..., Any]:
    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    return call


def _with_keywords(function: _Reading, keywords: tuple[str, ...]) -> _Reading:
    """Return what reads a function that is given all by position, what has a keyword last."""

    def read(module: nn.Module) -> Any:
        called = function(module)

        def call(*values: Any) -> Any:
            first = len(values) - len(keywords)
            return called(*values[:first], **dict(zip(keywords, values[first:], strict=True)))

        return call

    return read


def _spell_out(node: fx.Node, shadowed: set[str], alias: Callable[[_Reading], str]) -> None:
    """Read constants that would be printed as the name of an argument from an attribute."""

    def change(value: Any) -> Any:
        if not any(_is_printed_as(name, value) for name in shadowed):
            return value
        with node.graph.inserting_before(node):
            return node.graph.create_node("get_attr", alias(_constant(value)))

    if shadowed and node.op != "placeholder":
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), change)


def _is_printed_as(name: str, value: Any) -> bool:
    if name == "device":
        return isinstance(value, torch.device)
    return isinstance(value, float) and (math.isinf if name == "inf" else math.isnan)(value)
