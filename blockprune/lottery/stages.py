"""The stages of a run, each in a directory named by all that decides what is in it.

A stage is a kind of work and its inputs, plain values. Its key is a digest of both and of the
version of this package, so an output that is there is the right one, whoever made it and when, and
a change of any input asks for another directory. An output appears whole, by one rename, with a
manifest of digests; one that was damaged later is found by them and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from blockprune.errors import BlockpruneError
from blockprune.whole_files import UNFINISHED, flush, new_folder

__all__ = ["Output", "RunError", "Stage", "StageStore"]

_FORMAT: Final = "blockprune-stage-1"
_MANIFEST: Final = "manifest.json"
_OUTPUT: Final = "output.json"
_TIMES: Final = "times.json"
_SHOWN_DIGITS: Final = 16


class RunError(BlockpruneError, RuntimeError):
    """A run cannot start, or cannot be written down."""


class _Damage(Exception):
    """An output is not what its stage left; the message says what has changed."""


# What reading a damaged output can end in; JSON nested too deeply is a RecursionError.
_DAMAGES: Final = (
    _Damage,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True)
class Stage:
    """One piece of work of a run.

    Attributes:
        kind: of the work, a name of `blockprune.lottery.work.WORK`.
        inputs: all that decides its output, as values that JSON has.

    Example:
        >>> from blockprune.lottery.stages import Stage
        >>> one, other = Stage("score", {"seed": 0}), Stage("score", {"seed": 1})
        >>> one.key == Stage("score", {"seed": 0}).key, one.key == other.key
        (True, False)
    """

    kind: str
    inputs: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """The digest of kind, inputs and version of the package."""
        decides = {"kind": self.kind, "inputs": self.inputs, "version": version("blockprune")}
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """The name of its directory."""
        return f"{self.kind}-{self.key[:_SHOWN_DIGITS]}"


@dataclass(frozen=True)
class Output:
    """What a stage left.

    Attributes:
        folder: its directory, with the tensors it kept.
        found: its result; equal stages have equal results.
        times: what its clock said, which no two runs agree in.
        notes: what a reader of the result must know.
    """

    folder: Path
    found: dict[str, Any]
    times: dict[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """Return the output that was written to a directory."""
        told = json.loads((folder / _OUTPUT).read_text(encoding="utf-8"))
        times = json.loads((folder / _TIMES).read_text(encoding="utf-8"))
        found, notes = told["found"], told["notes"]
        if not isinstance(found, dict) or not isinstance(times, dict) or not _are_texts(notes):
            raise _Damage(f"{_OUTPUT} or {_TIMES} is malformed")
        return cls(folder, found, times, tuple(notes))


class StageStore:
    """The stage directories of one run.

    Args:
        folder: that holds them; made where absent.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from blockprune.lottery.stages import Stage, StageStore
        >>> stage = Stage("score", {"seed": 0})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = StageStore(Path(folder))
        ...     before = store.find(stage)
        ...     store.write(stage, lambda place: ({"best": 1}, {"seconds": 0.5}, ()))
        ...     after = store.find(stage)
        >>> before is None, after.found
        (True, {'best': 1})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        # A name with a null byte is a ValueError.
        except (OSError, ValueError) as error:
            raise RunError(f"{folder} cannot be written to: {error}") from error

    def path(self, stage: Stage) -> Path:
        """Return the directory that holds the stage's output once it is there."""
        return self.folder / stage.folder

    def unfinished(self, stage: Stage) -> Path:
        """Return the directory that a stage may keep checkpoints in until it is done."""
        return self.folder / "unfinished" / stage.folder

    def find(self, stage: Stage, on_damage: Callable[[str], None] | None = None) -> Output | None:
        """Return the output of a stage, None where there is none.

        An output that is not what its manifest says is removed, and `on_damage` is told of it.
        """
        folder = self.path(stage)
        if not folder.is_dir():
            return None
        try:
            _check(folder, stage)
            return Output.in_folder(folder)
        except _DAMAGES as error:
            damage = (
                str(error) if isinstance(error, _Damage) else f"{type(error).__name__}: {error}"
            )
        if on_damage is not None:
            on_damage(f"{stage.folder} was damaged ({damage}), and was made again.")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunError(
                f"{folder} is damaged and cannot be removed: {error}. Remove it, or give another "
                "--out."
            ) from error
        return None

    def write(
        self,
        stage: Stage,
        make: Callable[[Path], tuple[Mapping[str, Any], Mapping[str, Any], tuple[str, ...]]],
    ) -> None:
        """Let `make` fill a directory, and put it in place whole, or not at all.

        Args:
            stage: whose output it is.
            make: given an empty directory, writes tensors to it and returns what the stage found,
                what its clock said, and notes.
        """
        new = new_folder(self.path(stage))
        try:
            found, times, notes = make(new)
            _write_json(new / _OUTPUT, {"found": found, "notes": list(notes)})
            _write_json(new / _TIMES, times)
            files = {file.name: _digest(file) for file in sorted(new.iterdir())}
            manifest = {
                "format": _FORMAT,
                "kind": stage.kind,
                "key": stage.key,
                "inputs": stage.inputs,
                "files": files,
            }
            _write_json(new / _MANIFEST, manifest)
            for path in (*new.iterdir(), new):
                flush(path)
            self._put(new, self.path(stage))
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(self.unfinished(stage), ignore_errors=True)

    def clear(self) -> None:
        """Remove what killed processes left half written."""
        for left in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs out of this store; the system lets go of it however a process ends.

        Raises:
            RunError: another run is at work here.
        """
        try:
            import fcntl
        except ImportError:  # No such locks on this system.
            yield
            return
        with ExitStack() as stack:
            try:
                # To append: whatever stands under this name in a folder from elsewhere, a link
                # too, keeps its content.
                file = stack.enter_context((self.folder / ".lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"Another run is at work in {self.folder.parent}: wait for it, or give another "
                    "--out."
                ) from error
            except OSError as error:
                raise RunError(f"{self.folder} cannot be written to: {error}") from error
            yield

    def _put(self, new: Path, place: Path) -> None:
        try:
            os.rename(new, place)
        except OSError:
            # Another worker has made the same: then its output stays.
            if not place.is_dir():
                raise
        flush(self.folder)


def _check(folder: Path, stage: Stage) -> None:
    """Raise one of `_DAMAGES` where an output is not what its manifest says."""
    # By name in the folder, whatever the manifest names: nothing outside it is read.
    there = {path.name: path for path in folder.iterdir()}
    for name, path in there.items():
        if path.is_symlink() or not path.is_file():
            raise _Damage(f"{name} is no plain file")
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != _FORMAT or manifest["key"] != stage.key:
        raise _Damage("its manifest is of another stage")
    for name in (_OUTPUT, _TIMES, *manifest["files"]):
        if name not in there:
            raise _Damage(f"{name} is missing")
        if _digest(there[name]) != manifest["files"][name]:
            raise _Damage(f"{name} has changed")


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
