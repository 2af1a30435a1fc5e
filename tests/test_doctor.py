"""What works here: real parts tried for real, and parts that are absent or broken told apart."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import blockprune.doctor as doctor
from blockprune.cli import app
from blockprune.cli.app import Data
from blockprune.data import DATASETS

CORE = tuple(part for part in doctor._PARTS if part.is_core)


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    return result.exit_code, result.stdout


def with_parts(monkeypatch: pytest.MonkeyPatch, *parts: doctor._Part) -> None:
    monkeypatch.setattr(doctor, "_PARTS", parts)


def broken(_: Any) -> str:
    raise RuntimeError("cannot open /home/somebody/secret/lib.so: no such file\nmore")


def test_the_core_works_where_the_tests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, *CORE)
    found = doctor.examine()
    assert [finding.part for finding in found] == [part.name for part in CORE]
    assert {finding.state for finding in found} == {"works"}, found


def test_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    part = doctor._Part("timm", "no_such_module_anywhere", str)
    with_parts(monkeypatch, part)
    [finding] = doctor.examine()
    assert (finding.state, finding.detail) == ("absent", "pip install 'blockprune[zoo]'")


def test_broken_is_told_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    with_parts(monkeypatch, doctor._Part("thing", None, broken))
    [finding] = doctor.examine()
    assert finding.state == "broken"
    assert finding.detail == "RuntimeError: cannot open .../lib.so: no such file"


def test_a_package_that_lacks_its_own_is_broken_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with_parts(monkeypatch, doctor._Part("half", "half_there", str))
    [finding] = doctor.examine()
    assert (finding.state, "no_such_module_anywhere" in finding.detail) == ("broken", True)


def test_a_torchvision_for_another_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = doctor.Requirement("torch==1.0")
    monkeypatch.setattr(doctor, "_requirements", lambda package: [asked])
    with_parts(monkeypatch, *(part for part in CORE if part.name == "torchvision"))
    [finding] = doctor.examine()
    assert finding.state == "broken"
    assert "torchvision needs torch==1.0, found" in finding.detail


@pytest.mark.parametrize("is_core", [True, False])
def test_only_the_core_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, is_core: bool
) -> None:
    with_parts(monkeypatch, doctor._Part("thing", None, broken, is_core=is_core))
    code, out = command("doctor")
    assert code == int(is_core)
    assert ("The core works." in out) is not is_core
    assert max(map(len, out.splitlines())) <= 80
    code, out = command("doctor", "--json")
    assert code == int(is_core)
    found = json.loads(out)
    assert found["core_works"] is not is_core
    assert found["parts"][0]["state"] == "broken"


def test_versions_say_what_matters_and_nothing_private() -> None:
    code, out = command("--version", "--verbose")
    assert code == 0
    found = dict(line.split("  ", 1) for line in out.splitlines())
    import torch

    assert found["torch"].strip() in torch.__version__
    assert platform.python_version() in found["Python"]
    assert {"numpy", "torchvision", "CUDA", "threads", "system"} <= set(found)
    for private in (platform.node(), str(Path.home()), os.getcwd(), sys.prefix):
        assert private not in out
    assert getpass.getuser() not in out.split()


def test_version_alone_is_one_line_and_verbose_goes_with_it() -> None:
    code, out = command("--version")
    assert (code, len(out.splitlines())) == (0, 1)
    assert command("--verbose")[0] == 2
    assert command("--verbose", "criteria")[0] == 2


def test_every_data_set_can_be_scored_on() -> None:
    assert [data.value for data in Data] == ["random", *DATASETS]
