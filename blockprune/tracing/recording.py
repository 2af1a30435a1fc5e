"""One run of a model, written down.

The forward runs as it is, on real tensors. Every call of torch passes through a `TorchFunctionMode`
and becomes a `Step`; every call of a module becomes an `Invocation`, which holds what was recorded
within it. Tensors are known by identity, so Python sees tensors and nothing else: types, lengths,
`match` and other libraries do what they do in any run. Sizes are numbers that remember how they
were computed (`sizes`).

What a graph cannot hold is not refused here. It is noted against the innermost module in whose
forward it happened (`Recording.stopped`); who makes a graph of the recording calls that module and
does not look into it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blockprune.tracing.calls import Call
from blockprune.tracing.leaks import clear_caches
from blockprune.tracing.operations import (
    ADDS,
    ARGUMENTS_OF_TORCH,
    CHANGES,
    DATA,
    GRAD,
    LAYOUTS,
    LISTS,
    RANK,
    STATE_READERS,
    is_counted,
    is_operation,
    is_product,
    operands_of,
)
from blockprune.tracing.places import user_line
from blockprune.tracing.recorded import (
    Argument,
    Attribute,
    Built,
    Field,
    Invocation,
    Known,
    Memory,
    Origin,
    Recording,
    Step,
    decoded,
    knowns,
    paired,
)
from blockprune.tracing.sizes import SIZES, plain, sized
from blockprune.tracing.state import State
from blockprune.tracing.values import TensorFact, like_tuple, map_tensors, storage_of, tensors_in
from blockprune.tracing.weights import WritesWeights, weights_protected

__all__ = ["record"]

# As they are before a recorder stands in their place.
_autocast_enabled = torch.is_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_autocast_entered = torch.autocast_increment_nesting


def record(
    model: nn.Module,
    call: Call,
    *,
    train: bool,
    grad: bool = True,
    sizes: bool = True,
    leaves: frozenset[str] = frozenset(),
    state: State | None = None,
    keep_output: bool = False,
    path: str = "",
    replayed: Invocation | None = None,
    shared: Collection[Tensor] = (),
) -> Recording:
    """Run `model`, a copy that may be written into, and return what it did.

    Args:
        model: its hooks are gone when this returns, and its mode is changed.
        call: its arguments; tensors in it may be written into.
        train, grad: the mode, and whether gradients are on.
        sizes: whether sizes remember how they were computed; else a module that reads one is not
            looked into.
        leaves: paths of modules that are one operation.
        state: what Python state to watch.
        keep_output: whether to keep the tensors that are returned.
        path: what the model is called, where it is part of another.
        replayed: an earlier call of it, in which the leaves gave what they are to give again; they
            are not run.
        shared: weights that are not the model's own.

    Raises:
        WritesWeights: before one of those is changed.
    """
    recorder = _Recorder(model.train(train), leaves, state, sizes, path, replayed)
    try:
        with torch.set_grad_enabled(grad), recorder.watching(), weights_protected(shared):
            recorder.shared = {id(tensor) for tensor in shared}
            output = recorder.run(call)
    finally:
        recorder.close()
    kept = [tensor.detach() for tensor in tensors_in(output)] if keep_output else []
    return Recording(recorder.top, recorder.stopped, kept)


class _Recorder(TorchFunctionMode):
    def __init__(
        self,
        model: nn.Module,
        leaves: frozenset[str],
        state: State | None,
        sizes: bool,
        path: str,
        replayed: Invocation | None,
    ) -> None:
        super().__init__()
        self.model, self.leaves, self.state, self.sizes = model, leaves, state, sizes
        self.prefix = f"{path}." if path else ""
        self.replayed = {} if replayed is None else {c.key: c for c in replayed.invocations()}
        # The first of several names counts.
        self.names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.names.setdefault(id(tensor), self.prefix + name)
        self.known: dict[int, Known] = {}
        self.held: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.stopped: dict[str, str] = {}
        self.top = Invocation(None, path=path, kind=type(model))
        self.open = [self.top]
        self.calls: Counter[str] = Counter()
        self.shared: set[int] = set()
        self.in_leaf = 0
        self.is_closed = False
        # Whether a size was a key of something.
        self.are_sizes_kept = False
        self.no_grad: list[bool] = []
        self.handles: list[Any] = []
        self.settings: list[tuple[dict[str, Any], str, Any]] = []
        # Classes with a `__call__` of their own, which it is; and whose is running.
        self.callers: list[tuple[Any, FunctionType]] = []
        self.calling: list[nn.Module] = []

    # --- the run --------------------------------------------------------------------------------

    def run(self, call: Call) -> Any:
        """Run the model on a call and return what it returns."""
        args, kwargs = self._arguments(call)
        top = self.top
        top.call = call.described()
        top.args, top.kwargs = self._encode(args), self._encode(kwargs)
        _note_state(top)
        for path, module in self.model.named_modules():
            name = (self.prefix + path).rstrip(".")
            if self.sizes and not (path and self._is_leaf(name, module)):
                self._follow_settings(name, module)
            if path:
                self._hook(name, module)
        self._follow_calls()
        with self:
            value = self.model(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                self._check_state()
                top.result = self._encode(value)
        return value

    def close(self) -> None:
        """Take the hooks off, and let go of everything that was held."""
        self.is_closed = True
        if self.are_sizes_kept:
            clear_caches()
        for attributes, name, followed in self.settings:
            if attributes.get(name) is followed:
                attributes[name] = plain(followed)
        for handle in self.handles:
            handle.remove()
        for kind, function in self.callers:
            kind.__call__ = function
        self.held.clear()
        self.known.clear()

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def enter(value: Any, name: str) -> Any:
            origin = Argument(name)
            if type(value) in (int, float) and self.sizes:
                known = Known(value, origins=[(origin, ())], active=True)
                return sized(value, name, known, self)
            self._enter(value, origin, ())
            return value

        args = tuple(enter(value, str(index)) for index, value in enumerate(call.args))
        return args, {name: enter(value, name) for name, value in call.kwargs.items()}

    def _enter(self, value: Any, origin: Argument, keys: tuple[Any, ...]) -> None:
        """Make known what is in an argument: tensors, and objects that hold state."""
        if isinstance(value, Tensor):
            self._know(value, (origin, keys), active=True)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                self._enter(item, origin, (*keys, index))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._enter(item, origin, (*keys, key))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                self._enter(getattr(value, field.name), origin, (*keys, Field(field.name)))
        elif not isinstance(value, (*ARGUMENTS_OF_TORCH, nn.Module)) and not callable(value):
            self._know(value, (origin, keys), active=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note who asks torch for the grad or autocast state."""
        thread, before = threading.get_ident(), []
        for holder in (torch, torch._C):
            for name, what in STATE_READERS.items():
                reader = getattr(holder, name, None)
                if reader is not None:
                    before.append((holder, name, reader))
                    setattr(holder, name, self._noting(reader, what, thread))
        before.append((torch, "autocast_increment_nesting", torch.autocast_increment_nesting))
        torch.autocast_increment_nesting = self._entering_autocast(thread)
        try:
            yield
        finally:
            for holder, name, reader in before:
                setattr(holder, name, reader)

    def _entering_autocast(self, thread: int) -> Callable[[], int]:
        def enter() -> int:
            if threading.get_ident() == thread and not self.in_leaf:
                self.stop("changes the autocast mode inside its forward")
            return _autocast_entered()

        return enter

    def _noting(self, reader: Callable[..., Any], what: str, thread: int) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            asks = sys._getframe(1).f_globals.get("__name__", "")
            if (
                threading.get_ident() == thread
                and not self.in_leaf
                and not asks.startswith("torch")
            ):
                step = Step(self.open[-1], kind="state", func=what, line=user_line())
                self.open[-1].events.append(step)
            return reader(*args, **kwargs)

        return read

    # --- modules --------------------------------------------------------------------------------

    def _is_leaf(self, path: str, module: nn.Module) -> bool:
        return path in self.leaves or is_operation(module)

    def _follow_settings(self, path: str, module: nn.Module) -> None:
        """Follow numbers that are attributes of a module, as sizes are: users may set them."""
        for name, value in list(vars(module).items()):
            if type(value) is float and math.isfinite(value):
                place = f"{path}.{name}".lstrip(".")
                known = Known(value, origins=[(Attribute(place), ())])
                vars(module)[name] = sized(value, place, known, self)
                self.settings.append((vars(module), name, vars(module)[name]))

    def _hook(self, path: str, module: nn.Module) -> None:
        leaf = self._is_leaf(path, module)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.in_leaf:
                self.in_leaf += 1
                return None
            with torch._C.DisableTorchFunction():
                if _saving_hooks() != self.open[-1].saving:
                    self.stop("uses activation checkpointing")
                if _grad_enabled() != self.open[-1].grad:
                    self.stop("changes the grad mode around a module")
                if _autocast_state() != self.open[-1].autocast:
                    self.stop("changes the autocast mode inside its forward")
                self._check_state()
                self._open(
                    Invocation(self.open[-1], path=path, kind=type(module), is_leaf=leaf),
                    args,
                    kwargs,
                )
            if not leaf:
                return None
            self.in_leaf = 1
            return plain(args), plain(kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if self.in_leaf > 1:
                self.in_leaf -= 1
                return None
            self.in_leaf = 0
            with torch._C.DisableTorchFunction():
                self._check_state()
                return self._close(self.open.pop(), output)

        if leaf and self.replayed:
            vars(module)["forward"] = functools.partial(self._replay, module)
        # Ours are the outermost, so that hooks of torch's (weight norm) belong to the call.
        before, after = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
        self.handles.append(before(module, enter, prepend=True, with_kwargs=True))
        self.handles.append(after(module, leave, always_call=True))

    def _follow_calls(self) -> None:
        """Listen to what classes do around the forward, in a `__call__` of their own."""
        modules = {id(module): path for path, module in self.model.named_modules() if path}
        for kind in {kind for module in self.model.modules() for kind in type(module).__mro__}:
            function = vars(kind).get("__call__")
            is_of_torch = kind.__module__.partition(".")[0] == "torch"
            if isinstance(function, FunctionType) and not is_of_torch:
                self.callers.append((kind, function))
                kind.__call__ = self._listening(function, modules)  # type: ignore[method-assign]

    def _listening(self, function: FunctionType, modules: Mapping[int, str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = modules.get(id(module))
            if path is None or self.is_closed or self.in_leaf or module in self.calling:
                return function(module, *args, **kwargs)
            around = self.open[-1]
            start, reason = len(around.events), self.stopped.get(around.path)
            whole = Invocation(around, path=self.prefix + path, kind=type(module))
            with torch._C.DisableTorchFunction():
                self._check_state()
                self._describe(whole, args, kwargs)
            self.calling.append(module)
            try:
                output = function(module, *args, **kwargs)
            finally:
                self.calling.pop()
            with torch._C.DisableTorchFunction():
                self._check_state()
                inside = around.events[start:]
                if reason is None and around.path in self.stopped:
                    reason = self.stopped.pop(around.path)
                elif len(inside) == 1 and self._is_handed_on(whole, inside[0], output):
                    return output
                else:
                    reason = "does more in its __call__ than to call its forward"
                self.stopped[whole.path] = reason
                around.events[start:] = [whole]
                for event in inside:
                    event.within = whole
                    if isinstance(event, Invocation) and event.path == whole.path:
                        whole.events += event.events
                    else:
                        whole.events.append(event)
                return self._close(whole, output)

        return call

    def _is_handed_on(self, whole: Invocation, event: Step | Invocation, output: Any) -> bool:
        """Whether an event is the forward of a module, called as the module and returned as is."""
        return (
            isinstance(event, Invocation)
            and event.path == whole.path
            and (event.args, event.kwargs) == (whole.args, whole.kwargs)
            and event.result == self._encode(output)
        )

    def _replay(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Give what a leaf gave, which was called another way."""
        before = self.replayed.get(self.open[-1].key)
        if before is None or self.in_leaf > 1:
            return type(module).forward(module, *args, **kwargs)
        given = paired((before.args, before.kwargs), (args, kwargs))
        return decoded(before.result, {id(known): value for known, value in given})

    def _open(self, call: Invocation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._describe(call, args, kwargs)
        self.calls[call.path] += 1
        self.open[-1].events.append(call)
        self.open.append(call)

    def _describe(self, call: Invocation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how a module is called."""
        _note_state(call)
        count = self.calls[call.path]
        call.key = f"{call.path}@{count}" if count else call.path
        call.args, call.kwargs = self._encode(args), self._encode(kwargs)
        call.call = Call(plain(args), plain(kwargs)).described()
        call.given = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]

    def _close(self, call: Invocation, output: Any) -> Any:
        call.written = self._memory([t for t, version in call.given if t._version != version])
        given = {id(tensor) for tensor, _ in call.given}
        call.given = []

        def distinct(tensor: Tensor) -> Tensor:
            # What a module hands through (dropout in eval mode) is its value all the same.
            if id(tensor) not in given:
                return tensor
            other = _alias(tensor)
            if other is not tensor:
                self._know(other, None, same_as=self._lookup(tensor))
            return other

        output = map_tensors(output, distinct)
        active = any(known.active for known in knowns((call.args, call.kwargs)))
        self._result(call, output, active)
        return output

    # --- functions ------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in CHANGES and args and id(args[0]) in self.shared:
            raise WritesWeights
        if self.in_leaf or self.is_closed:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self.no_grad.append(args[0])
            return func(*args, **kwargs)
        if name == "__get__":
            return self._property(func, args[0])
        if name in ("__set__", "__delete__"):
            attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
            self.stop(f"sets the attribute {attribute!r} of a tensor")
            return func(*args, **kwargs)
        if name in ("size", "numel", "nelement", "stride", "__len__") and args:
            return self._size(func, name, args, kwargs)
        return self._call(func, name, args, kwargs)

    def _property(self, func: Any, tensor: Tensor) -> Any:
        name = str(func.__self__.__name__)
        if name == "shape":
            return self._size(torch.Tensor.size, "size", (tensor,), {})
        value = func(tensor)
        if isinstance(value, Tensor):
            if value is not tensor:
                step = self._step(getattr, (tensor, name), {})
                self._result(step, value, self._lookup(tensor).active)
            return value
        if name in ("device", "dtype"):
            step = self._read(tensor, name, value)
            if name == "device":
                # torch makes an object of its own each time, by which it is known again.
                step.result = self._know(value, (step, ()))
            return value
        if name in GRAD:
            self._read(tensor, name, value is not None and value is not False)
        elif name in ("grad", "_version"):
            self.stop(f"reads the attribute {name!r} of a tensor")
        elif name in RANK:
            self._leave_rank(tensor)
        elif name in LAYOUTS:
            if any(isinstance(origin, Argument) for origin, _ in self._lookup(tensor).origins):
                return self.leave(getattr, (tensor, name), value, f"{name} of a tensor")
        elif isinstance(value, bool | int):
            # is_cuda, is_sparse, itemsize: what it is now is all that the graph knows.
            return self.leave(getattr, (tensor, name), value, f"{name} of a tensor")
        return value

    def _read(self, tensor: Tensor, name: str, result: Any) -> Step:
        """Note that a forward reads what is no number of a tensor."""
        step = Step(self.open[-1], (self._encode(tensor),), kind="read", func=name)
        step.result, step.line = result, user_line()
        self.open[-1].events.append(step)
        return step

    def _leave_rank(self, tensor: Tensor) -> None:
        self.leave(torch.Tensor.dim, (tensor,), tensor.dim(), "the number of dimensions")

    def _size(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        value = func(*plain(args), **plain(kwargs))
        known = self._lookup(tensor)
        if any(isinstance(origin, Attribute) for origin, _ in known.origins):
            return value
        if not self.sizes:
            self.stop("reads a size, and does not run on sizes that are followed")
            return value
        text = f"{self._text(known)}.{'shape' if name == 'size' else name}"
        if name == "__len__":
            return self.leave(len, (tensor,), value, f"len({self._text(known)})")
        step = self._step(func, args, kwargs)
        step.result = value
        if isinstance(value, int):
            where = f"[{plain(args[1])}]" if len(args) > 1 else ""
            return self._sized(value, text + where, (step, ()))
        items = [
            self._sized(item, f"{text}[{index}]", (step, (index,)))
            for index, item in enumerate(value)
        ]
        return torch.Size(items) if name == "size" else tuple(items)

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in RANK and args:
            self._leave_rank(args[0])
            return func(*args, **kwargs)
        if name in CHANGES:
            self.stop(f"calls {name} on a tensor")
        if name in DATA:
            self.stop(f"reads numbers from a tensor ({name.strip('_')})")
            return func(*plain(args), **plain(kwargs))
        step = self._step(func, args, kwargs)
        given = list(tensors_in((args, kwargs)))
        versions = [t._version for t in given]
        value = func(*plain(args), **plain(kwargs))
        if _grad_enabled() != self.open[-1].grad:
            step.no_grad = True
            if not self.no_grad or self.no_grad[-1] != _grad_enabled():
                self.stop("runs a torch.autograd.Function, or changes the grad mode unseen")
        if _autocast_state() != self.open[-1].autocast:
            self.stop("changes the autocast mode inside its forward")
        if _saving_hooks() != self.open[-1].saving:
            self.stop("uses activation checkpointing")
        step.written = self._memory(
            [t for t, version in zip(given, versions, strict=True) if t._version != version]
        )
        tensors = list(tensors_in(value))
        if not tensors and isinstance(value, bool | int | float | str | torch.dtype):
            self.open[-1].events.remove(step)
            if name == "type":
                self.stop("asks for the type of a tensor as text")
                return value
            # is_floating_point, is_contiguous, result_type: known without the numbers.
            return self.leave(func, args, value, f"{name} of a tensor", kwargs)
        if not tensors and value is not None:
            self.stop(f"calls {name}, which returns a {type(value).__name__}")
        own = {id(tensor) for tensor in given}
        if not step.written and any(id(tensor) in own for tensor in tensors):
            # What it hands through (dropout in eval mode) is its value all the same.
            with torch._C.DisableTorchFunction():
                value = map_tensors(value, lambda t: _alias(t) if id(t) in own else t)
        active = any(known.active for known in knowns((step.args, step.kwargs)))
        self._result(step, value, active)
        if name in LISTS and not any(isinstance(a, list | tuple) for a in args):
            self.leave(len, (value,), len(value), f"the length of {name}")
        operands = operands_of(args, kwargs)
        step.merges = (
            name in ADDS
            and len(operands) == 2
            and operands[0].shape == operands[1].shape
            and (operands[0].is_floating_point() or operands[0].is_complex())
            and all(self._is_activation(operand) for operand in operands)
            # A sum of two products, as in rotary embeddings, has no identity shortcut.
            and not all(is_product(self._lookup(operand)) for operand in operands)
        )
        return value

    def _is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the arguments of the model, or is one of the module's."""
        given = self.open[-1].given
        return self._lookup(tensor).active or any(tensor is other for other, _ in given)

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        step = Step(self.open[-1], self._encode(args), self._encode(kwargs), func=func)
        self.open[-1].events.append(step)
        return step

    def _result(self, event: Step | Invocation, value: Any, active: bool) -> None:
        """Make known what a step or an invocation has returned."""
        counted = is_counted(event)

        def walk(item: Any, keys: tuple[Any, ...]) -> None:
            if isinstance(item, Tensor):
                self._know(item, (event, keys), active=active).counted |= counted
            elif type(item) in SIZES:
                item.known.origins.append((event, keys))
            elif isinstance(item, tuple | list):
                for index, part in enumerate(item):
                    walk(part, (*keys, index))
            elif isinstance(item, dict):
                for key, part in item.items():
                    walk(part, (*keys, key))
            elif dataclasses.is_dataclass(item) and not isinstance(item, type):
                for field in dataclasses.fields(item):
                    walk(getattr(item, field.name), (*keys, Field(field.name)))

        walk(value, ())
        event.result = self._encode(value)

    # --- sizes ----------------------------------------------------------------------------------

    def compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], value: Any, text: str
    ) -> Any:
        if self.is_closed or self.in_leaf:
            return value
        step = Step(self.open[-1], self._encode(args), func=func, result=value)
        self.open[-1].events.append(step)
        active = any(known.active for known in knowns(step.args))
        return self._sized(value, text, (step, ()), active)

    def _sized(self, value: Any, text: str, origin: Origin, active: bool = True) -> Any:
        known = Known(value, origins=[origin], active=active, counted=is_counted(origin[0]))
        return sized(value, text, known, self)

    def leave(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        value: Any,
        text: str,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.is_closed or self.in_leaf:
            return value
        step = Step(self.open[-1], self._encode(args), self._encode(kwargs or {}), kind="leave")
        step.func, step.result, step.text, step.line = func, value, text, user_line()
        self.open[-1].events.append(step)
        if is_counted(step) and func is not torch.Tensor.dim:
            self.stop("goes by how many numbers of a tensor meet a condition")
        return value

    # --- what is known --------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """Note what a graph of the module whose forward runs cannot hold."""
        line = user_line()
        self.stopped.setdefault(self.open[-1].path, reason + (f" (at {line})" if line else ""))

    def _check_state(self) -> None:
        if self.state is None:
            return
        # Sizes that were kept, as keys for one, are compared here by nobody's forward.
        self.in_leaf += 1
        changed = self.state.changed()
        self.in_leaf -= 1
        for name in changed:
            self.stop(f"changes {name} in its forward")

    def _know(
        self, value: Any, origin: Origin | None, active: bool = False, same_as: Known | None = None
    ) -> Known:
        known = self.known.get(id(value))
        if known is None:
            is_tensor = isinstance(value, Tensor)
            fact = TensorFact.of(value) if is_tensor else type(value).__name__
            known = self.known[id(value)] = Known(fact, self._memory(value))
            self.held.append(value)
        if origin is not None:
            known.origins.append(origin)
        known.active = known.active or active or (same_as is not None and same_as.active)
        known.same_as = known.same_as or same_as
        return known

    def _lookup(self, tensor: Tensor) -> Known:
        known = self.known.get(id(tensor))
        if known is None:
            name = self.names.get(id(tensor))
            known = self._know(tensor, None if name is None else (Attribute(name), ()))
            if name is None:
                self.stop("uses a tensor that is neither an input, a parameter nor a buffer")
        return known

    def _text(self, known: Known) -> str:
        for origin, keys in known.origins:
            if isinstance(origin, Argument):
                return origin.name + "".join(f"[{key!r}]" for key in keys)
            if isinstance(origin, Invocation):
                return f"({origin.path})"
            if isinstance(origin, Step):
                return f"({getattr(origin.func, '__name__', origin.func)})"
        return "a tensor"

    def _encode(self, value: Any) -> Any:
        """Return a nested value with what is known in the place of tensors, sizes and objects."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self._lookup(value)
        if kind in SIZES:
            return value.known
        if kind is torch.device or not isinstance(value, ARGUMENTS_OF_TORCH):
            found = self.known.get(id(value))
            if found is not None:
                return found
        if kind is torch.Size:
            return tuple(self._encode(item) for item in value)
        if isinstance(value, tuple):
            return like_tuple(value, (self._encode(item) for item in value))
        if kind is list:
            return [self._encode(item) for item in value]
        if kind is dict:
            return {key: self._encode(item) for key, item in value.items()}
        if kind is OrderedDict:
            return Built(OrderedDict, {key: self._encode(item) for key, item in value.items()})
        if kind is slice:
            return slice(*map(self._encode, (value.start, value.stop, value.step)))
        if isinstance(value, ARGUMENTS_OF_TORCH):
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if isinstance(value, dict):
                return Built(kind, {key: self._encode(item) for key, item in value.items()})
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return Built(kind, {name: self._encode(getattr(value, name)) for name in names})
        if isinstance(value, type | enum.Enum):
            return value
        return self._know(value, None)

    def _memory(self, values: Any) -> Memory:
        found = set()
        for tensor in tensors_in(values):
            storage = storage_of(tensor)
            if storage is None:
                continue
            if storage._cdata not in self.numbers:
                # An address may be used again once it is freed; holding on keeps them apart.
                self.held.append(storage)
                self.numbers[storage._cdata] = len(self.numbers)
            found.add(self.numbers[storage._cdata])
        return frozenset(found)


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor of the same memory, gradient included."""
    try:
        alias: Tensor = torch.ops.aten.alias.default(tensor)
    except (NotImplementedError, RuntimeError):
        # Sparse and similar layouts have no views.
        return tensor
    return alias


def _note_state(call: Invocation) -> None:
    call.grad, call.autocast, call.saving = _grad_enabled(), _autocast_state(), _saving_hooks()


def _autocast_state() -> tuple[bool, ...]:
    return _autocast_enabled("cpu"), _autocast_enabled("cuda")


def _saving_hooks() -> Any:
    """Return the hooks under which autograd saves tensors: those of activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
