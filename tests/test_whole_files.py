"""Files that appear whole or not at all, with the permissions of any other file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockprune.errors import BlockpruneError, MaskError
from blockprune.whole_files import flush, new_folder, whole_file, write_whole


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_one_that_is_there_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    write_whole(file, "one")
    write_whole(str(file), "two \N{SNOWMAN}\n")
    assert file.read_bytes() == "two \N{SNOWMAN}\n".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_it_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as file:
        file.write_text("half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "half"


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = tmp_path / "results.json"
    write_whole(file, "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"open": "pathlib.Path.open"}.get(call, f"os.{call}"), full)
        with pytest.raises(MaskError, match=r"results\.json cannot be written: .*No space left"):
            write_whole(file, "new", MaskError)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, BlockpruneError, ZeroDivisionError])
def test_what_the_block_raises_goes_on_and_leaves_nothing(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    with pytest.raises(kind, match="mine"), whole_file(tmp_path / "a", MaskError) as file:
        file.write_text("half")
        raise kind("mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a", "absent does not exist"),
        ("a\0b", "null byte"),
        ("x" * 300, "too long"),
        ("folder", "cannot be written"),
    ],
    ids=ascii,
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BlockpruneError, match=message):
        write_whole(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    write_whole(tmp_path / "a", "text")
    assert mode_of(tmp_path / "a") == 0o666 & ~umask
    assert mode_of(new_folder(tmp_path / "b")) == 0o777 & ~umask


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a").symlink_to("precious")
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "precious").read_text() == "kept"
    assert not (tmp_path / "a").is_symlink()


def test_flush_tells_of_what_is_not_there(tmp_path: Path) -> None:
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")
