"""Training and experiments: recipes, the loop, whole runs, what a run found.

Nothing is imported before it is asked for, so that reading results (`lottery.results`,
`lottery.record`) needs no torch. `recipe`, `record`, `results`, `steps`, `state` and `training`
know nothing of pruning; `experiment` and `running` compose.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockprune.lottery.record import RunRecord
    from blockprune.lottery.running import run
    from blockprune.lottery.spec import Spec
    from blockprune.lottery.suites import read_specs

__all__ = ["RunRecord", "Spec", "read_specs", "run"]

_HOMES = {
    "RunRecord": "blockprune.lottery.record",
    "Spec": "blockprune.lottery.spec",
    "read_specs": "blockprune.lottery.suites",
    "run": "blockprune.lottery.running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blockprune.lottery' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
