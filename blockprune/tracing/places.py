"""Where in a user's model an error came from: the module, and the line of its code."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sys
import traceback
from types import FrameType

import torch
from torch import nn

__all__ = ["line_of", "makes_message", "module_of", "user_line"]

_NOT_THE_USERS = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(__file__), ""),
    "<",
)
_MESSAGES = frozenset(
    {"_assert", "debug", "error", "exception", "info", "log", "print", "warn", "warning"}
)


def line_of(error: BaseException) -> str:
    """Return the innermost line of user code that `error` passed, as `file:number: code`, or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_NOT_THE_USERS):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
    return ""


def user_line() -> str:
    """Return the innermost line of user code that runs now, as `file:number: code`, or ""."""
    frame = _user_frame()
    if frame is None:
        return ""
    name = frame.f_code.co_filename
    code = linecache.getline(name, frame.f_lineno).strip()
    return f"{os.path.basename(name)}:{frame.f_lineno}: {code}"


def makes_message() -> bool:
    """Whether the user code that runs now makes a text for nobody but a reader.

    That is an argument of a function that warns, logs, prints or asserts, or part of an exception.
    """
    frame = _user_frame()
    if frame is None:
        return False
    positions = list(frame.f_code.co_positions())
    line, _, column, _ = positions[frame.f_lasti // 2]
    tree = _parsed(frame.f_code.co_filename)
    return any(
        isinstance(node, ast.Raise | ast.Assert)
        or (isinstance(node, ast.Call) and _name(node.func) in _MESSAGES)
        for node in ast.walk(tree)
        if _is_around(node, line, column)
    )


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    return frame


@functools.cache
def _parsed(filename: str) -> ast.AST:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ast.Module([], [])


def _name(func: ast.expr) -> str:
    return getattr(func, "attr", getattr(func, "id", ""))


def _is_around(node: ast.AST, line: int | None, column: int | None) -> bool:
    if not isinstance(node, ast.expr | ast.stmt) or line is None or column is None:
        return False
    start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
    return start <= (line, column) < end


def module_of(error: BaseException) -> str:
    """Return the qualified name of the innermost module that `error` came from, or ""."""
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [owner for owner in running if isinstance(owner, nn.Module)]
    if not modules:
        return ""
    return next((name for name, part in modules[0].named_modules() if part is modules[-1]), "")
