"""Run a thin slice of the products of parameters, or all of them with `--large`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

Lengths = dict[str, dict[str, int]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the diagonal of each product of parameters, in which every value occurs.

    The longest parameter is gone through once, and the others turn beside it. A test that is asked
    for by its name or with `-k` runs.
    """
    by_name = config.getoption("keyword") or any("::" in argument for argument in config.args)
    if config.getoption("--large") or by_name:
        return
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    lengths = _lengths(here)
    dropped = [item for item in here if not _is_on_the_diagonal(item, lengths)]
    config.hook.pytest_deselected(items=dropped)
    gone = {item.nodeid for item in dropped}
    items[:] = [item for item in items if item.nodeid not in gone]


def _indices(item: pytest.Item) -> dict[str, int]:
    return dict(item.callspec.indices) if hasattr(item, "callspec") else {}


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _lengths(items: list[pytest.Item]) -> Lengths:
    """Return for each test how many values each of its parameters has."""
    lengths: Lengths = defaultdict(dict)
    for item in items:
        for name, index in _indices(item).items():
            known = lengths[_test(item)]
            known[name] = max(known.get(name, 0), index + 1)
    return lengths


def _is_on_the_diagonal(item: pytest.Item, lengths: Lengths) -> bool:
    indices, known = _indices(item), lengths[_test(item)]
    longest = max(indices, key=lambda name: known[name], default=None)
    return longest is None or all(
        index == indices[longest] % known[name] for name, index in indices.items()
    )
