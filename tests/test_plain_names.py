"""Graphs with names that Python code cannot say, built by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from blockprune.surgery.graph_module import graph_module

NAMES = ["1x", "a-b", "class", "for", "None", "größe", "ﬁx", 'quo"te', "back\\slash", "new\nline"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x * self.weight + kwargs.get("from", 0.0)


def holder(*names: str) -> nn.Module:
    """Return modules inside modules, each with the next of the names, the last one `Scaled`."""
    outer = nn.Module()
    inner: nn.Module = outer
    for name in names[:-1]:
        inner.add_module(name, nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module(names[-1], Scaled())
    return outer


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], *placeholders: str) -> fx.Graph:
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in ("x", *placeholders)]
    graph.output(build(graph, given[0]))
    return graph


def forms(module: nn.Module) -> list[nn.Module]:
    return [module, copy.deepcopy(module), copy.copy(module)]


@pytest.mark.parametrize("name", NAMES)
def test_children_are_called_and_read_by_any_name(name: str) -> None:
    module = holder(name, "inner", name)
    path = f"{name}.inner.{name}"

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        called = graph.create_node("call_module", path, (x,))
        weight = graph.create_node("get_attr", f"{path}.weight")
        return graph.call_function(torch.add, (called, weight))

    made = graph_module("", module, graph_of(build))
    assert list(made.state_dict()) == [f"{path}.weight"]
    for form in forms(made):
        assert form(torch.tensor(2.0)) == 9
    assert [node.target for node in made.graph.nodes][1:3] == [path, f"{path}.weight"]


def test_an_argument_by_a_keyword_of_python() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        called = graph.create_node("call_module", "a", (x,), {"from": x})
        counted = graph.call_function(dict, (), {"class": called, "b": x})
        return graph.call_function(lambda values: values["class"] + values["b"], (counted,))

    made = graph_module("", holder("a"), graph_of(build))
    for form in forms(made):
        assert form(torch.tensor(2.0)) == 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", torch.device("cpu")), ("inf", float("inf")), ("nan", float("nan"))],
)
def test_an_argument_named_like_a_constant(name: str, value: Any) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        if name == "device":
            return graph.call_method("to", (x,), {"device": value})
        return graph.call_function(torch.nan_to_num, (x, value, value, value))

    made = graph_module("", nn.Module(), graph_of(build, name))
    for form in forms(made):
        assert form(torch.tensor(2.0), **{name: None}) == 2


@pytest.mark.parametrize("name", ["input", "type", "list", "getattr", "print"])
def test_an_argument_named_like_a_function_of_python(name: str) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(getattr, (x, "real"))

    made = graph_module("", nn.Module(), graph_of(build, name))
    assert made(torch.tensor(2.0), **{name: 1}) == 2


def test_what_a_graph_module_calls_its_own() -> None:
    class Owner(nn.Module):
        code = "of the class"

        def __init__(self) -> None:
            super().__init__()
            self.graph = Scaled()
            self.meta = {"of": "the model"}
            self.recompile = Scaled()

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        called = graph.create_node("call_module", "graph", (x,))
        return graph.create_node("call_module", "recompile", (called,))

    made = graph_module("", Owner(), graph_of(build))
    for form in forms(made):
        assert form(torch.tensor(2.0)) == 18
        assert isinstance(form.graph, Scaled)
        assert form.meta == {"of": "the model"}
        assert form.code == "of the class"


@pytest.mark.parametrize("name", ["class", "ﬁx", 'quo"te'])
def test_such_code_is_compiled(name: str) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.create_node("call_module", name, (x,), {"from": x})

    made = graph_module("", holder(name), graph_of(build))
    x = torch.rand(3)
    assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), made(x))
    torch.compiler.reset()
