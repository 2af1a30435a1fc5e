"""Sizes and caches of functions: `functools.lru_cache`, in the model's code and in libraries.

A cache keeps what a function was called with and what came of it. Sizes of a recording equal plain
numbers. So a cached call would be given what was computed from the sizes of an earlier one, and a
call in plain numbers, after the recording, what was computed from sizes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from blockprune.tracing.sizes import SIZES
from blockprune.tracing.values import tensors_in

__all__ = ["clear_caches", "uncached"]

_CACHE: Any = type(functools.lru_cache(lambda: None))
_LOOKED_INTO = frozenset({"_HashedSeq", "_lru_list_elem", "dict", "list", "tuple"})
"""Names of the types that a cache is made of, and that keys and results are nested in."""


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Let cached functions of modules compute anew what they are asked with sizes.

    Where that gives tensors, the cache is used: they may be drawn at random, once for all.
    """
    before = [
        (vars(module), name, value)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if type(value) is _CACHE
    ]
    for namespace, name, cache in before:
        namespace[name] = _computing(cache)
    try:
        yield
    finally:
        for namespace, name, cache in before:
            namespace[name] = cache


def _computing(cache: Any) -> Callable[..., Any]:
    @functools.wraps(cache)
    def compute(*args: Any, **kwargs: Any) -> Any:
        if _reaches_sizes([args, kwargs]):
            value = cache.__wrapped__(*args, **kwargs)
            if not any(True for _ in tensors_in(value)):
                return value
        return cache(*args, **kwargs)

    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(compute, name, getattr(cache, name))
    return compute


def clear_caches() -> None:
    """Clear the caches of functions that hold sizes: all of them, as they tell no entries apart."""
    for cache in [found for found in gc.get_objects() if type(found) is _CACHE]:
        if cache.cache_info().currsize and _reaches_sizes(gc.get_referents(cache)):
            cache.cache_clear()


def _reaches_sizes(values: list[Any]) -> bool:
    pending, seen = list(values), set[int]()
    while pending:
        found = pending.pop()
        if type(found) in SIZES:
            return True
        if type(found).__name__ in _LOOKED_INTO and id(found) not in seen:
            seen.add(id(found))
            pending += gc.get_referents(found)
    return False
