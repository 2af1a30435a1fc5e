"""What a forward may change beside tensors: attributes, generators, containers, caches.

A graph holds none of it. `State` reads all that a model's code can reach before a run and after;
what differs is then watched during another run, to learn in whose forward it changes. What lies
outside the model (globals, attributes of classes) is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import pickle
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockprune.tracing.sizes import SIZES, plain
from blockprune.tracing.values import TensorFact

__all__ = ["Cell", "State", "names_in_code", "surroundings_kept"]

_REGISTRIES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing that a forward may change.

    Attributes:
        name: what it is, for messages.
        read: returns its state, to compare with another reading.
        restore: puts it back as it was when the cell was made; None inside the model.
    """

    name: str
    read: Callable[[], Any]
    restore: Callable[[], None] | None = None


class State:
    """The state that the forward of a model can reach, as it is when this is made.

    Args:
        model: a copy of the model.
        values: its arguments; objects in it are looked at too.
        only: names of the cells to watch; None for all.

    Attributes:
        moved: names of all that was ever found to have changed.
    """

    def __init__(self, model: nn.Module, values: Any, only: frozenset[str] | None = None) -> None:
        self._model = model
        cells = [*_random_cells(), *_module_cells(model), *_code_cells(model), *_objects(values)]
        self.cells = [cell for cell in cells if only is None or cell.name in only]
        self._seen = [cell.read() for cell in self.cells]
        self.moved: set[str] = set()

    def changed(self) -> list[str]:
        """Return the names of what has changed since the last time this was asked."""
        found = []
        for index, cell in enumerate(self.cells):
            now = cell.read()
            if now != self._seen[index]:
                self._seen[index] = now
                found.append(cell.name)
        self.moved.update(found)
        return found

    def restore(self) -> None:
        """Put back what lies outside the model."""
        for cell in self.cells:
            if cell.restore is not None:
                cell.restore()


@contextlib.contextmanager
def surroundings_kept(model: nn.Module) -> Iterator[None]:
    """Put back globals, attributes of classes and caches that the code of `model` may change."""
    cells = list(_code_cells(model))
    try:
        yield
    finally:
        for cell in cells:
            if cell.restore is not None:
                cell.restore()


def _random_cells() -> Iterator[Cell]:
    yield Cell("Python's random generator", random.getstate)

    def numpy_state() -> Any:
        _, keys, *rest = np.random.get_state()
        return np.asarray(keys).tobytes(), tuple(rest)

    yield Cell("numpy's random generator", numpy_state)


# --- the modules of the model ---------------------------------------------------------------------


def _module_cells(model: nn.Module) -> Iterator[Cell]:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # its state is not Python's
        yield Cell(f"attributes of {path!r}" if path else "its attributes", _attributes_of(module))


def _attributes_of(module: nn.Module) -> Callable[[], Any]:
    registries = ["_modules", "_parameters"]
    if not type(module).__module__.startswith("torch."):
        registries.append("_buffers")

    def read() -> Any:
        found: list[Any] = []
        for name in registries:
            found.append([(key, id(value)) for key, value in getattr(module, name).items()])
        for name, value in vars(module).items():
            if name not in _REGISTRIES and name not in ("_modules", "_parameters", "_buffers"):
                found.append((name, _deep(value)))
        return found

    return read


