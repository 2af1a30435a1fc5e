"""The README is true: its Python runs, prints what its comments say, its console block repeats."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from blockprune.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
PROMISE = re.compile(r"^print\(.*\)  # (?P<output>.*)$", re.MULTILINE)


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_print_what_they_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = _blocks("python")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        assert printed == [match["output"] for match in PROMISE.finditer(block)]


def test_console_block_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for block in _blocks("console"):
        command, _, expected = block.partition("\n")
        monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed = capsys.readouterr().out
        assert [line.rstrip() for line in printed.splitlines()] == expected.splitlines()


def test_a_result_comes_within_thirty_lines() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert PROMISE.search(first)
    assert "pip install . && blockprune demo" in first
    assert "pip install -e '.[test]' && pytest" in first


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (root / target).exists()] == []
