"""What several recordings of one module agree on, line by line.

`Lines` puts the events of an invocation in a row, with the modules that are called, and not looked
into, as one line each. Two rows of lines are then compared. A constant that differs between them
(a flag that follows the mode, a dtype) is a `Variation`, which the one who compares may explain;
any other difference lies in the forward of the innermost module open at that line, which is then
called as well, and the rows are made anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from blockprune.tracing.calls import Binding
from blockprune.tracing.recorded import (
    Attribute,
    Built,
    Field,
    Invocation,
    Known,
    Step,
    knowns,
)
from blockprune.tracing.values import like_tuple

__all__ = [
    "Bound",
    "Fork",
    "Line",
    "Lines",
    "Ref",
    "Theirs",
    "Unresolved",
    "Variation",
    "compare",
    "in_our_lines",
    "is_of_settings",
    "item_of",
    "mapped",
    "may_be_of_one_mode",
    "replaced",
    "with_keys",
]


_ASSERTIONS = (torch._assert, torch._assert_async)


@dataclasses.dataclass(frozen=True)
class Ref:
    """Where a line finds a value: the line that made it, an argument, or an attribute.

    Attributes:
        source: number of a line, `Theirs` for one of another recording, `Bound` for an argument,
            name of an attribute.
        keys: the way to an item of it.
    """

    source: int | str | Bound | Theirs
    keys: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bound:
    """An argument of the module, by its name."""

    name: str


@dataclasses.dataclass(eq=False)
class Line:
    """One event, with `Ref`s in its arguments; or the beginning or end of what a module did.

    Attributes:
        kind: "call", "module", "guard", "read", "state", "enter" or "exit".
        path: of the module whose forward it is in.
        stack: key, path and class of each call around it.
    """

    kind: str
    path: str
    event: Step | Invocation
    stack: tuple[tuple[str, str, type[nn.Module]], ...]
    args: Any = ()
    kwargs: Any = dataclasses.field(default_factory=dict)

    @property
    def func(self) -> Any:
        """The function of a step, or the name of what is read; None for a module."""
        return self.event.func if isinstance(self.event, Step) else None

    @property
    def code(self) -> str:
        """The user's line of code, where something left the record."""
        return self.event.line if isinstance(self.event, Step) else ""


@dataclasses.dataclass(frozen=True)
class Variation:
    """A constant in the arguments of a line that another recording has otherwise."""

    line: int
    where: tuple[Any, ...]
    ours: Any
    theirs: Any


@dataclasses.dataclass(frozen=True)
class Fork:
    """Lines of one module that run in one mode only: ours in eval mode, theirs in train mode.

    Attributes:
        path: of the module.
        ours, theirs: numbers of the first line and of the one behind the last.
    """

    path: str
    ours: tuple[int, int]
    theirs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """The source of a `Ref` to a line that only the other recording has, by its number there."""

    number: int


