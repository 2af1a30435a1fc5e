"""Where in a user's model an error came from: the module, and the line of its code."""

from __future__ import annotations

import os
import traceback

import torch
from torch import nn

__all__ = ["line_of", "module_of"]

_NOT_THE_USERS = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(__file__), ""),
    "<",
)


def line_of(error: BaseException) -> str:
    """Return the innermost line of user code that `error` passed, as `file:number: code`, or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
    return ""


def module_of(error: BaseException) -> str:
    """Return the qualified name of the innermost module that `error` came from, or ""."""
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [owner for owner in running if isinstance(owner, nn.Module)]
    if not modules:
        return ""
    return next((name for name, part in modules[0].named_modules() if part is modules[-1]), "")
