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
import pickle
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockprune.tracing.values import TensorFact

__all__ = ["Cell", "State", "surroundings_kept"]

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
    """

    def __init__(self, model: nn.Module, values: Any, only: frozenset[str] | None = None) -> None:
        self._model = model
        cells = [*_random_cells(), *_module_cells(model), *_code_cells(model), *_objects(values)]
        self.cells = [cell for cell in cells if only is None or cell.name in only]
        self._seen = [cell.read() for cell in self.cells]

    def changed(self) -> list[str]:
        """Return the names of what has changed since the last time this was asked."""
        found = []
        for index, cell in enumerate(self.cells):
            now = cell.read()
            if now != self._seen[index]:
                self._seen[index] = now
                found.append(cell.name)
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


def _named_by(functions: list[FunctionType]) -> Iterator[Cell]:
    seen: set[int] = set()
    while functions:
        function = functions.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            called = inspect.unwrap(value) if callable(value) else value
            if isinstance(called, FunctionType) and called.__module__ == function.__module__:
                functions.append(called)
            key = (id(function.__globals__), name)
            if value is not None and hash(key) not in seen:
                seen.add(hash(key))
                holder = sys.modules.get(function.__module__)
                if holder is not None and vars(holder) is function.__globals__:
                    yield from _cell(f"the global {name!r}", holder, name, value)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):
                inner = cell.cell_contents
                if isinstance(inner, FunctionType):
                    functions.append(inner)
                yield from _cell(f"the variable {name!r}", cell, "cell_contents", inner)


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
    elif type(value) in _CONTAINERS or isinstance(value, (*_GENERATORS, *_PLAIN, Tensor)):
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


def _shallow(value: Any) -> Any:
    """Return a value that differs when `value` is another, or holds other items."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, _GENERATORS):
        return id(value), _deep(value)
    if isinstance(value, dict):
        return id(value), [(id(key), id(item)) for key, item in value.items()]
    if isinstance(value, _CONTAINERS):
        return id(value), [
            (type(item), item) if isinstance(item, _PLAIN) else id(item) for item in value
        ]
    return id(value)


def _put_back(value: Any) -> Callable[[], None]:
    """Return what restores a container or generator to what it holds now."""
    if isinstance(value, dict):
        items = dict(value)

        def fill() -> None:
            if value != items:
                value.clear()
                value.update(items)

        return _quietly(fill)
    if isinstance(value, list | deque | set):
        kept = list(value)

        def refill() -> None:
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(kept)

        return _quietly(refill)
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


def _quietly(change: Callable[[], None]) -> Callable[[], None]:
    def attempt() -> None:
        # A container may hold what cannot be compared, or be read-only after all.
        with contextlib.suppress(Exception):
            change()

    return attempt
