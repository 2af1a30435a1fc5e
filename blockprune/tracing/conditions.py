"""Conditions that follow from the type of a tensor, and so may be decided while tracing.

`if hidden.dtype == torch.float16: ...` does not depend on any number in the tensor, nor on its
sizes. Such a condition is decided on fake tensors; the graph keeps it with a guard, which refuses a
call for which it would be decided otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import has_side_effect

from blockprune.errors import TraceError
from blockprune.tracing.calls import Call
from blockprune.tracing.values import TensorFact

__all__ = ["condition_text", "decided_by_types", "expect_condition"]

_OF_THE_TYPE = frozenset({"device", "dtype", "is_cuda", "layout", "ndim"})
_TYPE_METHODS = frozenset({"dim", "is_complex", "is_floating_point"})
_OPERATORS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


def expect_condition(text: str, value: Any, expected: bool) -> None:
    """Refuse a call for which a condition is not what it was when the graph was traced.

    Raises:
        TraceError: it is decided otherwise.
    """
    if bool(value) is not expected:
        raise TraceError(
            f"this ticket was cut where '{text}' is {expected} and only knows that case. "
            f"Cut it again from a model, and with example_inputs, for which it is {not expected}."
        )


has_side_effect(expect_condition)


def condition_text(condition: fx.Node) -> str | None:
    """Return a condition that types alone decide as text, or None where it is another."""
    try:
        return _text(condition)
    except TraceError:
        return None


def decided_by_types(
    condition: fx.Node, root: nn.Module, arguments: Mapping[str, Any]
) -> bool | None:
    """Return what a condition comes to, or None where fake tensors do not tell.

    Args:
        condition: a node of a graph that may be unfinished, with a `condition_text`.
        root: the module that the graph is traced from.
        arguments: placeholder name to value; tensors may be given as `TensorFact`s.
    """
    try:
        return bool(_value(condition, _Fake(root, arguments)))
    except Exception:
        # Whatever fake tensors do not know leaves the condition undecided.
        return None


class _Fake:
    """Runs the part of a graph that one node depends on, with fake tensors."""

    def __init__(self, root: nn.Module, arguments: Mapping[str, Any]) -> None:
        self.root = root
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Own copies of caches and the like: fake tensors left in one would reach the next run.
        real = Call((), dict(arguments)).map(TensorFact.example, TensorFact)
        self.arguments = real.map(self.mode.from_tensor, copy_state=False).kwargs

    def tensor(self, node: fx.Node) -> Tensor:
        needed, pending = {node}, [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    pending.append(source)
        interpreter = fx.Interpreter(self.root, graph=node.graph)
        with self.mode, torch.no_grad():
            for step in node.graph.nodes:
                if step in needed and step.op == "placeholder":
                    interpreter.env[step] = self.arguments[str(step.target).lstrip("*")]
                elif step in needed:
                    interpreter.env[step] = interpreter.run_node(step)
        value = interpreter.env[node]
        assert isinstance(value, Tensor)
        return value


def _text(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return str(value)
    if value.op == "call_function" and value.target in _OPERATORS:
        left, right = value.args
        return f"{_text(left)} {_OPERATORS[value.target]} {_text(right)}"
    if value.op == "call_method" and value.target in _TYPE_METHODS:
        return f"{value.args[0]}.{value.target}()"
    if value.op == "call_function" and value.target is getattr:
        source, name = value.args
        owner = str(source) if name in _OF_THE_TYPE else _text(source)
        return f"{owner}.{name}"
    raise TraceError(f"{value} is not known from types alone")


def _value(value: Any, fake: _Fake) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if value.op == "call_function" and value.target in _OPERATORS:
        left, right = (_value(argument, fake) for argument in value.args)
        return value.target(left, right)
    source = value.args[0]
    assert isinstance(source, fx.Node)
    if value.op == "call_method":
        return getattr(fake.tensor(source), str(value.target))()
    name = str(value.args[1])
    return getattr(fake.tensor(source) if name in _OF_THE_TYPE else _value(source, fake), name)
