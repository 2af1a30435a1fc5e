"""What a user's ``package.module:name`` stands for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from blockprune.errors import close_names

__all__ = ["NotFound", "imported"]


class NotFound(Exception):
    """A module does not import, or has no such attribute; the message is one sentence."""


def imported(module_name: str, attribute: str) -> Any:
    """Return an attribute (dots go further in) of a module, also one of the current directory.

    Raises:
        NotFound: there is none.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    # Whatever the import of a user's module raises, the name stands for nothing.
    except Exception as error:
        raise NotFound(
            f"{module_name} does not import ({type(error).__name__}: {error})."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise NotFound(
                f"{module_name} has no attribute {attribute!r}.{close_names(part, public)}"
            )
        found = getattr(found, part)
    return found
