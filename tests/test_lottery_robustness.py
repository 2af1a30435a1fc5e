"""Robustness as a part of runs and on the command line, against the same measured by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from blockprune import prune, save_ticket
from blockprune.cli import app
from blockprune.data import load_digits
from blockprune.errors import DataError, SpecError
from blockprune.lottery import RunRecord, Spec, run
from blockprune.lottery.state import load_state
from blockprune.lottery.work import WORK
from blockprune.report import read_run
from blockprune.robustness import RobustnessChoice, RobustnessResult, corrupt
from blockprune.robustness.choices import check_files
from tests.lottery_models import SPEC, Tiny, tiny

pytest.importorskip("art", reason="needs the extra: pip install blockprune[attacks]")

CHOICE: dict[str, Any] = {
    "corruptions": ["fog", "contrast"],
    "severities": [2, 5],
    "attacks": [{"name": "fgsm", "epsilons": [0.0, 0.1]}],
    "samples": 40,
}


def spec(**changes: Any) -> Spec:
    return Spec.parse({**SPEC, "seeds": 1, "controls": {"scratch": False}, **changes})


class WithoutGradient(Tiny):
    """A network that makes its pixels whole numbers, which has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach().round())


def tiny_without_gradient() -> WithoutGradient:
    torch.manual_seed(0)
    return WithoutGradient()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["robustness", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    folder = tmp_path_factory.mktemp("robust")
    return run(spec(robustness=CHOICE), folder), folder


def trained(record: RunRecord, folder: Path, kind: str) -> tuple[nn.Module, RobustnessResult]:
    """Return the dense network of a run with its weights, and what was measured of a case."""
    [network] = [one for one in record.networks if one.case.kind == kind]
    [found] = [one.result for one in record.robustness if one.case.kind == kind]
    model: nn.Module = tiny()
    load_state(folder / "stages" / network.stage / "final.safetensors").load_into(model)
    return model.eval(), found


class TestRuns:
    def test_every_network_is_measured(self, measured: tuple[RunRecord, Path]) -> None:
        record, _ = measured
        assert record.failures == {}
        assert [one.case.kind for one in record.robustness] == ["dense", "ticket", "random"]
        by_case = {network.case: network for network in record.networks}
        for one in record.robustness:
            assert one.result.clean.accuracy == by_case[one.case].accuracy
            assert one.result.attacked == 40
            assert (one.result.agreement is None) == (one.case.kind == "dense")
            assert (one.result.attacks[0].transferred is None) == (one.case.kind == "dense")
        assert RunRecord.from_json(record.to_json()) == record

    def test_a_corruption_by_hand(self, measured: tuple[RunRecord, Path]) -> None:
        record, folder = measured
        model, result = trained(record, folder, "dense")
        data = load_digits(test_share=0.8)
        batch = [data.test[place] for place in range(len(data.test))]  # type: ignore[arg-type]
        images = torch.stack([image for image, _ in batch])
        labels = torch.tensor([int(label) for _, label in batch])
        pixels = (images * data.deviation[0] + data.mean[0]).clamp(0, 1)
        # Digits have 17 grey levels: what comes back is what the file holds.
        assert torch.allclose(pixels * 16, (pixels * 16).round(), atol=1e-4)
        harder = corrupt(pixels, "contrast", 5, seed=0)
        with torch.no_grad():
            logits = model((harder - data.mean[0]) / data.deviation[0])
        accuracy = float((logits.argmax(1) == labels).double().mean())
        [found] = [c for c in result.corruptions if (c.name, c.severity) == ("contrast", 5)]
        assert found.accuracy == pytest.approx(accuracy, abs=2 / len(labels))

    def test_taken_up_without_training_anew(self, measured: tuple[RunRecord, Path]) -> None:
        record, folder = measured
        kinds: list[tuple[str, str]] = []
        more = {**CHOICE, "corruptions": ["fog"]}
        again = run(
            spec(robustness=more), folder, on_event=lambda e: kinds.append((e.kind, e.stage))
        )
        assert {kind for kind, stage in kinds if "train" in stage} == {"found"}
        assert ("done", "seed 0: robustness of dense") in kinds
        assert [one.result.clean for one in again.robustness] == [
            one.result.clean for one in record.robustness
        ]

    def test_controls_may_be_left_out(self, tmp_path: Path) -> None:
        alone = {"corruptions": "fog", "severities": [1], "controls": False}
        record = run(spec(robustness=alone), tmp_path)
        assert [one.case.kind for one in record.robustness] == ["dense", "ticket"]
        assert [one.case.kind for one in record.networks] == ["dense", "ticket", "random"]

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"corruptions": "fogg"}, "Did you mean fog"),
            ({"corruptions": ["fog", "fog"]}, "named twice"),
            ({"corruptions": "fog", "severities": [6]}, "less than or equal to 5"),
            ({"corruptions": "fog", "severities": []}, "severities is empty"),
            ({"attacks": "fgms"}, "attacks"),
            ({"attacks": ["fgsm", "fgsm"]}, "named twice"),
            ({"corruptions": "none", "corruption_files": "X"}, "no use without corruptions"),
            ({"sample": 3}, "robustness.sample is unknown. Did you mean samples"),
            (
                {"attacks": [{"name": "pgd", "restart": 3}]},
                "robustness.attacks.restart is unknown. Did you mean restarts",
            ),
        ],
    )
    def test_what_is_refused(self, choice: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as caught:
            spec(robustness=choice)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        "choice",
        [{"corruptions": "fog", "corruption_files": "CIFAR-10-C"}, {"shifts": {"mine": "there"}}],
    )
    def test_absent_files_are_found_first(self, tmp_path: Path, choice: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="--data-dir"):
            run(spec(robustness=choice), tmp_path / "run")
        with pytest.raises(DataError, match=r"CIFAR-10-C|there"):
            run(spec(robustness=choice), tmp_path / "run", data_dir=tmp_path)
        assert not (tmp_path / "run").exists()

    def test_every_severity_of_the_files_is_found_first(self, tmp_path: Path) -> None:
        for severity in ("1", "2", "3"):
            folder = tmp_path / "digits-c" / "fog" / severity / "0"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "a.png")
        check = {"corruptions": "fog", "corruption_files": "digits-c"}
        check_files(RobustnessChoice(**check, severities=(1, 3)), tmp_path, 8)
        # Were only the first looked at, all networks would be trained before the third is missed.
        (folder / "a.png").unlink()
        for absent in ((1, 3), (2, 4)):
            with pytest.raises(DataError, match=rf"fog.{absent[1]} has no labelled images"):
                run(
                    spec(robustness={**check, "severities": absent}),
                    tmp_path / "run",
                    data_dir=tmp_path,
                )
        assert not (tmp_path / "run").exists()

    def test_words_stand_for_lists(self) -> None:
        assert len(RobustnessChoice(corruptions="all").corruptions) == 19  # type: ignore[arg-type]
        assert RobustnessChoice().corruptions == RobustnessChoice(corruptions="common").corruptions  # type: ignore[arg-type]
        assert RobustnessChoice(corruptions="none").corruptions == ()  # type: ignore[arg-type]
        with pytest.raises(ValidationError):
            RobustnessChoice(samples=0)