def _deep(value: Any) -> Any:
    """Return a value that differs when the state of `value` does, through all that it holds."""
    value = plain(value) if type(value) in SIZES else value
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    file = io.BytesIO()
    try:
        _Pickler(file, protocol=4).dump(value)
    except Exception:
        # What cannot be written is known by identity.
        return id(value), _shallow(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return "tensor", id(obj)
        if isinstance(obj, nn.Module | ModuleType | type | FunctionType | TensorFact):
            return "object", id(obj)
        if isinstance(obj, torch.Generator):
            return "generator", obj.get_state().numpy().tobytes()
        return None


# --- objects among the arguments ------------------------------------------------------------------


def _objects(values: Any) -> Iterator[Cell]:
    """Yield a cell for each argument that holds state of its own, such as a cache."""
    for name, value in values:
        if not isinstance(value, (*_PLAIN, Tensor, nn.Module, type)) and not callable(value):
            yield Cell(f"the argument {name!r}", functools.partial(_deep, value))


# --- what the code of the model names -------------------------------------------------------------


def _code_cells(model: nn.Module) -> Iterator[Cell]:
    """Yield cells for attributes of classes, and for globals and closures of their functions."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    functions: list[FunctionType] = []
    for kind in kinds:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in list(vars(kind).items()):
            function = inspect.unwrap(getattr(value, "__func__", value))
            if isinstance(function, FunctionType):
                functions.append(function)
            if not name.startswith("__"):
                yield from _cell(f"{kind.__name__}.{name}", kind, name, value)
    for module in model.modules():
        for value in vars(module).values():
            function = inspect.unwrap(getattr(value, "func", value)) if callable(value) else None
            if isinstance(function, FunctionType):
                functions.append(function)
    yield from _named_by(functions)


def names_in_code(module: nn.Module) -> set[str]:
    """Return the names in the code that the forward of a module, and what it calls, consists of."""
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    pending, seen, found = [forward], set[Any](), set[str]()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):
                pending.append(cell.cell_contents)
        for name in _names(function.__code__):
            found.add(name)
            method = inspect.getattr_static(type(module), name, None)
            method = getattr(method, "fget", None) or getattr(method, "__func__", method)
            called = function.__globals__.get(name)
            for value in (method, called, vars(module).get(name)):
                value = inspect.unwrap(value) if callable(value) else value
                if isinstance(value, FunctionType) and not _is_foreign(value.__module__):
                    pending.append(value)
    return found


def _named_by(functions: list[FunctionType]) -> Iterator[Cell]:
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        names = [*_names(function.__code__)]
        spaces = [function.__globals__]
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType) and not _is_foreign(value.__name__):
                spaces.append(vars(value))
        for space, name in itertools.product(spaces, names):
            value = space.get(name)
            called = inspect.unwrap(value) if callable(value) else value
            if isinstance(called, FunctionType) and not _is_foreign(called.__module__):
                functions.append(called)
            key = hash((id(space), name))
            if value is not None and key not in seen:
                seen.add(key)
                holder = sys.modules.get(space.get("__name__", ""))
                if holder is not None and vars(holder) is space:
                    yield from _cell(f"the global {name!r}", holder, name, value)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for value in defaults:
            if type(value) in _CONTAINERS:
                read = functools.partial(_shallow, value)
                yield Cell(f"a default of {function.__name__!r}", read, _put_back(value))
        held = vars(function)
        read = functools.partial(_shallow, held)
        yield Cell(f"the attributes of {function.__name__!r}", read, _put_back(held))
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):
                inner = cell.cell_contents
                if isinstance(inner, FunctionType):
                    functions.append(inner)
                yield from _cell(f"the variable {name!r}", cell, "cell_contents", inner)


def _is_foreign(module: str | None) -> bool:
    """Whether a module is of torch, of Python or ours: what it holds is not a model's."""
    library = (module or "").partition(".")[0]
    return library in ("torch", "numpy", "blockprune") or library in sys.stdlib_module_names


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


def _cell(name: str, holder: Any, attribute: str, value: Any) -> Iterator[Cell]:
    """Yield the cell of one attribute, if it is of a kind that code changes."""
    if hasattr(value, "cache_info") and hasattr(value, "cache_clear"):
        before = value.cache_info().currsize

        def clear() -> None:
            if not before:
                value.cache_clear()

        yield Cell(f"the cache of {name}", lambda: value.cache_info().currsize, clear)
    elif type(value) in _CONTAINERS or isinstance(
        value, (*_GENERATORS, *_PLAIN, Tensor, np.ndarray)
    ):
        put_back = _put_back(value)

        def restore() -> None:
            if (
                vars(holder).get(attribute) is not value
                if attribute != "cell_contents"
                else (holder.cell_contents is not value)
            ):
                setattr(holder, attribute, value)
            put_back()

        yield Cell(name, lambda: _shallow(getattr(holder, attribute, None)), restore)
    elif _is_plain_object(value):
        yield Cell(name, lambda: _shallow(vars(value)), _put_back(vars(value)))


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of a user's, which holds state and nothing else."""
    kinds = nn.Module, ModuleType, type, Tensor
    is_other = isinstance(value, kinds) or callable(value) or not hasattr(value, "__dict__")
    return not is_other and not _is_foreign(type(value).__module__)


def _shallow(value: Any) -> Any:
    """Return a value that differs when `value` is another, or holds other items."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, _GENERATORS):
        return id(value), _deep(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if not value.dtype.hasobject else None
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict):
        return id(value), [(id(key), _item(item)) for key, item in value.items()]
    if isinstance(value, _CONTAINERS):
        return id(value), [_item(item) for item in value]
    return id(value)


def _item(value: Any) -> Any:
    """Return a value that differs when an item of a container is another, or was written into."""
    is_nested = isinstance(value, (*_CONTAINERS, *_PLAIN, Tensor, np.ndarray))
    return _shallow(value) if is_nested else id(value)


def _put_back(value: Any) -> Callable[[], None]:
    """Return what restores a container, a generator, a tensor or an array to what it holds now."""
    if isinstance(value, dict):
        items, shallow, within = dict(value), _shallow(value), _within(value.values())

        def fill() -> None:
            if _shallow(value) != shallow:
                value.clear()
                value.update(items)
            within()

        return _quietly(fill)
    if isinstance(value, list | deque | set):
        kept, within = list(value), _within(value)

        def refill() -> None:
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(kept)
            within()

        return _quietly(refill)
    if isinstance(value, Tensor):
        return _rewritten(value)
    if isinstance(value, np.ndarray):
        numbers = value.copy()
        return _quietly(lambda: np.copyto(value, numbers))
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        state = value.bit_generator.state

        def reset() -> None:
            value.bit_generator.state = state

        return reset
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, torch.Generator):
        seed = value.get_state()

        def rewind() -> None:
            value.set_state(seed)

        return rewind
    return lambda: None


def _within(values: Iterable[Any]) -> Callable[[], None]:
    """Return what restores the containers, tensors and arrays among values."""
    kinds = (*_CONTAINERS, Tensor, np.ndarray)
    changes = [_put_back(value) for value in values if isinstance(value, kinds)]

    def change() -> None:
        for each in changes:
            each()

    return change


def _rewritten(tensor: Tensor) -> Callable[[], None]:
    """Return what writes the numbers of a tensor into it again, where others were."""
    try:
        version, numbers = tensor._version, tensor.detach().clone()
    except RuntimeError:
        # A tensor of inference mode counts no versions.
        return lambda: None

    def write() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(numbers)

    return _quietly(write)


def _quietly(change: Callable[[], None]) -> Callable[[], None]:
    def attempt() -> None:
        # A container may hold what cannot be compared, or be read-only after all.
        with contextlib.suppress(Exception):
            change()

    return attempt
