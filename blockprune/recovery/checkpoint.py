"""The file that an interrupted distillation goes on from."""

from __future__ import annotations

import hashlib
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

__all__ = ["Checkpoint", "code_of", "key_of"]

_FILES: Final = TensorFiles("checkpoint", "recover", "blockprune-distillation-1", CheckpointError)
_SECONDS: Final = 120.0
"""Between two checkpoints at the most, and a step."""


class _Header(BaseModel):
    keys: dict[str, str]
    done: int


class Checkpoint:
    """One file, replaced at once by each later one.

    Args:
        path: of the file.
        keys: what the training depends on, by name; see `key_of`.
    """

    def __init__(self, path: str | os.PathLike[str], keys: Mapping[str, str]) -> None:
        self._path, self._keys = path, dict(keys)
        self._saved_at = time.monotonic()

    def resume(self, model: nn.Module, optimiser: Optimiser) -> int:
        """Put what the file holds into both, and return how many steps were done; 0 without a file.

        Raises:
            CheckpointError: the file is damaged, or of another training.
        """
        if not os.path.exists(self._path):
            return 0
        header, tensors = _FILES.read(self._path, _Header)
        others = [name for name, key in self._keys.items() if header.keys.get(name) != key]
        if others:
            raise CheckpointError(
                f"{self._path} is of a distillation with another {', another '.join(others)}. Name "
                "another file, or remove this one; data that are shuffled need the same seed."
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
        _FILES.write(self._path, tensors, {"keys": self._keys, "done": done})
        self._saved_at = time.monotonic()


def key_of(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of what JSON can hold, and of every bit of some tensors."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return digest_of(described, on_cpu)


def code_of(function: Any) -> str | None:
    """Return what tells a function from another one: its name and a hash of its code.

    Values that it closes over are not part of that.
    """
    if function is None:
        return None
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if code is None:
        return str(name)
    text = repr((code.co_code, code.co_names, [str(constant) for constant in code.co_consts]))
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()}"