class TestCommand:
    def test_of_a_run(self, tmp_path: Path) -> None:
        record = run(spec(), tmp_path)
        assert record.robustness == ()
        done = invoke(
            tmp_path, "--corruptions", "fog,contrast", "--severities", "3", "--data", "digits"
        )
        assert done.exit_code == 0, done.output
        found = read_run(tmp_path)
        assert [one.case.kind for one in found.robustness] == ["dense", "ticket", "random"]
        assert found.networks == record.networks
        for one in found.robustness:
            assert f"{100 * one.result.clean.accuracy:.2f}" in done.output
        wrong = invoke(tmp_path, "--data", "mnist")
        assert wrong.exit_code != 0
        assert "is a run on digits" in str(wrong.output)

    def test_of_a_ticket(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        dense = Tiny()
        ticket = prune(
            dense, criterion="l1", p=1, example_inputs=load_digits().train[0][0].unsqueeze(0)
        )
        save_ticket(ticket, tmp_path / "ticket.safetensors")
        save_file(dense.state_dict(), tmp_path / "dense.safetensors")
        arguments = [
            tmp_path / "ticket.safetensors", "--model", "tests.lottery_models:tiny",
            "--model-argument", "channels=4", "--corruptions", "fog", "--severities", "1",
            "--weights", tmp_path / "dense.safetensors",
        ]  # fmt: skip
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        told = json.loads((tmp_path / "ticket.robustness.json").read_text())
        assert list(told) == ["dense", "ticket"]
        result = RobustnessResult.model_validate(told["ticket"])
        assert result.agreement is not None
        before = (tmp_path / "ticket.robustness.json").read_bytes()
        again = invoke(*arguments)
        assert again.exit_code != 0
        assert "--force" in again.output
        assert invoke(*arguments, "--force").exit_code == 0
        assert (tmp_path / "ticket.robustness.json").read_bytes() == before

    def test_ctrl_c_says_how_to_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        record = run(spec(), tmp_path)
        with monkeypatch.context() as patch:
            patch.setitem(WORK, "robustness", interrupted)
            stopped = invoke(tmp_path, "--corruptions", "fog", "--severities", "1")
        assert stopped.exit_code == 130
        assert "the same command goes on" in stopped.stderr
        assert read_run(tmp_path) == record

    def test_what_cannot_be_measured_is_told_and_is_the_exit_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure = WORK["robustness"]

        def failing(bench: Any, inputs: Any, folder: Path) -> Any:
            if inputs["dense"] is None:
                raise RuntimeError("the dense network is not to be had")
            return measure(bench, inputs, folder)

        run(spec(), tmp_path)
        monkeypatch.setitem(WORK, "robustness", failing)
        done = invoke(tmp_path, "--corruptions", "fog", "--severities", "1")
        assert done.exit_code == 1
        assert (
            "failed: seed 0: robustness of dense: RuntimeError: the dense network is not to be had"
            in " ".join(done.stderr.split())
        )
        found = read_run(tmp_path)
        assert [one.case.kind for one in found.robustness] == ["ticket", "random"]
        assert list(found.failures) == ["seed 0: robustness of dense"]

    def test_signs_of_masked_gradients_are_printed(self, tmp_path: Path) -> None:
        dense = tiny_without_gradient()
        image = load_digits().train[0][0].unsqueeze(0)
        save_ticket(prune(dense, criterion="l1", p=1, example_inputs=image), tmp_path / "t.ticket")
        done = invoke(
            tmp_path / "t.ticket", "--model", f"{__name__}:tiny_without_gradient",
            "--corruptions", "none", "--attacks", "fgsm", "--samples", "10",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert done.output.count("Caution: The loss has no gradient at 100% of the images.") == 1

    def test_images_of_one_size_have_no_other(self, tmp_path: Path) -> None:
        done = invoke(
            tmp_path / "ticket.safetensors", "--model", "tests.lottery_models:tiny",
            "--data", "mnist", "--data-dir", tmp_path, "--image-size", "16",
        )  # fmt: skip
        assert done.exit_code == 1
        assert "mnist has images of one size: leave --image-size out." in done.stderr

    def test_arguments_of_the_factory_are_numbers_or_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, Any] = {}

        def factory(**arguments: Any) -> nn.Module:
            given.update(arguments)
            return Tiny()

        monkeypatch.setattr("tests.lottery_models.tiny", factory)
        texts = {"a": "4", "b": "0.5", "c": "true", "d": "null", "e": "gelu", "f": "4x"}
        arguments = [
            part for key, v in texts.items() for part in ("--model-argument", f"{key}={v}")
        ]
        invoke(tmp_path / "absent", "--model", "tests.lottery_models:tiny", *arguments)
        assert given == {"a": 4, "b": 0.5, "c": True, "d": None, "e": "gelu", "f": "4x"}
        assert type(given["a"]) is int

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["absent"], "--model"),
            (["absent", "--corruptions", "fogg"], "there is no corruption 'fogg'"),
            (["absent", "--attacks", "fgms"], "attacks"),
            (["absent", "--shift", "x"], "NAME=FOLDER"),
            (["absent.safetensors", "--model", "tests.lottery_models:tiny"], "absent.safetensors"),
            (["x.json"], "does not exist"),
        ],
    )
    def test_what_is_refused(self, arguments: list[str], message: str) -> None:
        done = invoke(*arguments)
        assert done.exit_code != 0
        assert message in " ".join(done.output.split())
        assert "Traceback" not in done.output
