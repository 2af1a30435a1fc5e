"""Run a thin slice of the products of parameters, or all of them with `--large`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

MOST = 8

Values = dict[tuple[str, int], list[str]]
"""For each test and each of its parametrisations, the ids of the values."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep of each product of parameters a part of the diagonal.

    The longest parameter is gone through once, in steps that give `MOST` tests, and the others turn
    beside it. A test that is asked for by its name or with `-k` runs.
    """
    by_name = config.getoption("keyword") or any("::" in argument for argument in config.args)
    if config.getoption("--large") or by_name:
        return
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    values = _values(here)
    dropped = {item.nodeid: item for item in here if not _is_in_the_slice(item, values)}
    config.hook.pytest_deselected(items=list(dropped.values()))
    items[:] = [item for item in items if item.nodeid not in dropped]


def _ids(item: pytest.Item) -> dict[tuple[str, int], str]:
    """Return the id of the value that an item has of each parametrisation of its test."""
    test = item.nodeid.partition("[")[0]
    ids = item.callspec._idlist if hasattr(item, "callspec") else ()
    return {(test, place): str(name) for place, name in enumerate(ids)}


def _values(items: list[pytest.Item]) -> Values:
    values: Values = {}
    for item in items:
        for place, name in _ids(item).items():
            known = values.setdefault(place, [])
            if name not in known:
                known.append(name)
    return values


def _is_in_the_slice(item: pytest.Item, values: Values) -> bool:
    ids = _ids(item)
    indices = {place: values[place].index(name) for place, name in ids.items()}
    longest = max(ids, key=lambda place: len(values[place]), default=None)
    if longest is None:
        return True
    turn, rest = divmod(indices.pop(longest), math.ceil(len(values[longest]) / MOST))
    return rest == 0 and all(index == turn % len(values[place]) for place, index in indices.items())
