"""README and docs are true: Python runs and prints what comments say, console blocks repeat."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from blockprune.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.name: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
PROMISE = re.compile(r"^print\(.*\)  # (?P<output>.*)$", re.MULTILINE)


def _blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_python_blocks_print_what_they_promise(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page}
    blocks = _blocks("python", PAGES[page])
    assert len(blocks) >= (3 if page == "README.md" else 1)
    for block in blocks:
        exec(compile(block, page, "exec"), names)
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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    root = ROOT if page == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page])
    assert targets or page != "README.md"
    assert [target for target in targets if not (root / target).exists()] == []
