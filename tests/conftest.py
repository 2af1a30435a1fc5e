"""Deterministic, quiet and small by default.

`pytest --large` (or BLOCKPRUNE_LARGE=1) draws many more random architectures and widens
the slice of torchvision that is tried.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from blockprune.profiling import execution as execution_module

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
# The small profile does not shrink a failure: that takes minutes, and --large does it.
_QUICK = [Phase.explicit, Phase.generate]
settings.register_profile("small", max_examples=25, derandomize=True, phases=_QUICK, **_COMMON)
settings.register_profile("large", max_examples=500, **_COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--large", action="store_true", help="draw 20 times as many random architectures"
    )


def _is_large(config: pytest.Config) -> bool:
    return bool(config.getoption("--large")) or os.environ.get("BLOCKPRUNE_LARGE") == "1"


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("large" if _is_large(config) else "small")
    # Tiny tensors: more threads than one only wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def large(pytestconfig: pytest.Config) -> bool:
    """Whether the slow, wide version of a test was asked for."""
    return _is_large(pytestconfig)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same generators, in whatever order it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Compile without generating code; return what was compiled."""
    compiled: list[object] = []
    real = functools.partial(torch.compile, backend="eager")

    def compile_(model: Any, **options: Any) -> Any:
        compiled.append(model)
        return real(model, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    execution_module._compiler_failure.cache_clear()
    yield compiled
    execution_module._compiler_failure.cache_clear()
