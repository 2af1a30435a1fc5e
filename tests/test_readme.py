"""README and docs are true: Python runs and prints what comments say, console blocks repeat."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from blockprune.cli import main
from blockprune.cli.app import app
from blockprune.criteria import CRITERIA
from blockprune.data import DATASETS
from blockprune.sparsity import IMPORTANCES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if "_build" not in path.parts
}
PROMISE = re.compile(r"^ *print\(.*\)  # (?P<output>.*)$", re.MULTILINE)
FENCE = re.compile(
    r"(?:^<!-- needs (?P<needs>[\w ]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code, and the packages that it cannot run without."""

    code: str
    needs: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        return all(importlib.util.find_spec(name) for name in self.needs)


def _blocks(language: str, page: str = README) -> list[Block]:
    return [
        Block(found["code"], tuple((found["needs"] or "").split()))
        for found in FENCE.finditer(page)
        if found["language"] == language
    ]


# What torch.onnx.export warns of lies in torch and onnxscript.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_python_blocks_print_what_they_promise(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page}
    blocks = [block for block in _blocks("python", PAGES[page]) if block.can_run]
    assert len(blocks) >= (3 if page == "README.md" else 1)
    for block in blocks:
        exec(compile(block.code, page, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        assert printed == [match["output"] for match in PROMISE.finditer(block.code)]


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```console" in text])
def test_console_block_is_what_the_command_prints(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for block in _blocks("console", PAGES[page]):
        command, _, expected = block.code.partition("\n")
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
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page])
    assert targets or page != "README.md"
    assert [target for target in targets if not (folder / target).exists()] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [("criteria", CRITERIA), ("experiments", IMPORTANCES), ("cli", DATASETS)],
)
def test_every_name_is_explained(page: str, names: dict[str, object]) -> None:
    text = PAGES[f"docs/{page}.md"]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_command_and_option_is_explained() -> None:
    def options(command: Any) -> set[str]:
        own = {name for option in command.params for name in option.opts if name.startswith("-")}
        return own.union(*(options(sub) for sub in getattr(command, "commands", {}).values()))

    group = typer.main.get_command(app)
    text = PAGES["docs/cli.md"]
    missing = [name for name in sorted(options(group)) if f"`{name}" not in text]
    assert missing == []
    assert [name for name in group.commands if f"## {name}" not in text] == []


def test_pictures_are_as_drawn() -> None:
    drawn = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["PICTURES"]
    folder = DOCS / "pictures"
    assert {name: draw() for name, draw in drawn.items()} == {
        path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")
    }
