"""Files of tensors and of JSON that says what they are; no pickle, so they can never run code.

A file is safetensors. Its header has the JSON, and a digest of that and of every tensor: a flipped
bit is found as surely as a missing half.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockprune.errors import BlockpruneError, raise_if_out_of_memory
from blockprune.whole_files import whole_file

__all__ = ["TensorFiles", "digest_of"]

_KEY: Final = "blockprune"

_HeaderT = TypeVar("_HeaderT", bound=BaseModel)


class _Kind(BaseModel):
    """What every version of every header has."""

    format: str


@dataclass(frozen=True)
class TensorFiles:
    """One kind of file.

    Attributes:
        what: messages call it so.
        writer: what writes such files, for messages.
        format: name and version; a file of another one is refused.
        error: the class of what is raised.

    Example:
        >>> import tempfile, torch
        >>> from pydantic import BaseModel
        >>> from blockprune.errors import BlockpruneError
        >>> from blockprune.tensor_files import TensorFiles
        >>> class Header(BaseModel):
        ...     step: int
        >>> files = TensorFiles("state", "save", "state-1", BlockpruneError)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files.write(f"{folder}/a", {"w": torch.ones(2)}, {"step": 3})
        ...     files.read(f"{folder}/a", Header)
        (Header(step=3), {'w': tensor([1., 1.])})
    """

    what: str
    writer: str
    format: str
    error: type[BlockpruneError]

    def write(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
    ) -> None:
        """Write one file, which appears whole or not at all; equal contents, equal files.

        Args:
            path: of the file; one that is there is replaced at once.
            tensors: by name, on any device and in any layout; several may share memory.
            header: what JSON can hold; its own ``format`` and ``digest`` are added.

        Raises:
            BlockpruneError: the folder does not exist, the disk is full, or a tensor is of a kind
                that safetensors cannot hold; of the class `error`.
        """
        described = {"format": self.format, **header}
        try:
            own = {name: _stored(tensor) for name, tensor in tensors.items()}
            with whole_file(path, self.error) as new:
                text = json.dumps({**described, "digest": digest_of(described, own)})
                # One entry: several would be in another order each time.
                save_file(own, new, metadata={_KEY: text})
        # A full disk is a SafetensorError where safetensors meets it.
        except (SafetensorError, KeyError, RuntimeError) as problem:
            raise_if_out_of_memory(problem)
            raise self.error(f"{path} cannot be written: {problem}") from problem

    def read(
        self, path: str | os.PathLike[str], header: type[_HeaderT]
    ) -> tuple[_HeaderT, dict[str, Tensor]]:
        """Return what a file holds, every bit of it checked; the tensors are on the CPU.

        Args:
            path: of the file.
            header: the model that its header must fit, without ``format``.

        Raises:
            BlockpruneError: the file is absent, cut short, damaged, or of another kind; of the
                class `error`.
        """
        if not os.path.isfile(path):
            raise self.error(f"there is no {self.what} file {path}")
        text, tensors = self._contents(Path(path))
        if text is None:
            raise self.error(
                f"{path} is a safetensors file, but no {self.what}: {self.writer} writes those."
            )
        found = self._parsed(path, text, header)
        if not _digest_fits(text, tensors):
            raise self.error(f"{path} is damaged: its contents do not match their digest.")
        return found, tensors

    def _contents(self, path: Path) -> tuple[str | None, dict[str, Tensor]]:
        try:
            with safe_open(path, framework="pt") as file:
                # Copies, since what safetensors returns may still be the file itself.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return (file.metadata() or {}).get(_KEY), tensors
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as problem:
            raise_if_out_of_memory(problem)
            raise self.error(f"{path} is not a readable safetensors file: {problem}") from problem

    def _parsed(self, path: str | os.PathLike[str], text: str, header: type[_HeaderT]) -> _HeaderT:
        try:
            found = _Kind.model_validate_json(text).format
            if found != self.format:
                raise self.error(
                    f"{path} has the {self.what} format {found[:40]!r}; this version reads "
                    f"{self.format!r}."
                )
            return header.model_validate_json(text)
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))[:80]
            raise self.error(
                f"{path} does not hold a valid {self.what} header: "
                f"{f'{place}: ' if place else ''}{first['msg']}"
            ) from problem


def _digest_fits(text: str, tensors: Mapping[str, Tensor]) -> bool:
    try:
        header = json.loads(text)
        return bool(header.pop("digest", None) == digest_of(header, tensors))
    # A number of thousands of digits, or lists within lists without end.
    except (ValueError, RecursionError):
        return False


def _stored(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor in memory that no other tensor shares."""
    return tensor.detach().cpu().contiguous().clone()


def digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a header, and of name, shape, type and every bit of tensors on the CPU."""
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name!r} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
