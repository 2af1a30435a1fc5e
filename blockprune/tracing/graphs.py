"""From the lines that recordings agree on to a graph, with what is known of each node."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping, Sequence
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket

from blockprune.errors import TraceError
from blockprune.randomness import RANDOM_OPERATIONS
from blockprune.tracing.agreement import Bound, Fork, Line, Lines, Ref, Theirs, in_our_lines, mapped
from blockprune.tracing.calls import Binding, is_constant
from blockprune.tracing.facts import Facts, Place
from blockprune.tracing.guards import (
    InMode,
    WithoutGrad,
    by_mode,
    expect_size,
)
from blockprune.tracing.likeness import expect_like, likeness
from blockprune.tracing.recorded import Built, Field, Invocation, Known, Step, knowns
from blockprune.tracing.sizes import same_size
from blockprune.tracing.values import TensorFact

__all__ = ["ByMode", "Check", "Finfo", "Flag", "Setting", "drop_unused", "graph_of"]

_OURS = "eval", -1
_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """The `training` flag of a module, which `.train()` and `.eval()` set."""

    path: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """A plain attribute of a module, which users may change."""

    path: str
    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class ByMode:
    """A value that is another one in each mode of the module at `path`."""

    path: str
    in_eval: Any
    in_train: Any


@dataclasses.dataclass(frozen=True)
class Finfo:
    """A number that follows from the dtype read at a line, as `torch.finfo` gives it."""

    read: Ref
    name: str


@dataclasses.dataclass(frozen=True)
class Check:
    """A guard that is no line: a function, and what it is given, with `Ref`s."""

    func: Any
    args: tuple[Any, ...]


_PURE = frozenset(
    {getattr, len, operator.getitem, torch.ops.aten.detach.default}
    | {"dim", "numel", "size", "stride"}
)
_OPERATORS = {
    "__getitem__": operator.getitem,
    "__invert__": operator.invert,
    "add": operator.add,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "mul": operator.mul,
    "neg": operator.neg,
    "sub": operator.sub,
}


_UNARY = frozenset({"__invert__", "neg"})


def graph_of(
    lines: Lines,
    bindings: Sequence[Binding],
    checks: Mapping[int, Sequence[Check]],
    others: Sequence[tuple[str, Lines, Mapping[int, int]]],
    forks: Sequence[Fork],
    free: Mapping[str, bool],
) -> tuple[fx.Graph, Facts]:
    """Return the graph of `lines`, and facts from all recordings.

    Args:
        lines: the recording that counts.
        bindings: the arguments.
        checks: guards to put behind a line, by its number; -1 for the beginning.
        others: mode, lines and twins of the further recordings that agree.
        forks: where the first of these that is in train mode has lines of its own.
        free: names of arguments that are only handed on, to whether they may be None.

    Raises:
        TraceError: a graph cannot hold what the module returns, or how it is called.
    """
    return _Writer(lines, bindings, checks, others, forks, free).write()


class _Writer:
    def __init__(
        self,
        lines: Lines,
        bindings: Sequence[Binding],
        checks: Mapping[int, Sequence[Check]],
        others: Sequence[tuple[str, Lines, Mapping[int, int]]],
        forks: Sequence[Fork],
        free: Mapping[str, bool],
    ) -> None:
        self.lines, self.bindings, self.checks, self.others = lines, bindings, checks, others
        self.free = free
        # The one that the forks are of.
        self.in_train = next((other for other in others if other[0] == "train"), ("", lines, {}))
        self.forks = {fork.ours[1]: fork for fork in forks}
        self.in_eval = {i: fork for fork in forks for i in range(*fork.ours)}
        self.graph = fx.Graph()
        self.facts = Facts()
        self.nodes: dict[tuple[Any, tuple[Any, ...]], fx.Node] = {}
        self.line: Line | None = None
        self.guarded: set[Any] = set()
        self.modes: dict[Any, tuple[str, bool]] = {}

    def write(self) -> tuple[fx.Graph, Facts]:
        with_default = False
        for binding in self.bindings:
            with_default = with_default or binding.default is not inspect.Parameter.empty
            self._placeholder(binding, with_default)
        self._write_checks(-1)
        for number, line in enumerate(self.lines.lines):
            self._write_fork(number)
            self.line = line
            if number in self.in_eval:
                self._write_in_mode(number, line, self.in_eval[number].path, train=False)
            elif line.kind not in ("enter", "exit", "state"):
                self._write_line(number, line)
            self._write_checks(number)
        self._write_fork(len(self.lines.lines))
        self.line = None
        output = self.graph.output(self._argument(self.lines.result))
        self.facts.values[output] = mapped(self.lines.top.result, _fact)
        drop_unused(self.graph, self.facts)
        for node in self.graph.nodes:
            for kept in (self.facts.storages, self.facts.written):
                kept.setdefault(node, frozenset())
        return self.graph, self.facts

    # --- arguments ------------------------------------------------------------------------------

    def _placeholder(self, binding: Binding, with_default: bool) -> None:
        prefix = _STARS.get(binding.kind, "")
        default: tuple[Any, ...] = ()
        if not prefix:
            if binding.default is not inspect.Parameter.empty:
                if not is_constant(binding.default):
                    raise TraceError(f"has a default for {binding.name!r} that is no plain value")
                default = (binding.default,)
            elif with_default:
                # A generated forward has no keyword-only marker, so order is all that counts.
                raise TraceError(f"has a required keyword-only argument {binding.name!r}")
        node = self.graph.create_node("placeholder", prefix + binding.name, default)
        self.nodes[Bound(binding.name), ()] = node
        self._note(node, Bound(binding.name))
        name = prefix + binding.name
        like = likeness(name, binding.value, self.free)
        # A part of a model is called by code that runs as it is, where it only hands tensors on.
        is_needed = not self.lines.top.path or binding.default is not inspect.Parameter.empty
        if like != ("any",) and (is_needed or like != ("tensor",)):
            self._guard(expect_like, (name, node, like))

    def _guard(self, func: Any, args: tuple[Any, ...]) -> None:
        self.facts.values[self._made("call_function", func, args)] = None

    def _write_checks(self, number: int) -> None:
        for check in self.checks.get(number, ()):
            self._guard(check.func, self._argument(check.args))

    # --- lines ----------------------------------------------------------------------------------

    def _write_line(self, number: int, line: Line) -> None:
        event = line.event
        if isinstance(event, Step) and line.kind == "guard" and line.func is len:
            self._write_guard(event, (self._list_of(line.args[0]),), {})
            return
        args, kwargs = self._argument(line.args), self._argument(line.kwargs)
        if isinstance(event, Invocation):
            node = self._made("call_module", self.lines.relative(event.path), args, kwargs)
        elif line.kind == "read":
            node = self._made("call_function", getattr, (args[0], event.func))
        elif line.kind == "guard":
            self._write_guard(event, args, kwargs)
            return
        else:
            node = self._call(event, args, kwargs)
        self.nodes[number, ()] = node
        self._note(node, number)

    def _write_fork(self, number: int) -> None:
        """Write the lines of train mode that come in front of a line."""
        fork = self.forks.get(number)
        if fork is None:
            return
        _, theirs, twins = self.in_train
        change = in_our_lines(twins)
        for index in range(*fork.theirs):
            self.line = line = theirs.lines[index]
            moved = dataclasses.replace(
                line, args=mapped(line.args, change), kwargs=mapped(line.kwargs, change)
            )
            self._write_in_mode(Theirs(index), moved, fork.path, train=True)

    def _write_in_mode(self, source: int | Theirs, line: Line, path: str, *, train: bool) -> None:
        event = line.event
        if line.kind == "guard" and line.func is Tensor.dim:
            return  # known from the ranks of the arguments
        args, kwargs = self._argument(line.args), self._argument(line.kwargs)
        if line.kind == "read":
            target: Any = getattr
            args = (*args, line.func)
        elif isinstance(event, Invocation):
            target = operator.call
            args = (self._read_attribute(self.lines.relative(event.path)), *args)
        else:
            target = event.func
            if event.no_grad:
                target = WithoutGrad(_named(target))
            target = _named(target)
        self.modes[source] = path, train
        node = self._made_in_mode(source, target, args, kwargs)
        if line.kind == "guard" and isinstance(event, Step):
            what = event.text, node, event.result, event.line, ()
            self.facts.values[node] = event.result
            self.facts.values[self._made_in_mode(source, expect_size, what)] = None
            return
        self.nodes[source, ()] = node
        self._note(node, source)

    def _made_in_mode(self, source: Any, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        path, train = self.modes[source]
        flag = self._argument(Flag(path))
        return self._made("call_function", InMode(target, train), (flag, *args), kwargs)

    def _write_guard(self, step: Step, args: Any, kwargs: Any) -> None:
        if step.func is torch.Tensor.dim:
            return  # known from the ranks of the arguments
        key = (step.func, repr((args, kwargs)), step.result)
        if key in self.guarded or not any(isinstance(a, fx.Node) for a in _flat((args, kwargs))):
            return
        self.guarded.add(key)
        value = args[0] if step.func is same_size else self._call(step, args, kwargs)
        self.facts.values.setdefault(value, step.result)
        sizes = () if step.func is same_size else args
        known = tuple(mapped(step.args, _fact)) if sizes else ()
        known = tuple(item for item in known if type(item) in (int, float))
        self._guard(expect_size, (step.text, value, step.result, step.line, known, *sizes))

    def _list_of(self, items: Any) -> Any:
        """Return the node of the list or tuple that these are all items of."""
        if isinstance(items, Ref) or not items or not isinstance(items[0], Ref):
            return self._argument(items)
        source = items[0].source
        is_whole = list(items) == [Ref(source, (index,)) for index in range(len(items))]
        return self._node(source, ()) if is_whole else self._argument(items)

    def _call(self, step: Step, args: Any, kwargs: Any) -> fx.Node:
        func, name = step.func, getattr(step.func, "__name__", "")
        if step.no_grad:
            target = WithoutGrad(_named(func))
            return self._made("call_function", target, args, kwargs)
        is_operator = name in _OPERATORS and func is getattr(Tensor, name, None)
        if is_operator and not kwargs and len(args) == (1 if name in _UNARY else 2):
            return self._made("call_function", _OPERATORS[name], args)
        if name == "__setitem__":
            return self._made("call_function", operator.setitem, args)
        if _is_method(func):
            return self._made("call_method", name, args, kwargs)
        return self._made("call_function", func, args, kwargs)

    def _made(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, tuple(args), dict(kwargs or {}))
        if self.line is not None:
            # What prepares the call of a module is no part of it.
            is_outside = self.line.kind == "module" and op != "call_module"
            stack = self.line.stack[:-1] if is_outside else self.line.stack
            node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in stack}
        return node

    # --- values ---------------------------------------------------------------------------------

    def _argument(self, value: Any) -> Any:
        """Return an argument with nodes for what it refers to."""

        def change(item: Any) -> Any:
            if isinstance(item, Ref):
                return self._node(item.source, item.keys)
            if isinstance(item, Flag):
                return self._read_setting(item.path, "training", False)
            if isinstance(item, Setting):
                return self._read_setting(item.path, item.name, item.value)
            if isinstance(item, ByMode):
                return self._chosen(item)
            if isinstance(item, np.generic):
                return item.item()
            if isinstance(item, Finfo):
                dtype = self._node(item.read.source, item.read.keys)
                return self._derived(getattr, self._derived(torch.finfo, dtype), item.name)
            return item

        return self._built(mapped(value, change))

    def _built(self, value: Any) -> Any:
        """Return an argument in which objects are made by nodes."""
        if isinstance(value, Built):
            items = {key: self._built(item) for key, item in value.items.items()}
            if issubclass(value.kind, dict) and not dataclasses.is_dataclass(value.kind):
                node = self._derived(value.kind, list(items.items()))
            else:
                node = self.graph.create_node("call_function", value.kind, (), items)
                self.facts.values[node] = None
            memory = (self.facts.storages.get(item, frozenset()) for item in node.all_input_nodes)
            self.facts.storages[node] = frozenset().union(*memory)
            return node
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            try:
                return type(value)(*map(self._built, value))
            except Exception as error:
                raise TraceError(
                    f"builds a {type(value).__name__}, which a graph cannot hold"
                ) from error
        if isinstance(value, tuple):
            return tuple(self._built(item) for item in value)
        if isinstance(value, list):
            return [self._built(item) for item in value]
        if isinstance(value, dict):
            return {key: self._built(item) for key, item in value.items()}
        return value

    def _derived(self, func: Any, *args: Any) -> fx.Node:
        node = self._made("call_function", func, args)
        self.facts.values[node] = None
        return node

    def _node(self, source: Any, keys: tuple[Any, ...]) -> fx.Node:
        if (source, keys) not in self.nodes:
            if keys:
                node = self._item(source, self._node(source, keys[:-1]), keys[-1])
            else:
                node = self._read_attribute(str(source))
            self.nodes[source, keys] = node
            self._note(node, source, keys)
        return self.nodes[source, keys]

    def _item(self, source: Any, holder: fx.Node, key: Any) -> fx.Node:
        """Write the reading of an item of `holder`."""
        func = getattr if isinstance(key, Field) else operator.getitem
        args = holder, key.name if isinstance(key, Field) else key
        if source in self.modes:
            return self._made_in_mode(source, func, args)
        if isinstance(source, Bound):
            return self.graph.call_function(func, args)
        # As code does that unpacks what it is given, whenever it uses the items.
        last = holder
        while _is_beside(last.next, last, holder):
            last = last.next
        with self.graph.inserting_after(last):
            node = self.graph.call_function(func, args)
        stack = list(holder.meta.get("nn_module_stack", {}).items())
        node.meta["nn_module_stack"] = dict(stack[:-1] if holder.op == "call_module" else stack)
        return node

    def _chosen(self, item: ByMode) -> fx.Node:
        flag = self._argument(Flag(item.path))
        values = [self._argument(item.in_eval), self._argument(item.in_train)]
        node = self._made("call_function", by_mode, (flag, *values))
        in_eval, in_train = (v if isinstance(v, fx.Node) else None for v in values)
        self.facts.values[node] = item.in_eval
        self.facts.storages[node] = frozenset()
        for mode, value in (("eval", in_eval), ("train", in_train)):
            if value is not None:
                found = self.facts.storages.get(value, frozenset())
                self.facts.storages[node] |= {place for place in found if place[0][0] == mode}
        if in_eval is not None:
            self.facts.values[node] = self.facts.values[in_eval]
            self.facts.elsewhere[node] = self.facts.elsewhere.get(in_eval, [])
        return node

    def _read_setting(self, path: str, name: str, value: Any) -> fx.Node:
        inner = "" if path == self.lines.top.path else self.lines.relative(path)
        node = self._read_attribute(f"{inner}.{name}".lstrip("."))
        self.facts.values[node] = value
        return node

    def _read_attribute(self, name: str) -> fx.Node:
        node = self._made("get_attr", name)
        self.facts.values[node] = None
        return node

    # --- facts ----------------------------------------------------------------------------------

    def _note(self, node: fx.Node, source: Any, keys: tuple[Any, ...] = ()) -> None:
        """Keep what the recordings have shown of the value that `node` stands for."""
        if isinstance(source, Theirs):
            self._note_theirs(node, source, keys)
            return
        facts, found = self.facts, self.lines.value(source, keys)
        facts.values[node] = mapped(found, _fact)
        facts.storages[node] = _tagged(_OURS, _memory(found))
        event = self.lines.lines[source].event if isinstance(source, int) else None
        facts.written[node] = _tagged(_OURS, event.written) if event and not keys else frozenset()
        passed = [found]
        for number, (mode, lines, twins) in enumerate(self.others):
            run = mode, number
            twin = twins.get(source) if isinstance(source, int) else source
            if twin is None or source in self.in_eval:
                passed.append(None)
                continue
            other = lines.value(twin, keys)
            passed.append(other)
            facts.elsewhere.setdefault(node, []).append(mapped(other, _fact))
            facts.storages[node] |= _tagged(run, _memory(other))
            if event and not keys:
                written = lines.lines[twin].event.written
                facts.written[node] |= _tagged(run, written)
        if isinstance(event, Invocation) and keys:
            self._note_stand_in(node, source, passed)

    def _note_theirs(self, node: fx.Node, source: Theirs, keys: tuple[Any, ...]) -> None:
        mode, lines, _ = self.in_train
        number = self.others.index(self.in_train)
        found = lines.value(source.number, keys)
        written = lines.lines[source.number].event.written if not keys else frozenset()
        self.facts.values[node] = mapped(found, _fact)
        self.facts.storages[node] = _tagged((mode, number), _memory(found))
        self.facts.written[node] = _tagged((mode, number), written)

    def _note_stand_in(self, item: fx.Node, call: int, values: Sequence[Any]) -> None:
        """Note an item of what a module returns that is its argument in every recording."""
        if not all(isinstance(value, Known) and value.same_as is not None for value in values):
            return
        written = self.facts.written[self.nodes[call, ()]]
        given = self.lines.find_before(call, values[0].same_as)
        if given is not None and not written & self.facts.storages[item]:
            self.facts.stand_ins[item] = self._node(given.source, given.keys)


def _is_beside(node: fx.Node, before: fx.Node, holder: fx.Node) -> bool:
    """Whether a node reads an item or the length of `holder`, or guards that."""
    if node.target is expect_size:
        return before.target is len and node.args[1] is before
    return node.target in (getattr, len, operator.getitem) and node.args[0] is holder


def _fact(value: Any) -> Any:
    return value.fact if isinstance(value, Known) else value


def _memory(value: Any) -> frozenset[int]:
    return frozenset().union(*(known.memory for known in knowns(value)))


def _tagged(run: tuple[str, int], memory: frozenset[int]) -> frozenset[Place]:
    return frozenset((run, number) for number in memory)


def _flat(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(value, found.append)
    return found


def _named(func: Any) -> Any:
    """Return a function, or the name of a method of tensors."""
    return func.__name__ if _is_method(func) else func


def _is_method(func: Any) -> bool:
    """Whether a function is a method of tensors, to be called by its name."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__qualname__", "").partition(".")[0]
    return hasattr(Tensor, name) and (
        isinstance(func, MethodDescriptorType | WrapperDescriptorType)
        or owner in ("Tensor", "TensorBase")
    )


def drop_unused(graph: fx.Graph, facts: Facts) -> None:
    """Erase what nothing reads and that changes nothing, such as sizes that were only looked at."""
    for node in reversed(graph.nodes):
        if not node.users and _is_pure(node, facts):
            graph.erase_node(node)


def _is_pure(node: fx.Node, facts: Facts) -> bool:
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    value = facts.values.get(node)
    if node.target in _PURE or type(value) in (int, float):
        return True
    # An operation of torch's own; those of others may do what nobody sees.
    name = getattr(node.target, "__name__", node.target)
    is_foreign = isinstance(node.target, OpOverload | OpOverloadPacket | InMode | WithoutGrad)
    gives_tensors = any(isinstance(item, TensorFact) for item in _flat(value))
    is_still = not facts.written.get(node) and not str(name).endswith("_")
    return gives_tensors and is_still and not is_foreign and name not in RANDOM_OPERATIONS