class Unresolved(Exception):
    """A line uses a value that reaches it by no way that a graph has."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


class Lines:
    """The lines of one invocation, which becomes a graph.

    Args:
        top: the invocation.
        bindings: its arguments, holding `Known`s.
        called: whether the module at a path is called and not looked into.
        shared: names, within the module, of what is recorded under a name elsewhere.

    Raises:
        Unresolved: names the module that uses a value from elsewhere.
    """

    def __init__(
        self,
        top: Invocation,
        bindings: Collection[Binding],
        called: Collection[str],
        shared: Mapping[str, str],
    ) -> None:
        self.top, self.called, self.shared = top, called, shared
        self.lines: list[Line] = []
        self.arguments = {binding.name: binding.value for binding in bindings}
        self._attributes: dict[str, Known] = {}
        self._number: dict[int, int] = {}
        self._places: dict[int, Ref] = {}
        self._prefix = f"{top.path}." if top.path else ""
        for name, value in self.arguments.items():
            for known, keys in with_keys(value):
                self._places.setdefault(id(known), Ref(Bound(name), keys))
        self._walk(top, ())
        self.result = self._refer(top.result, top.path)

    def value(self, source: Any, keys: tuple[Any, ...] = ()) -> Any:
        """Return the encoded value of what a `Ref` to this source and with these keys is."""
        if isinstance(source, Bound):
            return item_of(self.arguments[source.name], keys)
        if isinstance(source, str):
            return self._attributes.get(source)
        return item_of(self.lines[source].event.result, keys)

    def _walk(self, call: Invocation, stack: tuple[tuple[str, str, type[nn.Module]], ...]) -> None:
        for event in call.events:
            if isinstance(event, Step):
                if event.func is torch._assert and event.args[:1] == (True,):
                    continue  # It asserts what guards of sizes see to.
                kind = "guard" if event.kind == "leave" else event.kind
                self._add(Line(kind, call.path, event, stack))
                continue
            inside = (*stack, (self.relative(event.key), self.relative(event.path), event.kind))
            if event.is_leaf or event.path in self.called:
                self._add(Line("module", call.path, event, inside))
            else:
                self.lines.append(Line("enter", call.path, event, stack))
                self._walk(event, inside)
                self.lines.append(Line("exit", event.path, event, inside))

    def span(self, number: int, path: str) -> tuple[int, int | None]:
        """Return the first and the last line around a line of what the module at `path` did."""
        start = number
        while start and not self._begins(start, path):
            start -= 1
        rest = range(number, len(self.lines))
        ends = (i for i in rest if self.lines[i].kind == "exit" and self.lines[i].path == path)
        return start, next(ends, None)

    def _begins(self, number: int, path: str) -> bool:
        line = self.lines[number]
        return (
            line.kind == "enter" and isinstance(line.event, Invocation) and line.event.path == path
        )

    def relative(self, name: str) -> str:
        """Return the name within the module of a qualified one."""
        path, _, attribute = name.rpartition(".")
        if name not in self.shared and path in self.shared:
            return f"{self.shared[path]}.{attribute}"
        return self.shared.get(name) or name.removeprefix(self._prefix)

    def _holds(self, name: str) -> bool:
        is_shared = name in self.shared or name.rpartition(".")[0] in self.shared
        return is_shared or name.startswith(self._prefix)

    def _add(self, line: Line) -> None:
        line.args = self._refer(line.event.args, line.path)
        line.kwargs = self._refer(line.event.kwargs, line.path)
        self._number[id(line.event)] = len(self.lines)
        self.lines.append(line)

    def _refer(self, value: Any, path: str) -> Any:
        """Return an encoded value with a `Ref` for each `Known`."""

        def refer(item: Any) -> Any:
            if not isinstance(item, Known):
                return item
            found = self.find(item)
            if found is None:
                if isinstance(item.fact, str):
                    raise Unresolved(path, f"builds a {item.fact}, which a graph cannot hold")
                raise Unresolved(
                    path, "uses a tensor that is neither an input, a parameter nor a buffer of it"
                )
            return found

        return mapped(value, refer)

    def find(self, known: Known) -> Ref | None:
        """Return where a value can be had from at the end of the lines so far."""
        return self.find_before(len(self.lines), known)

    def find_before(self, line: int, known: Known) -> Ref | None:
        """Return where a value can be had from in front of a line."""
        for origin, keys in reversed(known.origins):
            number = self._number.get(id(origin))
            if number is not None and number < line:
                return Ref(number, keys)
        if id(known) in self._places:
            return self._places[id(known)]
        for origin, _ in known.origins:
            if isinstance(origin, Attribute) and self._holds(origin.name):
                self._attributes[self.relative(origin.name)] = known
                return Ref(self.relative(origin.name))
        return None if known.same_as is None else self.find_before(line, known.same_as)


def is_of_settings(line: Line) -> bool:
    """Whether a line asks or computes something of numbers that are attributes of modules."""
    found = list(knowns((line.event.args, line.event.kwargs)))
    return isinstance(line.event, Step) and not any(k.is_tensor or k.active for k in found)


def may_be_of_one_mode(line: Line) -> bool:
    """Whether a line can be written into a graph for one mode alone."""
    is_guard = line.kind == "guard" and line.func is not len
    return is_guard or line.kind in ("call", "module", "read")


def compare(
    ours: Lines,
    theirs: Lines,
    *,
    loose: bool = False,
    forks: list[Fork] | None = None,
    may_fork: Callable[[Line], bool] | None = None,
) -> tuple[dict[str, str], list[Variation], dict[int, int]]:
    """Compare two recordings of one module.

    Args:
        ours, theirs: the recordings.
        loose: it does not matter which argument a line refers to.
        forks: lines that run in one mode only are added here, and are no difference.
        may_fork: whether a line may be one of these; None for no line.

    Returns:
        The modules whose own forward differs, with the line of code; the constants that differ; and
        for each of our lines the number of theirs.
    """
    culprits: dict[str, str] = {}
    variations: list[Variation] = []
    twins: dict[int, int] = {}
    doubtful: set[Any] = set(map(Bound, ours.arguments)) if loose else set()
    top = ours.top.path
    a = b = 0
    while a < len(ours.lines) and b < len(theirs.lines):
        one, other = ours.lines[a], theirs.lines[b]
        twins[a] = b
        if _label(one) == _label(other):
            differences = list(_differences(one, other, twins, doubtful))
            variations += [dataclasses.replace(v, line=a) for v in differences if v.where]
            if all(v.where for v in differences):
                a, b = a + 1, b + 1
                continue
        culprit = one.path
        fork = None if may_fork is None else _fork(ours, theirs, a, b, may_fork)
        if forks is not None and fork is not None:
            del twins[a]
            forks.append(fork)
            a, b = fork.ours[1], fork.theirs[1]
            continue
        culprits.setdefault(culprit, one.code or other.code)
        start, end = ours.span(a, culprit)
        _, their_end = theirs.span(b, culprit)
        if culprit == top or end is None or their_end is None:
            culprits.setdefault(top, one.code or other.code)
            return culprits, variations, twins
        # What follows is compared as if the two had agreed in there.
        doubtful.update(range(start, end + 1))
        a, b = end, their_end
    if (a < len(ours.lines)) != (b < len(theirs.lines)) or any(
        _values_differ(ours.result, theirs.result, (), twins, doubtful)
    ):
        culprits.setdefault(top, "")
    return culprits, variations, twins


def _fork(
    ours: Lines, theirs: Lines, a: int, b: int, may_fork: Callable[[Line], bool]
) -> Fork | None:
    """Return the lines from a and b on up to where the forward of their module goes on alike."""
    path = ours.lines[a].path
    if theirs.lines[b].path != path:
        return None
    # A few lines about settings, behind which both go on.
    if count := _settings_before(theirs.lines, b, ours.lines[a]):
        return Fork(path, (a, a), (b, b + count))
    if count := _settings_before(ours.lines, a, theirs.lines[b]):
        return Fork(path, (a, a + count), (b, b))
    end, their_end = (
        len(lines.lines) if path == lines.top.path else lines.span(number, path)[1]
        for lines, number in ((ours, a), (theirs, b))
    )
    if end is None or their_end is None:
        return None
    while end > a and their_end > b:
        if _label(ours.lines[end - 1]) != _label(theirs.lines[their_end - 1]):
            break
        end, their_end = end - 1, their_end - 1
    middle = (*ours.lines[a:end], *theirs.lines[b:their_end])
    if (a, b) == (end, their_end) or not all(map(may_fork, middle)):
        return None
    return Fork(path, (a, end), (b, their_end))


def _settings_before(lines: list[Line], start: int, goal: Line) -> int:
    """Return how many lines are about settings in front of one like `goal`; 0 if none is there."""
    ends = (i for i in range(start, len(lines)) if not is_of_settings(lines[i]))
    end = next(ends, None)
    return end - start if end is not None and _label(lines[end]) == _label(goal) else 0


def _label(line: Line) -> Any:
    event = line.event
    if isinstance(event, Invocation):
        return line.kind, event.path
    return line.kind, line.path, event.func, event.no_grad


def _differences(
    one: Line, other: Line, twins: Mapping[int, int], doubtful: Collection[int]
) -> Iterator[Variation]:
    """Yield the constants that differ; one without a place where more does."""
    if one.func in _ASSERTIONS:
        # What it says where it fails may hold sizes.
        yield from _values_differ(one.args[:1], other.args[:1], ("args",), twins, doubtful)
        return
    for name in ("args", "kwargs"):
        yield from _values_differ(
            getattr(one, name), getattr(other, name), (name,), twins, doubtful
        )
    if one.kind == "guard" and one.event.result != other.event.result:
        yield Variation(0, (), one.event.result, other.event.result)


def _values_differ(
    a: Any, b: Any, where: tuple[Any, ...], twins: Mapping[int, int], doubtful: Collection[int]
) -> Iterator[Variation]:
    if isinstance(a, Ref) or isinstance(b, Ref):
        if not (isinstance(a, Ref) and isinstance(b, Ref)):
            yield Variation(0, where, a, b)
        elif a.source in doubtful:
            return
        elif isinstance(a.source, int):
            if twins.get(a.source) != b.source or a.keys != b.keys:
                yield Variation(0, where, a, b)
        elif a != b:
            yield Variation(0, where, a, b)
        return
    if type(a) is not type(b):
        yield Variation(0, where, a, b)
        return
    parts = _parts(a)
    if parts is None:
        if not (a is b or a == b or (a != a and b != b)):
            yield Variation(0, where, a, b)
        return
    ours, theirs = dict(parts), dict(_parts(b) or ())
    if list(ours) != list(theirs):
        yield Variation(0, (), a, b)
        return
    for key, item in ours.items():
        yield from _values_differ(item, theirs[key], (*where, key), twins, doubtful)


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the items of a container with their keys, None for anything else."""
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, Built):
        is_dict = issubclass(value.kind, dict)
        return [(key if is_dict else Field(key), item) for key, item in value.items.items()]
    if isinstance(value, slice):
        return [(name, getattr(value, name)) for name in ("start", "stop", "step")]
    return None


