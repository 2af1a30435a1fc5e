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

from blockprune.tracing.sizes import SIZES, plain
from blockprune.tracing.values import tensors_in

__all__ = ["clear_caches", "uncached"]

_CACHE: Any = type(functools.lru_cache(lambda: None))
_LOOKED_INTO = frozenset({"Size", "_HashedSeq", "_lru_list_elem", "dict", "list", "tuple"})
"""Names of the types that a cache is made of, and that keys and results are nested in."""


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Let cached functions of modules compute anew what they are asked with sizes.

    Where that gives tensors, the cache is used: they may be drawn at random, once for all.
    """
    # One module may be known by several names.
    modules = {id(m): m for m in list(sys.modules.values()) if isinstance(m, ModuleType)}
    replaced = []
    for module in modules.values():
        for name, cache, computing in _cached_functions(module):
            vars(module)[name] = computing
            replaced.append((vars(module), name, cache, computing))
    try:
        yield
    finally:
        for namespace, name, cache, computing in replaced:
            if namespace.get(name) is computing:
                namespace[name] = cache


_FOUND: dict[int, tuple[ModuleType, int, list[tuple[str, Any, Any]]]] = {}
"""Of each module, how many names it had when it was looked through, and the caches among them."""


def _cached_functions(module: ModuleType) -> list[tuple[str, Any, Any]]:
    """Return name and value of each cached function of a module, and what computes it anew."""
    namespace = vars(module)
    known, count, found = _FOUND.get(id(module), (None, 0, []))
    is_old = known is module and count == len(namespace)
    if not is_old or any(namespace.get(name) is not cache for name, cache, _ in found):
        caches = [(n, value) for n, value in list(namespace.items()) if type(value) is _CACHE]
        found = [(name, cache, _computing(cache)) for name, cache in caches]
        _FOUND[id(module)] = module, len(namespace), found
    return found


def _computing(cache: Any) -> Callable[..., Any]:
    @functools.wraps(cache)
    def compute(*args: Any, **kwargs: Any) -> Any:
        if _reaches_sizes([args, kwargs]):
            value = cache.__wrapped__(*args, **kwargs)
            if not any(True for _ in tensors_in(value)):
                return value
            # Sizes are never among the keys: what others find in the cache is as they left it.
            hash((args, *kwargs.items()))
            return cache(*plain(args), **plain(kwargs))
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
