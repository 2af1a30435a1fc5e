"""Sizes that a recording has left behind in caches of functions.

`functools.lru_cache` keeps what it was called with and what came of it. Sizes of a recording equal
plain numbers, so a later call in plain numbers would be given what was computed from the sizes.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

from blockprune.tracing.sizes import SIZES

__all__ = ["clear_caches"]

_CACHE: Any = type(functools.lru_cache(lambda: None))
_LOOKED_INTO = frozenset({"_HashedSeq", "_lru_list_elem", "dict", "list", "tuple"})
"""Names of the types that a cache is made of, and that keys and results are nested in."""


def clear_caches() -> None:
    """Clear the caches of functions that hold sizes: all of them, as they tell no entries apart."""
    for cache in [found for found in gc.get_objects() if type(found) is _CACHE]:
        if cache.cache_info().currsize and _holds_sizes(cache):
            cache.cache_clear()


def _holds_sizes(cache: Any) -> bool:
    pending, seen = gc.get_referents(cache), set[int]()
    while pending:
        found = pending.pop()
        if type(found) in SIZES:
            return True
        if type(found).__name__ in _LOOKED_INTO and id(found) not in seen:
            seen.add(id(found))
            pending += gc.get_referents(found)
    return False
