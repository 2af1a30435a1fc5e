"""Every exception that blockprune raises on purpose.

    BlockpruneError
    ├── TraceError(RuntimeError)               the model, or its example inputs, cannot be followed
    ├── BlockNotFoundError(KeyError)           no block of that name; close names are given
    ├── BlockNotRemovableError(ValueError)     the merge exists, and was refused with a reason
    ├── CriterionError(ValueError)             unknown criterion, or scores that cannot be used
    ├── PlanError(ValueError)                  what was asked for cannot be planned
    │   ├── InfeasibleBudgetError              the budget cannot be met; says what can be reached
    │   └── StalePlanError                     the plan was made for another model
    ├── VerificationError(RuntimeError)        the ticket differs from its zero-branch reference
    ├── RecoveryError(ValueError)              a cut network cannot be fitted from what was given
    ├── TicketError(ValueError)                a ticket file is damaged, foreign or in the way
    ├── MaskError(ValueError)                  a mask of weights is damaged, or does not fit
    ├── CheckpointError(ValueError)            a state of training is damaged, or does not fit
    ├── DataError(ValueError)                  a data set is absent, empty or malformed
    ├── ModelSpecError(ValueError)             a MODEL argument names nothing that can be built
    ├── SpecError(ValueError)                  a run is asked for what cannot be read or done
    ├── MeasurementError(ValueError)           what was asked for cannot be measured
    ├── MissingExtraError(ImportError)         an optional dependency is absent; names the command
    └── TrainingDivergedError(RuntimeError)    the loss is no longer finite

One warning is raised on purpose as well: ApproximationWarning(UserWarning).

Each also inherits the builtin that a caller would expect, so that both
``except BlockpruneError`` and ``except ValueError`` work. A message says what was
asked, what was found and what would work.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "ApproximationWarning",
    "BlockNotFoundError",
    "BlockNotRemovableError",
    "BlockpruneError",
    "CheckpointError",
    "CriterionError",
    "DataError",
    "InfeasibleBudgetError",
    "MaskError",
    "MeasurementError",
    "MissingExtraError",
    "ModelSpecError",
    "PlanError",
    "RecoveryError",
    "SpecError",
    "StalePlanError",
    "TicketError",
    "TraceError",
    "TrainingDivergedError",
    "VerificationError",
    "close_names",
    "memory_errors",
    "raise_if_out_of_memory",
]


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")


class BlockpruneError(Exception):
    """Root of every error raised by blockprune on purpose."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument; a message is a sentence.
        return str(self.args[0]) if self.args else ""


class TraceError(BlockpruneError, RuntimeError):
    """The model cannot be followed, or it refuses its example inputs."""


class BlockNotFoundError(BlockpruneError, KeyError):
    """No residual block has the name asked for."""


class BlockNotRemovableError(BlockpruneError, ValueError):
    """The merge exists, but removing its branch would not be exact."""


class CriterionError(BlockpruneError, ValueError):
    """An unknown criterion, or one whose scores cannot be used."""


class PlanError(BlockpruneError, ValueError):
    """What was asked for cannot be planned on this model."""


class InfeasibleBudgetError(PlanError):
    """No choice of blocks meets the budget."""


class StalePlanError(PlanError):
    """The plan was made for a model of another structure."""


class VerificationError(BlockpruneError, RuntimeError):
    """The ticket does not compute what its zero-branch reference computes."""


class RecoveryError(BlockpruneError, ValueError):
    """A ticket cannot be recovered from this dense model and these data."""


class TicketError(BlockpruneError, ValueError):
    """A ticket file is damaged, belongs to another model, or is in the way."""


class MaskError(BlockpruneError, ValueError):
    """A mask of weights is damaged or foreign, or does not fit what it shall be put on."""


class CheckpointError(BlockpruneError, ValueError):
    """A state of training is damaged, foreign, or does not fit what shall go on from it."""


class DataError(BlockpruneError, ValueError):
    """A data set is absent, empty or malformed."""


class ModelSpecError(BlockpruneError, ValueError):
    """A MODEL argument names nothing that can be built."""


class SpecError(BlockpruneError, ValueError):
    """What a run is asked for cannot be read, or makes no sense."""


class MeasurementError(BlockpruneError, ValueError):
    """What was asked for cannot be measured, such as a batch of no samples."""


class MissingExtraError(BlockpruneError, ImportError):
    """An optional dependency is not installed."""


class ApproximationWarning(UserWarning):
    """What goes is more than branches multiplied by zero."""


class TrainingDivergedError(BlockpruneError, RuntimeError):
    """The loss stopped being a finite number."""


def close_names(asked: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `` Did you mean a, b?`` for names close to ``asked``, or an empty string."""
    matches = difflib.get_close_matches(asked, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise `MemoryError` where `error`, or what led to it, says that memory ran out.

    To be called wherever an exception is read as "this cannot be done": what does not fit into
    memory says nothing about a model. torch has a class for it on accelerators only.

    Example:
        >>> from blockprune.errors import raise_if_out_of_memory
        >>> raise_if_out_of_memory(ValueError("no such size"))
        >>> raise_if_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        Traceback (most recent call last):
        MemoryError: DefaultCPUAllocator: can't allocate memory
    """
    cause: BaseException | None = error
    while cause is not None:
        if _is_out_of_memory(cause):
            if cause is error and isinstance(error, MemoryError):
                raise error
            raise MemoryError(str(cause)) from error
        cause = cause.__cause__


@contextmanager
def memory_errors() -> Iterator[None]:
    """Let lack of memory leave a block as `MemoryError`, whatever class it was raised as."""
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
