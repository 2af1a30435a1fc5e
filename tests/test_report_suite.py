"""Reports of several runs in one folder, and the page that leads to them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockprune.cli import main
from blockprune.lottery.record import RunRecord
from blockprune.report import index_html, page_html, runs_in
from tests.browser import CHROMIUM, Browser
from tests.fake_run import fake_run
from tests.fake_weights import weights_run

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def records() -> dict[str, RunRecord]:
    return {"lenet": weights_run(), "resnet #20": fake_run((0, 1))}


@pytest.fixture
def suite(tmp_path: Path, records: dict[str, RunRecord]) -> Path:
    folder = tmp_path / "digits-ltr"
    for name, record in records.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(record.to_json(), encoding="utf-8")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `blockprune report`; return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockprune", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def links(index: Path) -> list[Path]:
    found = re.findall(r'<a href="([^"]+)"', index.read_text("utf-8"))
    return [index.parent / link.replace("%20", " ").replace("%23", "#") for link in found]


class TestRunsIn:
    def test_they_are_the_folders_with_results(self, suite: Path) -> None:
        assert [folder.name for folder in runs_in(suite)] == ["lenet", "resnet #20"]

    def test_a_run_is_no_folder_of_runs(self, suite: Path) -> None:
        run = suite / "lenet"
        (run / "report").mkdir()
        (run / "report" / "results.json").write_text("{}")
        assert runs_in(run) == ()
        assert runs_in(run / "results.json") == ()
        # Its report holds a copy, which is no run of its own.
        (run / "results.json").unlink()
        assert runs_in(run) == ()

    @pytest.mark.parametrize("name", ["absent", "nu\0ll"])
    def test_nothing_is_there(self, tmp_path: Path, name: str) -> None:
        assert runs_in(tmp_path / name) == ()


class TestCommand:
    def test_each_run_has_its_report_and_one_page_leads_to_them(
        self, cli: Cli, suite: Path, records: dict[str, RunRecord]
    ) -> None:
        code, out, err = cli(suite)
        assert (code, err) == (0, "")
        assert "2 runs" in out
        for name, record in records.items():
            page = suite / name / "report" / "report.html"
            assert page.read_text("utf-8") == page_html(record)
        index = suite / "report" / "index.html"
        assert [file.name for file in index.parent.iterdir()] == ["index.html"]
        found = links(index)
        assert all(link.is_file() for link in found)
        assert len([link for link in found if link.name == "networks.csv"]) == 2
        assert len([link for link in found if link.name == "masks.csv"]) == 1
        assert cli(suite)[0] == 0

    def test_it_goes_where_it_is_told(self, cli: Cli, suite: Path, tmp_path: Path) -> None:
        other = tmp_path / "out"
        assert cli(suite, "--out", other)[0] == 0
        assert sorted(file.name for file in other.iterdir()) == [
            "index.html",
            "lenet",
            "resnet #20",
        ]
        assert all(link.is_file() for link in links(other / "index.html"))
        assert not (suite / "report").exists()
        code, _, err = cli(suite, "--out", other)
        assert code == 1
        assert "is not empty. Use --force" in err
        assert cli(suite, "--out", other, "--force")[0] == 0

    def test_one_that_is_no_run_stops_all_before_anything_is_written(
        self, cli: Cli, suite: Path
    ) -> None:
        (suite / "resnet #20" / "results.json").write_text("[]")
        code, out, err = cli(suite)
        assert (code, out) == (1, "")
        assert "it holds a list" in err
        assert not [*suite.rglob("report")]

    def test_a_page_that_cannot_be_written(self, cli: Cli, suite: Path) -> None:
        in_the_way = suite / "report" / "index.html"
        in_the_way.mkdir(parents=True)
        code, out, err = cli(suite)
        assert code == 1
        assert err.startswith(f"error: {in_the_way} is a folder, ")
        assert "; open " not in out
        assert [*(suite / "report").iterdir()] == [in_the_way]


def test_names_are_text(records: dict[str, RunRecord]) -> None:
    evil = '"><script>x</script>'
    record = records["lenet"].model_copy(update={"name": evil, "spec": {"model": evil}})
    page = index_html(evil, {evil: record})
    assert "<script" not in page
    assert f"{len(record.networks)} networks trained" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium")
def test_it_opens_in_a_browser(tmp_path: Path, records: dict[str, RunRecord]) -> None:
    page = tmp_path / "index.html"
    page.write_text(index_html("digits-ltr", records), encoding="utf-8")
    with Browser.open(tmp_path / "profile") as browser:
        browser.show(page, 390)
        assert browser.problems == []
        assert browser.ask("document.documentElement.scrollWidth") <= 390
