"""One graph of one module, from all recordings of its model.

The recordings are put in lines and compared. What they differ in tells which modules are to be
called and not looked into; a constant that follows the mode or a dtype becomes a reading of it.
Where the forward of the module itself goes by something that the graph does not compute, a guard
refuses what was not tried.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from blockprune.errors import TraceError, raise_if_out_of_memory
from blockprune.tracing.agreement import (
    Bound,
    Fork,
    Line,
    Lines,
    Ref,
    Unresolved,
    Variation,
    compare,
    in_our_lines,
    is_of_settings,
    mapped,
    may_be_of_one_mode,
    replaced,
    with_keys,
)
from blockprune.tracing.calls import Binding, Call, bind, constants_of, is_constant
from blockprune.tracing.devices import DEVICES
from blockprune.tracing.facts import Facts
from blockprune.tracing.graphs import ByMode, Check, Finfo, Flag, Setting, graph_of
from blockprune.tracing.guards import (
    expect_device,
    expect_distinct,
    expect_dtype,
    expect_function,
    expect_grad,
    expect_rank,
    expect_setting,
    expect_state,
)
from blockprune.tracing.likeness import name_of
from blockprune.tracing.operations import GRAD
from blockprune.tracing.places import module_of
from blockprune.tracing.recorded import Field, Invocation, Known, Step, knowns
from blockprune.tracing.runs import DTYPES, Run, Runs
from blockprune.tracing.state import names_in_code

__all__ = ["Agreement"]

_FINFO = ("min", "max", "eps", "tiny", "smallest_normal")
_MODE = "its forward does something else in train mode than in eval mode, or at another batch size"


class _MoreCalled(Exception):
    """Another recording cannot be put in lines as long as a module is looked into."""


class Agreement:
    """Makes the graph of the module at `path`.

    Args:
        runs: the recordings.
        module: the module, in a copy that the graph fetches from.
        path: its qualified name.
        called: path to reason of the modules that are called and not looked into, as far as known;
            more are added.
    """

    def __init__(self, runs: Runs, module: nn.Module, path: str, called: dict[str, str]) -> None:
        self.runs, self.module, self.path, self.called = runs, module, path, called
        self.shared = runs.shared_names(path)
        self.main = self._lines(runs.main, 0)
        self.twins: list[tuple[Run, Lines, dict[int, int]]] = []
        self.checks: dict[int, list[Check]] = {}
        self.bound: dict[tuple[int, tuple[Any, ...]], Any] = {}
        self.free: dict[str, bool] = {}
        self.forks: list[Fork] = []
        self.is_narrow = False

    def graph(self) -> tuple[fx.Graph, Facts]:
        """Return the graph, and the facts of its nodes.

        Raises:
            TraceError: says why the forward of the module itself has no graph.
        """
        while not self._settled():
            pass
        others = [(run.mode, lines, twins) for run, lines, twins in self.twins]
        self._check_settings()
        self._check_ranks()
        for (number, where), value in self.bound.items():
            _put(self.main.lines[number], where, value)
        bindings = self._bindings(self.main.top)
        return graph_of(self.main, bindings, self.checks, others, self.forks, self.free)

    def _settled(self) -> bool:
        """Put the recordings in lines, and compare; whether no more modules have to be called."""
        self.main = self._lines(self.runs.main, 0)
        try:
            return self._agrees()
        except _MoreCalled:
            return False

    def _agrees(self) -> bool:
        """Compare all recordings; whether no more modules have to be called."""
        known = len(self.called)
        self.twins, self.checks, self.bound, self.free = [], {}, {}, {}
        self.forks = []
        self._prefer_calls()
        if len(self.called) > known:
            return False
        for index in range(1, len(self.runs.main.by_path[self.path])):
            self._compare_calls(index)
        if not (self._agrees_narrowly() if self.is_narrow else self._agrees_always()):
            return False
        self._look_at(self.runs.longer())
        conditions = (
            *(self._aliases, self._states, self._grads),
            *(self._dtypes, self._devices, self._constants),
        )
        return all(condition() for condition in conditions)

    # --- lines ----------------------------------------------------------------------------------

    def _lines(self, run: Run, index: int) -> Lines:
        top = run.by_path[self.path][index]
        bindings = self._bindings(top)
        while True:
            try:
                return Lines(top, bindings, self.called, self.shared)
            except Unresolved as error:
                self._call(error.path, str(error))
                if run is not self.runs.main:
                    raise _MoreCalled from error

    def _bindings(self, top: Invocation) -> list[Binding]:
        return bind(self.module, Call(top.args, top.kwargs))

    def _call(self, path: str, reason: str) -> None:
        """Call the module at `path`, and do not look into it.

        Raises:
            TraceError: it is the module that the graph is to be of.
        """
        if path == self.path:
            raise TraceError(reason)
        self.called.setdefault(path, reason)

    def _prefer_calls(self) -> None:
        """Call modules in which a size leaves the record, where no merge is lost by it."""
        asking: dict[str, str] = {}
        for line in self.main.lines:
            is_guard = line.kind == "guard" and line.func is not torch.Tensor.dim
            if is_guard and not is_of_settings(line):
                asking.setdefault(line.path, line.code)
        for path, code in asking.items():
            if self._is_better_called(path):
                self.called[path] = f"its forward goes by a size (at {code})"

    def _is_better_called(self, path: str) -> bool:
        """Whether no block is lost where a module is called that a guard could be put into."""
        return self._can_be_called(path) and not self._returns_apart(path)

    def _returns_apart(self, path: str) -> bool:
        """Whether several tensors that a module returns are used.

        A branch that needs one of them (attention, and not its weights) could not go else.
        """
        for call in self.runs.main.by_path[path]:
            found = (known for known in knowns(call.result) if known.is_tensor)
            returned = {id(known) for known in found if known.same_as is None}
            if len(returned) > 1 and len(returned & self._used_outside(call)) > 1:
                return True
        return False

    def _used_outside(self, call: Invocation) -> set[int]:
        """Return what is used by other code than that of a call, by identity."""
        found: set[int] = set()
        pending: list[Step | Invocation] = [self.main.top]
        while pending:
            event = pending.pop()
            if isinstance(event, Invocation) and event is not call:
                pending.extend(event.events)
            if event is not call:
                found |= {id(known) for known in knowns((event.args, event.kwargs))}
        return found | {id(known) for known in knowns(self.main.top.result)}

    def _can_be_called(self, path: str) -> bool:
        return path != self.path and path not in self.runs.merging and path not in self.called

    def _is_layer(self, path: str) -> bool:
        """Whether a module is one of a list and has merges inside, so that it may go as a whole."""
        around = self.runs.root.get_submodule(path.rpartition(".")[0])
        is_listed = isinstance(around, nn.ModuleList | nn.Sequential)
        return is_listed and self.runs.merges_in(path)

    def _compare_calls(self, index: int) -> None:
        """Refuse a module that does something else at its other calls."""
        other = self._lines(self.runs.main, index)
        ours, theirs = self._bindings(self.main.top), self._bindings(other.top)
        if constants_of(ours) != constants_of(theirs):
            raise TraceError("called with different constant arguments at different places")
        culprits, variations, _ = compare(self.main, other)
        if culprits or variations:
            raise TraceError("does something else at another place where it is called")

    # --- agreement ------------------------------------------------------------------------------

    def _agree(
        self,
        run: Run,
        explain: Callable[[Lines, Lines, Mapping[int, int], Variation], Any],
        reason: str,
        may_fork: Callable[[Line], bool] | None = None,
    ) -> tuple[Run, Lines, dict[int, int]] | None:
        """Bind what varies in `run`; None where modules have to be called first.

        Raises:
            TraceError: the forward of the module itself differs.
        """
        culprits, twins, lines, bound = self._differences(run, explain, may_fork=may_fork)
        for path, code in culprits.items():
            if path in self.runs.merging and not self.is_narrow and self.runs.alike() is not None:
                self.is_narrow = True
                return None
            self._call(path, f"{reason}{f' (at {code})' if code else ''}")
        if culprits:
            return None
        self._bind(bound)
        return run, lines, twins

    def _differences(
        self,
        run: Run,
        explain: Callable[[Lines, Lines, Mapping[int, int], Variation], Any],
        *,
        loose: bool = False,
        may_fork: Callable[[Line], bool] | None = None,
    ) -> tuple[dict[str, str], dict[int, int], Lines, list[tuple[Variation, Any]]]:
        if not run.by_path.get(self.path):
            raise TraceError("is not called as often in every run")
        lines = self._lines(run, 0)
        culprits, variations, twins = compare(
            self.main, lines, loose=loose, forks=self.forks, may_fork=may_fork
        )
        bound = []
        for variation in variations:
            line = self.main.lines[variation.line]
            value = explain(self.main, lines, twins, variation)
            if value is None:
                culprits.setdefault(line.path, line.code)
            else:
                bound.append((variation, value))
        return culprits, twins, lines, bound

    def _bind(self, bound: Iterable[tuple[Variation, Any]]) -> None:
        for variation, value in bound:
            self.bound.setdefault((variation.line, variation.where), value)

    def _tolerates(self, run: Run | None, *, loose: bool = False) -> bool | None:
        """Whether another condition changes nothing; None where modules have to be called first."""
        if run is None:
            return False
        try:
            culprits, _, _, bound = self._differences(run, _dtype, loose=loose)
        except TraceError:
            return False
        callable_ones = [
            path for path in culprits if self._is_better_called(path) and not self._is_layer(path)
        ]
        for path in callable_ones:
            self.called[path] = f"its forward does something else under {run.name}"
        if callable_ones:
            return None
        if not culprits:
            self._bind(bound)
        return not culprits

    def _agrees_always(self) -> bool:
        """Whether the recordings in another mode and of other batch sizes agree."""
        for run in self.runs.always():
            in_train = run.mode == "train"
            explain = _flag if in_train else _nothing
            try:
                twins = self._agree(run, explain, _MODE, is_of_settings if in_train else None)
            except TraceError:
                # Where the module merges nothing itself, its children do as well.
                if self.path not in self.runs.merging or self.runs.alike() is None:
                    raise
                # A size decides, and is guarded; or the modes have lines of their own.
                self.is_narrow = True
                return False
            if twins is None:
                return False
            self.twins.append(twins)
        return True

    def _agrees_narrowly(self) -> bool:
        """Whether train mode, at the batch size of the example, differs in explicable ways."""
        run = self.runs.alike()
        assert run is not None
        twins = self._agree(run, _by_mode, _MODE, may_be_of_one_mode)
        if twins is None:
            return False
        self.twins.append(twins)
        self._follow_dtypes(twins[1])
        self._look_at(self.runs.wider())
        return True

    def _follow_dtypes(self, lines: Lines) -> None:
        """Bind dtypes that are handed on in lines of train mode alone.

        Raises:
            TraceError: they are more than handed on.
        """
        own = [lines.lines[i] for fork in self.forks for i in range(*fork.theirs)]
        reads = [line for line in own if line.kind == "read" and line.func == "dtype"]
        if not reads:
            return
        other = torch.float64 if reads[0].event.result is torch.bfloat16 else torch.bfloat16
        run = self.runs.in_dtype(other, train=True)
        if run is None:
            raise TraceError(_MODE)
        theirs = self._lines(run, 0)
        culprits, variations, twins = compare(lines, theirs)
        values = [_dtype(lines, theirs, twins, variation) for variation in variations]
        if culprits or None in values:
            raise TraceError(_MODE)
        for variation, value in zip(variations, values, strict=True):
            _put(lines.lines[variation.line], variation.where, value)

    def _look_at(self, run: Run | None) -> None:
        """Keep the shapes of values under another condition, where it changes nothing else."""
        if run is not None and run.by_path.get(self.path):
            culprits, twins, lines, bound = self._differences(run, _nothing)
            if not culprits and not bound:
                self.twins.append((run, lines, twins))

    # --- conditions -----------------------------------------------------------------------------

    def _aliases(self) -> bool:
        """Guard that equal arguments are not one tensor, where the forward would notice."""
        run = None if self.path else self.runs.aliased()
        if run is None:
            return True
        agrees = self._tolerates(run, loose=True)
        if agrees is None:
            return False
        if not agrees:
            tensors = [(name, ref) for name, _, ref in self._tensors()]
            for index, (name, value) in enumerate(tensors):
                for other, twin in tensors[index + 1 :]:
                    check = Check(expect_distinct, (name, other, value, twin))
                    self.checks.setdefault(-1, []).append(check)
        return True

    def _states(self) -> bool:
        """Guard the grad and autocast state, where the forward asks and goes by it."""
        asked = [(i, line) for i, line in enumerate(self.main.lines) if line.kind == "state"]
        callable_ones = {line.path for _, line in asked if self._is_better_called(line.path)}
        for path in callable_ones:
            self.called[path] = "its forward goes by the grad or autocast state"
        if callable_ones:
            return False
        conditions: tuple[tuple[str, bool, Callable[[], Run | None]], ...] = (
            ("grad", self.runs.grad, self.runs.without_grad),
            ("autocast", False, self.runs.under_autocast),
            ("inference", False, lambda: None),
        )
        for what, value, other in conditions:
            reads = [(i, line) for i, line in asked if line.func == what]
            agrees = self._tolerates(other()) if reads else True
            if agrees is None:
                return False
            if not agrees:
                check = Check(expect_state, (what, value, reads[0][1].code))
                self.checks.setdefault(reads[0][0], []).append(check)
        return True

    def _grads(self) -> bool:
        """Guard what is asked about the gradients of a tensor, where the forward goes by it."""
        reads = [number for name in sorted(GRAD) for number in self._reads(name)]
        if not reads:
            return True
        agreeing = [self._tolerates(self.runs.without_grad())]
        if None not in agreeing:
            agreeing.append(self._tolerates(self.runs.with_grad_of_inputs()))
        if None in agreeing:
            return False
        for number in () if all(agreeing) else reads:
            line = self.main.lines[number]
            check = Check(expect_grad, (line.args[0], line.func, line.event.result, line.code))
            self.checks.setdefault(number, []).append(check)
        return True

    def _dtypes(self) -> bool:
        """Bind dtypes that are handed on; guard those that the forward goes by."""
        reads = self._reads("dtype")
        if not reads:
            return True
        own = {self.main.lines[i].event.result for i in reads}
        good, differs = set(own), False
        for dtype in DTYPES:
            run = None if dtype in own else self.runs.in_dtype(dtype)
            agrees = self._tolerates(run)
            if agrees is None:
                return False
            differs = differs or (run is not None and not agrees)
            if agrees:
                good.add(dtype)
        if self._tolerates(self.runs.under_autocast()) is None:
            return False
        handed_on = {ref.source for ref in _refs_of(self.bound.values())}
        missing = [dtype for dtype in DTYPES if dtype not in good]
        for number in reads:
            line = self.main.lines[number]
            dtype = line.event.result
            is_floating = dtype in DTYPES
            # One that is handed on may decide something as well.
            is_asked = differs or number not in handed_on
            if is_asked and (line.event.args[0].active or (missing and is_floating)):
                allowed = (
                    tuple(each for each in DTYPES if each in good) if is_floating else (dtype,)
                )
                check = Check(expect_dtype, (line.args[0], allowed, line.code))
                self.checks.setdefault(number, []).append(check)
        return True

    def _devices(self) -> bool:
        """Guard the kind of device, where the forward does more than to hand it on."""
        given = [(line.args, line.kwargs) for line in self.main.lines]
        handed_on = {ref.source for ref in _refs_of(given)}
        found = [i for i in self._reads("device") if i not in handed_on]
        if not found:
            return True
        good = {self.main.lines[i].event.args[0].fact.device.type for i in found}
        for kind in DEVICES:
            agrees = self._tolerates(None if kind in good else self.runs.on_device(kind))
            if agrees is None:
                return False
            if agrees:
                good.add(kind)
        for number in () if good.issuperset(DEVICES) else found:
            line = self.main.lines[number]
            if self._is_better_called(line.path):
                self.called[line.path] = f"its forward goes by the device (at {line.code})"
        if any(self.main.lines[number].path in self.called for number in found):
            return False
        for number in found:
            line = self.main.lines[number]
            check = Check(expect_device, (line.args[0], tuple(sorted(good)), line.code))
            self.checks.setdefault(number, []).append(check)
        return True

    def _constants(self) -> bool:
        """Free what a part of the model only hands on to modules it calls.

        A user calls the root as the example does; code around an inner module may vary its call.

        Raises:
            TraceError: an object, such as a cache, is more than handed on.
        """
        for binding, place in _each(self._bindings(self.main.top)):
            value, others = binding.value, list[Any]()
            kind = value.fact if isinstance(value, Known) else None
            may_be_none = bool(self.path) and binding.default is None
            if isinstance(kind, str):
                others = [object(), *([None] if may_be_none else [])]
            elif isinstance(value, Known):
                others = [None] if may_be_none and value.is_tensor else []
            elif self.path and binding.is_constant and isinstance(value, bool | None):
                others = [torch.zeros(()) if value is None else not value]
            for other in others:
                is_free = self._frees(binding, place, other)
                if is_free is None:
                    return False
                if isinstance(kind, str) and not is_free and other is not None:
                    raise TraceError(f"uses a {kind}, of which a graph knows nothing")
                if is_free:
                    # An object may be another one, and None only where that was tried.
                    self.free[binding.name] = not isinstance(kind, str) or other is None
        return True

    def _frees(self, binding: Binding, place: Ref, other: Any) -> bool | None:
        """Whether an argument is only handed on; None where modules have to be called first."""
        call, called = _with(self.main.top, binding, other), self.called
        try:
            run = self.runs.of_part(self.path, call, called, self.main.top)
            culprits, _, _, bound = self._differences(run, _handed_on(binding.value, place))
        except _MoreCalled:
            raise
        except Exception as error:
            raise_if_out_of_memory(error)
            inner = module_of(error)
            culprits, bound = {f"{self.path}.{inner}" if inner else self.path: ""}, []
        if not culprits:
            self._bind(bound)
            return True
        if isinstance(binding.value, Known) and binding.value.is_tensor:
            return False
        callable_ones = [path for path in culprits if self._can_be_called(path)]
        if isinstance(binding.value, Known) and not callable_ones:
            # What uses an object is called, whatever it merges: the rest is a graph all the same.
            callable_ones = [p for p in culprits if p != self.path and p not in self.called]
        for path in callable_ones:
            self.called[path] = f"its forward goes by the argument {binding.name!r}"
        return None if callable_ones else False

    def _reads(self, what: str) -> list[int]:
        lines = enumerate(self.main.lines)
        return [i for i, line in lines if line.kind == "read" and line.func == what]

    def _check_settings(self) -> None:
        """Guard the plain attributes that a forward may go by: users may set them in the ticket."""
        prefix = f"{self.path}." if self.path else ""
        for path in dict.fromkeys([self.path, *(line.path for line in self.main.lines)]):
            if not (path == self.path or path.startswith(prefix)):
                continue
            module = self.runs.root.get_submodule(path)
            for name in sorted(names_in_code(module) & vars(module).keys()):
                value = vars(module)[name]
                if isinstance(value, FunctionType | BuiltinFunctionType):
                    guard, expected = expect_function, name_of(value)
                elif name != "training" and type(value) is not float and is_constant(value):
                    guard, expected = expect_setting, value
                else:
                    continue  # Numbers with a fraction are followed.
                place = f"{path}.{name}".lstrip(".")
                check = Check(guard, (place, Setting(path, name, value), expected))
                self.checks.setdefault(-1, []).append(check)

    def _check_ranks(self) -> None:
        """Guard the ranks of the arguments, where a rank or a whole shape is asked for."""
        every = [self.main, *(lines for _, lines, _ in self.twins)]
        if not any(_asks_for_rank(line) for lines in every for line in lines.lines):
            return
        for name, known, ref in self._tensors():
            check = Check(expect_rank, (name, ref, len(known.fact.shape)))
            self.checks.setdefault(-1, []).append(check)

    def _tensors(self) -> list[tuple[str, Known, Ref]]:
        """Return each tensor among the arguments, what messages call it, and where it is."""
        found = []
        for binding in self._bindings(self.main.top):
            for known, keys in with_keys(binding.value):
                if known.is_tensor:
                    name = "".join([binding.name, *(f"[{_key_of(key)!r}]" for key in keys)])
                    found.append((name, known, Ref(Bound(binding.name), keys)))
        return found


def _key_of(key: Any) -> Any:
    return key.name if isinstance(key, Field) else key


def _put(line: Line, where: tuple[Any, ...], value: Any) -> None:
    name, *keys = where
    setattr(line, name, replaced(getattr(line, name), tuple(keys), value))


def _asks_for_rank(line: Line) -> bool:
    event = line.event
    if not isinstance(event, Step):
        return False
    whole = event.func is torch.Tensor.size and len(event.args) == 1 and not event.kwargs
    return whole or event.func is torch.Tensor.dim


def _refs_of(values: Iterable[Any]) -> list[Ref]:
    found: list[Ref] = []

    def note(item: Any) -> Any:
        item = item.read if isinstance(item, Finfo) else item
        if isinstance(item, Ref):
            found.append(item)
        return item

    mapped(list(values), note)
    return found


def _each(bindings: Iterable[Binding]) -> Iterator[tuple[Binding, Ref]]:
    """Yield the bindings, and one for each argument among `**kwargs`, with where it is."""
    for binding in bindings:
        if binding.kind is inspect.Parameter.VAR_KEYWORD:
            for name, value in binding.value.items():
                is_plain = is_constant(value)
                one = dataclasses.replace(
                    binding, name=name, value=value, given="keyword", is_constant=is_plain
                )
                yield one, Ref(Bound(binding.name), (name,))
        else:
            yield binding, Ref(Bound(binding.name))


def _with(top: Invocation, binding: Binding, value: Any) -> Call:
    """Return a call with one argument changed, tensors as `TensorFact`s."""
    assert top.call is not None
    args, kwargs = list(top.call.args), dict(top.call.kwargs)
    if binding.given == "position":
        position = [i for i, item in enumerate(top.args) if item is binding.value]
        args[position[0]] = value
    else:
        kwargs[binding.name] = value
    return Call(tuple(args), kwargs)


# --- what explains a constant that varies ---------------------------------------------------------


def _nothing(ours: Lines, theirs: Lines, twins: Mapping[int, int], found: Variation) -> Any:
    return None


def _flag(ours: Lines, theirs: Lines, twins: Mapping[int, int], found: Variation) -> Any:
    """A flag that is False in eval mode and True in train mode."""
    if found.ours is False and found.theirs is True:
        return Flag(ours.lines[found.line].path)
    return None


def _by_mode(ours: Lines, theirs: Lines, twins: Mapping[int, int], found: Variation) -> Any:
    """A value that is another one in train mode, of as many samples."""
    path = ours.lines[found.line].path
    if found.ours is False and found.theirs is True:
        return Flag(path)
    return ByMode(path, found.ours, in_our_lines(twins)(found.theirs))


def _handed_on(
    value: Any, argument: Ref
) -> Callable[[Lines, Lines, Mapping[int, int], Variation], Any]:
    """Explain by an argument what a module that is called is given."""

    def explain(ours: Lines, theirs: Lines, twins: Mapping[int, int], found: Variation) -> Any:
        is_handed = ours.lines[found.line].kind == "module" and (
            found.ours is value or found.ours == argument
        )
        is_other = found.theirs == argument or found.theirs is None
        is_other = is_other or found.theirs is (not value)
        return argument if is_handed and is_other else None

    return explain


def _dtype(ours: Lines, theirs: Lines, twins: Mapping[int, int], found: Variation) -> Any:
    """A dtype that was read before, or a number that follows from one."""
    for number in range(found.line, -1, -1):
        line = ours.lines[number]
        if line.kind != "read" or line.func != "dtype" or number not in twins:
            continue
        pair = line.event.result, theirs.lines[twins[number]].event.result
        if (found.ours, found.theirs) == pair:
            return Ref(number)
        if all(dtype.is_floating_point for dtype in pair):
            for name in _FINFO:
                numbers = [getattr(torch.finfo(dtype), name) for dtype in pair]
                if [found.ours, found.theirs] == numbers:
                    return Finfo(Ref(number), name)
    return None
