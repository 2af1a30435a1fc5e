"""The tests themselves: each asserts something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
CHECKS = {"raises", "warns", "assert_close", "assert_never_called", "fail"}
"""Calls that fail a test by themselves."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path in sorted(TESTS.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path.relative_to(TESTS)}::{node.name}", node


def names_called(function: Function) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    named = {call.id for call in calls if isinstance(call, ast.Name)}
    return named | {call.attr for call in calls if isinstance(call, ast.Attribute)}


def asserts(function: Function) -> bool:
    has_assert = any(isinstance(node, ast.Assert) for node in ast.walk(function))
    return has_assert or bool(names_called(function) & CHECKS)


def idle_tests(found: list[tuple[str, Function]]) -> list[str]:
    """Return the tests that assert nothing, neither themselves nor in a function that they call."""
    checking = {function.name for _, function in found if asserts(function)}
    grows = True
    while grows:
        more = {f.name for _, f in found if names_called(f) & checking} - checking
        grows = bool(more)
        checking |= more
    return [
        place
        for place, function in found
        if function.name.startswith("test_") and function.name not in checking
    ]


def test_every_test_asserts_something() -> None:
    found = list(functions())
    assert len(found) > 1000
    assert idle_tests(found) == []


def test_an_idle_test_is_found() -> None:
    source = """
def test_nothing():
    run()

def run():
    return 1

def test_through_another():
    check()

def check():
    deeper()

def deeper():
    assert run() == 1
"""
    found = [(node.name, node) for node in ast.parse(source).body if isinstance(node, Function)]
    assert idle_tests(found) == ["test_nothing"]
