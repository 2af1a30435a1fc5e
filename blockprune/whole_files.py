"""Files that appear whole or not at all, whatever stops their writing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blockprune.errors import BlockpruneError

__all__ = ["UNFINISHED", "flush", "new_folder", "whole_file", "write_whole"]

UNFINISHED: Final = ".new-"
"""What the name of a file or folder begins with until it is whole."""


@contextmanager
def whole_file(
    path: str | os.PathLike[str], error: type[BlockpruneError] = BlockpruneError
) -> Iterator[Path]:
    """Give the path of an empty file to fill; it becomes ``path`` when the block ends well.

    A file that is there already is replaced at once. When the block ends with an exception, Ctrl-C
    included, all is as it was before.

    Args:
        path: of the file.
        error: the class of what is raised.

    Raises:
        BlockpruneError: the folder does not exist, cannot be written to, or is full; of the class
            `error`.

    Example:
        >>> import pathlib, tempfile
        >>> from blockprune.whole_files import whole_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(f"{folder}/a.txt") as file:
        ...         _ = file.write_text("whole")
        ...     pathlib.Path(folder, "a.txt").read_text()
        'whole'
    """
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise error(f"{target} cannot be written: the folder {target.parent} does not exist.")
    # Beside it: a move within one folder never crosses file systems. Not named after it: a name as
    # long as names can be has no room for more.
    new = target.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
    try:
        # With the permissions that any new file has here, and never through a link.
        new.open("xb").close()
        yield new
        flush(new)
        os.replace(new, target)
    except BlockpruneError:
        raise
    # A null byte in the name is a ValueError.
    except (OSError, ValueError) as problem:
        raise error(f"{target} cannot be written: {problem}") from problem
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def write_whole(
    path: str | os.PathLike[str], text: str, error: type[BlockpruneError] = BlockpruneError
) -> None:
    """Write a text file in one step: at any time it is the old one or the new one, never a part.

    Raises:
        BlockpruneError: it cannot be written; of the class `error`.

    Example:
        ``write_whole("results.json", result.to_json())``
    """
    with whole_file(path, error) as file:
        file.write_text(text, encoding="utf-8", newline="\n")


def new_folder(place: Path) -> Path:
    """Make an empty folder beside ``place``, to take its name when it is whole.

    It has the permissions of any other folder.
    """
    new = place.parent / f"{UNFINISHED}{place.name}-{secrets.token_hex(4)}"
    new.mkdir()
    return new


def flush(path: Path) -> None:
    """Bring what a file or a folder holds to the disk.

    Without this a power cut may keep a new name and lose what it names.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