def mapped(value: Any, change: Any) -> Any:
    """Return an encoded value with `change` applied to whatever is no container."""
    if isinstance(value, tuple):
        return like_tuple(value, (mapped(item, change) for item in value))
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, Built):
        return Built(value.kind, mapped(value.items, change))
    if isinstance(value, slice):
        return slice(*(mapped(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def in_our_lines(twins: Mapping[int, int]) -> Callable[[Any], Any]:
    """Return what makes a `Ref` of another recording one of ours, to a `Theirs` where it has none.

    `twins`: for each of our lines the number of theirs. Anything else is left as it is.
    """
    ours = {their: our for our, their in twins.items()}

    def change(item: Any) -> Any:
        if isinstance(item, Ref) and isinstance(item.source, int):
            return Ref(ours.get(item.source, Theirs(item.source)), item.keys)
        return item

    return change


def item_of(value: Any, keys: tuple[Any, ...]) -> Any:
    """Return the item of an encoded value that keys lead to."""
    for key in keys:
        if isinstance(value, Built):
            value = value.items[key.name if isinstance(key, Field) else key]
        else:
            value = value[key]
    return value


def replaced(value: Any, where: tuple[Any, ...], new: Any) -> Any:
    """Return a nested value with the item at `where` replaced."""
    if not where:
        return new
    key, *rest = where
    if isinstance(value, slice):
        parts = {name: getattr(value, name) for name in ("start", "stop", "step")}
        parts[key] = replaced(parts[key], tuple(rest), new)
        return slice(*parts.values())
    if isinstance(value, Built):
        name = key.name if isinstance(key, Field) else key
        return Built(value.kind, replaced(value.items, (name, *rest), new))
    if isinstance(value, dict):
        return {k: replaced(v, tuple(rest), new) if k == key else v for k, v in value.items()}
    items = [replaced(v, tuple(rest), new) if i == key else v for i, v in enumerate(value)]
    return like_tuple(value, items) if isinstance(value, tuple) else items


def with_keys(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Known, tuple[Any, ...]]]:
    """Yield each `Known` in an encoded value, with the keys that lead to it."""
    if isinstance(value, Known):
        yield value, keys
        return
    for key, item in _parts(value) or ():
        yield from with_keys(item, (*keys, key))
