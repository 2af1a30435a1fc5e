"""The file that an interrupted distillation goes on from."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from torch import Tensor, nn

from blockprune.errors import CheckpointError
from blockprune.recovery.folding import tensors_of, write_into
from blockprune.recovery.optimiser import Optimiser
from blockprune.tensor_files import TensorFiles, digest_of

__all__ = ["Checkpoint", "key_of"]

_FILES: Final = TensorFiles("checkpoint", "recover", "blockprune-distillation-1", CheckpointError)
_SECONDS: Final = 120.0
"""Between two checkpoints at the most, and a step."""


class _Header(BaseModel):
    key: str
    done: int


class Checkpoint:
    """One file, replaced at once by each later one.

    Args:
        path: of the file.
        key: of everything that the training depends on; see `key_of`.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self._path, self._key = path, key
        self._saved_at = time.monotonic()

    def resume(self, model: nn.Module, optimiser: Optimiser) -> int:
        """Put what the file holds into both, and return how many steps were done; 0 without a file.

        Raises:
            CheckpointError: the file is damaged, or of another training.
        """
        if not os.path.exists(self._path):
            return 0
        header, tensors = _FILES.read(self._path, _Header)
        if header.key != self._key:
            raise CheckpointError(
                f"{self._path} is of a distillation with another ticket, dense model, recipe, "
                "precision or data. Name another file, or remove this one."
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimiser": {}}
        for entry, tensor in tensors.items():
            part, _, name = entry.partition("/")
            parts[part][name] = tensor
        write_into(tensors_of(model), parts["model"])
        optimiser.load(parts["optimiser"])
        return header.done

    def save(self, model: nn.Module, optimiser: Optimiser, done: int, *, at_once: bool) -> None:
        """Write the state after `done` steps, if it is asked for `at_once` or time for it."""
        if not at_once and time.monotonic() - self._saved_at < _SECONDS:
            return
        tensors = {f"model/{name}": tensor for name, tensor in tensors_of(model).items()}
        tensors |= {f"optimiser/{name}": tensor for name, tensor in optimiser.state().items()}
        _FILES.write(self._path, tensors, {"key": self._key, "done": done})
        self._saved_at = time.monotonic()


def key_of(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of what JSON can hold, and of every bit of some tensors."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return digest_of(described, on_cpu)
