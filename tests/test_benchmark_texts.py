"""Pages of manuals give their prose, and a section for each result of a language model."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


PAGE = """<html><head><title>A page</title><style>p {}</style></head><body>
<nav>Next</nav><div role="main"><h1>Cats&amp;dogs<a>¶</a></h1><p>They are <b>not</b>
alike.<br>Not at all.</p><pre>code()</pre><div><p>Both bark.</p></div></div><p>Footer</p></body>"""


def test_prose_is_the_main_part_without_code(tmp_path: Path) -> None:
    texts = importlib.import_module("_recovery.texts")
    (tmp_path / "b.html").write_text(PAGE)
    (tmp_path / "a.html").write_text(PAGE.replace("Both bark.", ""))
    found = texts.documents(tmp_path, characters=46)
    assert found == ["Cats&dogs\nThey are not alike. Not at all.\nBoth bark."]
    with pytest.raises(SystemExit, match="no page"):
        texts.documents(tmp_path)


def test_sentences_are_of_a_length_and_no_two_alike() -> None:
    texts = importlib.import_module("_recovery.texts")
    long = "This is a sentence of more than eight words."
    assert texts.sentences([f"{long} Short. {long}", f"{long[:-1]}!"]) == [long, f"{long[:-1]}!"]


def test_the_section_of_a_language_model() -> None:
    section = importlib.import_module("document").SECTIONS["recovery_smollm2"]
    losses = {"nothing": 4.0, "refit": 3.4, "map": 3.6}
    methods = {name: {"value": value, "seconds": 1.0} for name, value in losses.items()}
    result = {
        "layers": 30,
        "fitted_to_tokens": 8,
        "tested_on_tokens": 8,
        "dense": 3.0,
        "tickets": {"6": {"removed": [], "methods": methods}},
    }
    text = "\n".join(section(result))
    assert f"| 6 | refit | {math.exp(3.4):.1f} | 60 % |" in text
    assert "| closed by refit, six removed | 0.600 | 0.4 to 1.0 | met |" in text
    methods["refit"]["value"] = 3.7
    assert "\n".join(section(result)).count("MISSED") == 2


def test_the_section_of_a_sentence_encoder() -> None:
    section = importlib.import_module("document").SECTIONS["recovery_minilm"]
    methods = {
        name: {"value": {"cosine": value, "spearman": value}, "seconds": 1.0}
        for name, value in {"nothing": 0.5, "refit": 0.75}.items()
    }
    result = {"fitted_to": 8, "tested_on": 8, "tickets": {"1 layers": {"methods": methods}}}
    text = "\n".join(section(result))
    assert text.count("| 1 layers | 0.500 | 0.750 |") == 2
    assert "| least lead of refit over another | 0.250 | 0 to 1 | met |" in text
