"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import blockprune

MODULES = [
    module.name
    for module in pkgutil.walk_packages(blockprune.__path__, "blockprune.")
    if not module.name.endswith("__main__")
]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in examples(module):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_public_functions_have_examples() -> None:
    for name in ("find_blocks", "score_blocks", "make_plan", "remove_blocks", "prune"):
        function = getattr(blockprune, name)
        assert ">>>" in function.__doc__, name
    for criterion in vars(importlib.import_module("blockprune.criteria"))["CRITERIA"].values():
        assert ">>>" in type(criterion).__doc__, type(criterion)
        assert "Source:" in type(criterion).__doc__, type(criterion)
