"""Prose of manuals, which language models are fitted to and tested on."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["documents", "sentences"]

_SKIPPED = {"script", "style", "nav", "pre", "table"}
_OPEN = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
"""Tags that are never closed."""


class _Prose(HTMLParser):
    """Collects the text of a page's main part, a line a paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = 0
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skipped += 1
        if tag not in _OPEN and (self._depth or ("role", "main") in attrs):
            self._depth += 1
        if tag in {"p", "li", "dt", "dd", "h1", "h2", "h3"}:
            self.parts.append("\n")
        elif tag == "br":
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skipped -= 1
        if self._depth and tag not in _OPEN:
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth and not self._skipped:
            self.parts.append(data.replace("\n", " ").replace("¶", ""))


def documents(folder: Path, characters: int = 4000) -> list[str]:
    """Return the prose of each page below a folder that has so many characters or more."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        page = _Prose()
        page.feed(path.read_text(errors="replace"))
        lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(page.parts).split("\n"))
        text = "\n".join(line for line in lines if line)
        if len(text) >= characters:
            found.append(text)
    if not found:
        raise SystemExit(f"{folder} holds no page with {characters} characters of prose")
    return found


def sentences(texts: list[str]) -> list[str]:
    """Return the sentences of 8 to 40 words, each once, in order."""
    found = (s.strip() for text in texts for s in re.split(r"(?<=[.!?])\s+", text))
    return list(dict.fromkeys(s for s in found if 8 <= len(s.split()) <= 40))
