"""What works here: real parts tried for real, and parts that are absent or broken told apart."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
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


# --- each part tried for real, and one of each kind that does its work wrongly --------------------

EXTRAS = tuple(part for part in doctor._PARTS if part.module and not part.is_core)


@pytest.mark.parametrize("part", EXTRAS, ids=[part.name for part in EXTRAS])
def test_an_extra_that_is_installed_works(
    part: doctor._Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_parts(monkeypatch, part)
    [finding] = doctor.examine()
    if finding.state == "absent":
        assert finding.detail.startswith("pip install ")
        pytest.skip("not installed")
    assert (finding.state, finding.version) == ("works", doctor._version(part.name)), finding
    assert finding.detail


def wrong_torch() -> Any:
    return SimpleNamespace(ones=lambda *_, **__: torch.full((2, 2), 2.0, requires_grad=True))


def wrong_torchvision() -> Any:
    return SimpleNamespace(ops=SimpleNamespace(nms=lambda *_: torch.tensor([0])))


def wrong_workers() -> Any:
    distributed = MagicMock()
    client = distributed.Client.return_value.__enter__.return_value
    client.submit.return_value.result.return_value = 4
    return distributed


def wrong_onnxruntime() -> Any:
    session = MagicMock()
    session.InferenceSession.return_value.run.return_value = [np.array([-1.0, 2.0])]
    return session


@pytest.mark.parametrize(
    ("name", "module", "what"),
    [
        ("torch", wrong_torch, "a gradient is wrong"),
        ("torchvision", wrong_torchvision, "kept the wrong box"),
        ("torch-pruning", MagicMock, "a column is left where its row went"),
        ("distributed", wrong_workers, "a worker adds wrongly"),
        ("onnxruntime", wrong_onnxruntime, "a ReLU is wrong"),
    ],
)
def test_a_part_that_imports_and_computes_wrongly_is_broken(
    name: str, module: Callable[[], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "onnxruntime":
        pytest.importorskip("onnx")
    [part] = [part for part in doctor._PARTS if part.name == name]
    monkeypatch.setattr(doctor, "_imported", lambda _: module())
    with_parts(monkeypatch, part)
    [finding] = doctor.examine()
    assert (finding.state, what in finding.detail) == ("broken", True), finding


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((("CPU", True), ("RAM", False)), "CPU measured, RAM estimated"),
        ((), "no part of this machine"),
    ],
)
def test_the_meter_of_energy_says_which_parts_it_measures(
    parts: tuple[tuple[str, bool], ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import blockprune.profiling

    found = [SimpleNamespace(name=name, measured=measured) for name, measured in parts]
    monkeypatch.setattr(
        blockprune.profiling, "metered_energy", lambda function: SimpleNamespace(parts=found)
    )
    monkeypatch.setattr(doctor, "_imported", lambda part: None)
    with_parts(monkeypatch, *(part for part in EXTRAS if part.name == "codecarbon"))
    [finding] = doctor.examine()
    assert finding.state == "works"
    assert finding.detail == f"energy was metered offline: {told}"


@pytest.mark.parametrize(("built", "told"), [("12.4", "with CUDA 12.4"), (None, "without")])
def test_no_gpu_is_absent_and_says_what_torch_was_built_with(
    built: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with_parts(monkeypatch, *(part for part in doctor._PARTS if part.name == "CUDA"))
    [finding] = doctor.examine()
    assert (finding.state, finding.version) == ("absent", None)
    assert finding.detail == f"no device; torch was built {told}"


def test_a_browser_is_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_parts(monkeypatch, *(part for part in doctor._PARTS if part.name == "Chromium"))
    monkeypatch.setenv("PATH", str(tmp_path))
    [finding] = doctor.examine()
    assert (finding.state, "no Chromium" in finding.detail) == ("absent", True)
    browser = tmp_path / "chromium"
    browser.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Chromium 120.0\n')
    browser.chmod(0o755)
    [finding] = doctor.examine()
    assert finding.state == "works"
    assert finding.detail == "Chromium 120.0; for tests of the report page"
    browser.write_text("#!/bin/sh\nexit 3\n")
    [finding] = doctor.examine()
    assert (finding.state, "exit status 3" in finding.detail) == ("broken", True)


def test_versions_are_told_where_torch_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.versions()
    assert found["CUDA"] == "torch does not import: ModuleNotFoundError"
    assert "threads" not in found
    assert found["torch"] == doctor.metadata.version("torch")


def test_requirements_that_nobody_can_read_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["numpy (>=1, oh)", "torch>=2"])
    assert [str(found) for found in doctor._requirements("some-package")] == ["torch>=2"]

    def absent(name: str) -> None:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    assert not {"numpy", "torch"} & doctor.versions().keys()
