"""A slice of what `benchmarks/zoo_coverage.py` does to whole libraries, and tests of its parts.

The counts are known from the architectures, and are written as the sums they come from.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import blockprune
from benchmarks._coverage.document import document
from benchmarks._coverage.misses import misses
from benchmarks._coverage.oracle import Cut, Oracle
from benchmarks._coverage.others import CONFIGURATIONS
from benchmarks._coverage.others_models import MissingLibraryError, prepare
from benchmarks._coverage.progress import Progress
from benchmarks._coverage.status import STATUSES, is_failed, status_of
from benchmarks._coverage.study import Row, study, verdict_of
from benchmarks._coverage.waking import wake
from blockprune.models import resnet20


@dataclass(frozen=True)
class Case:
    """A model of a library, and its truth; `sums` of branches may join in one residual add."""

    library: str
    name: str
    branches: int
    layers: int
    sums: int = 0


CASES = (
    # Every block but the first of a stage that changes width or stride.
    Case("torchvision", "resnet18", 2 + 1 + 1 + 1, 2 + 1 + 1 + 1),
    Case("torchvision", "quantized_resnet18", 2 + 1 + 1 + 1, 2 + 1 + 1 + 1),
    Case("torchvision", "mobilenet_v2", 1 + 2 + 3 + 2 + 2, 10),
    Case("torchvision", "mobilenet_v3_small", 1 + 2 + 1 + 2, 6),
    Case("torchvision", "mnasnet0_5", 2 + 2 + 2 + 1 + 3, 10),
    Case("torchvision", "regnet_y_400mf", 2 + 5 + 5, 12),
    Case("torchvision", "lraspp_mobilenet_v3_large", 1 + 1 + 2 + 3 + 1 + 2, 10),
    Case("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn", 1 + 1 + 2 + 3 + 1 + 2, 10),
    # Attention and MLP: two branches a layer.
    Case("timm", "test_vit", 2 * 6, 6),
    Case("timm", "test_resnet", 1, 1),
    Case("timm", "test_convnext", 1 + 2 + 4 + 2, 9),
    Case("timm", "test_mambaout", 1 + 1 + 3 + 1, 6),
    Case("timm", "convnext_atto", 2 + 2 + 6 + 2, 12),
    Case("timm", "mobilenetv3_small_050", 1 + 2 + 1 + 2 + 1, 7),
    Case("timm", "regnetx_002", 3 + 6, 9),
    Case("transformers", "ViT", 2 * 4, 4),
    Case("transformers", "BEiT", 2 * 4, 4),
    Case("transformers", "Swin", 2 * (2 + 2 + 2), 2 + 2 + 2),
    Case("transformers", "ConvNeXt", 2 + 2 + 3 + 2, 9),
    Case("transformers", "RegNet", 1 + 2 + 2 + 1, 6),
    Case("transformers", "CLIP", 2 * (4 + 4), 4 + 4),
    # A norm after each sum: no layer of it hands its input on.
    Case("transformers", "BERT", 2 * 4, 0),
    Case("transformers", "DistilBERT", 2 * 4, 0),
    Case("transformers", "GPT-2", 2 * 4, 4),
    # Attention and MLP in parallel: as in (x + a) + b, so in x + (a + b).
    Case("transformers", "GPT-NeoX", 2 * 4, 4, sums=4),
    # One writes into the other before the sum: one branch a layer.
    Case("transformers", "Falcon", 4, 4),
    Case("transformers", "Llama", 2 * 4, 4),
    Case("transformers", "Mixtral", 2 * 4, 4),
    # Three branches a layer of the decoder, which attends to the encoder.
    Case("transformers", "Whisper", 2 * 3 + 3 * 3, 3 + 3),
    # Nothing to find: concatenation and channel shuffles in place of sums.
    Case("torchvision", "shufflenet_v2_x0_5", 0, 0),
    Case("timm", "test_efficientnet", 0, 0),
)


@contextlib.contextmanager
def _third_party_warnings() -> Iterator[None]:
    """Let through what the libraries themselves warn of while they are imported and built."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def _models_of(library: str) -> ModuleType:
    with _third_party_warnings():
        pytest.importorskip(library)
        return importlib.import_module(f"benchmarks._coverage.{library}_models")


@pytest.mark.parametrize("case", CASES, ids=[f"{c.library}-{c.name}" for c in CASES])
def test_blocks_are_counted_and_tickets_checked(case: Case) -> None:
    models = _models_of(case.library)
    with _third_party_warnings():
        model, inputs = models.build(case.name)
    # The sweep's reference does not tell the operands of such a sum: see the test below.
    *_, row = study(model.eval(), inputs, verify=not case.sums)
    assert (row["branches"], row["layers"]) == (case.branches, case.layers)
    assert row["residual"] == case.branches - case.sums
    if not case.sums:
        assert verdict_of(row)[0] == ("verified" if case.branches else "no blocks"), verdict_of(row)


@pytest.mark.parametrize("picked", [slice(0, 1), slice(1, 2), slice(0, 2), slice(1, None, 2)])
def test_branches_that_are_added_up_first(picked: slice) -> None:
    """The last projection of a branch, set to zero, makes it zero."""
    with _third_party_warnings():
        model, inputs = _models_of("transformers").build("GPT-NeoX")
    model.eval()
    names = blockprune.find_blocks(model, inputs).names[picked]
    ticket, reference = blockprune.remove_blocks(model, names, inputs).eval(), copy.deepcopy(model)
    for name in names:
        branch = reference.get_submodule(name)
        last = branch.dense if name.endswith("attention") else branch.dense_4h_to_h
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    with torch.no_grad():
        found, expected = (net(**inputs) for net in (ticket, reference))
    assert torch.equal(found[0], expected[0])


# --- the oracle can fail --------------------------------------------------------------------------

CUT = "layer2.1"
OTHER = "layer2.2"


@dataclass(frozen=True)
class Trial:
    """A ResNet, an oracle that knows two of its branches, and how a ticket fares before it."""

    model: nn.Module
    images: torch.Tensor
    analysis: blockprune.BlockAnalysis

    def problems(self, ticket: nn.Module, *, train: bool = False, as_layer: bool = False) -> str:
        block = self.analysis.block(CUT)
        cut = Cut(layers=(block,)) if as_layer else Cut(branches=(block,))
        oracle = Oracle(self.model, self.images, self.analysis, [block], train=train)
        assert oracle.refusal is None
        return "\n".join(oracle.verdict(ticket, cut).problems)

    def ticket(self, name: str = CUT) -> nn.Module:
        return blockprune.remove_blocks(self.model, [name], self.images)


@pytest.fixture
def trial() -> Trial:
    model, images = wake(resnet20()), torch.rand(2, 3, 16, 16)
    return Trial(model, images, blockprune.find_blocks(model, images))


BOTH_MODES = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
BOTH_KINDS = pytest.mark.parametrize("as_layer", [False, True], ids=["branch", "layer"])


@BOTH_MODES
@BOTH_KINDS
def test_the_oracle_agrees_with_a_right_ticket(trial: Trial, train: bool, as_layer: bool) -> None:
    assert trial.problems(trial.ticket(), train=train, as_layer=as_layer) == ""


@BOTH_MODES
@BOTH_KINDS
def test_the_oracle_sees_that_another_block_was_removed(
    trial: Trial, train: bool, as_layer: bool
) -> None:
    problems = trial.problems(trial.ticket(OTHER), train=train, as_layer=as_layer)
    assert "output 0: off by" in problems


def test_the_oracle_sees_that_nothing_was_removed(trial: Trial) -> None:
    assert "output 0: off by" in trial.problems(trial.model)


def test_the_oracle_sees_one_wrong_weight(trial: Trial) -> None:
    ticket = trial.ticket()
    with torch.no_grad():
        next(ticket.parameters()).view(-1)[0] += 1e-3
    assert "output 0: off by" in trial.problems(ticket)


def test_the_oracle_sees_a_parameter_that_is_no_longer_trained(trial: Trial) -> None:
    ticket = trial.ticket()
    name, parameter = next(iter(ticket.named_parameters()))
    parameter.requires_grad_(False)
    assert trial.problems(ticket) == f"gradient of {name} is missing"


def test_the_oracle_sees_a_wrong_running_mean(trial: Trial) -> None:
    ticket = trial.ticket()
    name, buffer = next((n, b) for n, b in ticket.named_buffers() if n.endswith("running_mean"))
    buffer += 1
    assert f"buffer {name}: off by" in trial.problems(ticket, train=True)


def test_the_oracle_says_so_where_it_finds_no_branch(trial: Trial) -> None:
    block = trial.analysis.block(CUT)
    elsewhere = dataclasses.replace(block, owner=OTHER)
    oracle = Oracle(trial.model, trial.images, trial.analysis, [elsewhere], train=False)
    verdict = oracle.verdict(trial.ticket(), Cut(branches=(elsewhere,)))
    assert "the oracle does not find the branch" in verdict.problems[0]


def test_the_oracle_does_not_take_a_void_comparison_for_equality(trial: Trial) -> None:
    last = trial.model.get_submodule(CUT).bn2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    assert trial.problems(trial.ticket()) == "switching this off changes no output"


def test_double_precision_excuses_no_wrong_weight(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = trial.ticket()
    with torch.no_grad():
        next(ticket.parameters()).view(-1)[0] += 1e-6
    monkeypatch.setattr("benchmarks._coverage.study.remove_blocks", lambda *_, **__: ticket)
    *_, row = study(trial.model, trial.images, verify=True)
    assert verdict_of(row)[0] == "failed"


def test_the_oracle_leaves_the_models_as_they_are(trial: Trial) -> None:
    ticket = trial.ticket()
    before = copy.deepcopy((trial.model.state_dict(), ticket.state_dict()))
    trial.problems(ticket, train=True)
    for was, model in zip(before, (trial.model, ticket), strict=True):
        assert all(torch.equal(was[key], value) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


# --- what is kept and written ---------------------------------------------------------------------

ROW: Row = {
    "library": "torchvision",
    "name": "resnet18",
    "task": "study",
    "traced": "whole",
    "branches": 5,
    "residual": 5,
    "layers": 5,
    "parameters": 11_689_512,
    "refused": {"projection_shortcut": 3},
    "seconds": {"branches": 0.5},
    "tickets": [{"removed": ["layer1.0"], "as": "branches", "parameters": 5, "refusal": None}],
}
NONE: Row = {**ROW, "name": "vgg11", "branches": 0, "residual": 0, "activations": 0, "refused": {}}
FAILED: Row = {"library": "torchvision", "name": "x|y", "task": "study", "error": "a <b> | c"}


def test_progress_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    Progress(path, {"torch": "1"}, resume=False).add(ROW)
    with path.open("a") as file:
        file.write('{"name": "resn')
    progress = Progress(path, {"torch": "1"}, resume=True)
    progress.add(NONE)
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == [
        "resnet18",
        "vgg11",
    ]
    assert progress.found(name="resnet18", task="study") is not None
    assert progress.found(name="resnet18", task="verify") is None


def test_progress_of_other_versions_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    Progress(path, {"torch": "1"}, resume=False).add(ROW)
    assert Progress(path, {"torch": "2"}, resume=True).rows == []


def test_the_report_is_well_formed() -> None:
    machine = {"date": "2000-01-01", "torch": "2", "python": "3", "architecture": "x", "cores": 2}
    result = {"machine": machine, "versions": {"torchvision": "1"}, "models": [ROW, NONE, FAILED]}
    text = document({"torchvision": result})
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    assert "| torchvision |  | vgg11 | adds no two activations |" in text
    assert "a &lt;b> \\| c" in text


def test_an_empty_report_has_its_sections() -> None:
    assert "## Failures" in document({})


def test_progress_of_one_library_does_not_depend_on_the_version_of_another(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    Progress(path, {"torchvision": "1", "monai": "1"}, resume=False).add(ROW)
    assert len(Progress(path, {"torchvision": "1", "monai": "2"}, resume=True).rows) == 1
    assert Progress(path, {"torchvision": "2", "monai": "2"}, resume=True).rows == []


# --- third-party libraries, which no test installs ------------------------------------------------


def test_every_library_of_the_sweep_is_in_the_extra() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["zoo-others"]
    installed = {requirement.partition(">=")[0] for requirement in extra}
    assert {configuration.library for configuration in CONFIGURATIONS} <= installed


def test_there_are_enough_configurations_and_each_has_a_name() -> None:
    assert len(CONFIGURATIONS) >= 50
    assert len({configuration.library for configuration in CONFIGURATIONS}) >= 15
    assert len({configuration.name for configuration in CONFIGURATIONS}) == len(CONFIGURATIONS)
    assert all(configuration.why for configuration in CONFIGURATIONS)


def test_a_missing_library_is_named_with_how_to_install_it() -> None:
    with pytest.raises(MissingLibraryError, match=r"no-such-library.*zoo-others"):
        prepare(["no-such-library"])


def test_a_thorough_study_cuts_one_several_and_all_branches() -> None:
    model, images = wake(resnet20()), torch.rand(2, 3, 16, 16)
    *_, row = study(model.eval(), images, verify=True, thorough=True)
    cuts = [len(ticket["removed"]) for ticket in row["tickets"] if ticket["as"] == "branches"]
    # Three stages of three blocks, two of which begin with another width.
    assert cuts == [1, 4, 7]
    assert row["missed"] == []
    assert status_of({**row, "expected": 7}) == ("complete", "")


class _Hidden(nn.Module):
    """Decides by the numbers in a tensor, so that no graph can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) if x.sum().item() > -1e9 else x


def test_a_branch_that_is_not_found_is_told_with_its_owner_and_a_reason() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4), _Hidden()), torch.rand(2, 4)
    *_, row = study(model.eval(), inputs, verify=True, thorough=True)
    assert [(miss["owner"], miss["adds"]) for miss in row["missed"]] == [("1", 1)]
    status, why = status_of({**row, "expected": 1})
    assert status == "unseen"
    assert why.startswith("1 not looked into: ")


def test_a_refused_merge_is_told_with_the_reason() -> None:
    analysis = blockprune.find_blocks(resnet20(), torch.rand(2, 3, 16, 16))
    (miss,) = misses(analysis, {"layer2.0": 1, "layer1.0": 1})
    assert miss.owner == "layer2.0"
    assert "projection_shortcut" in miss.why


FOUND: Row = {**ROW, "library": "x", "name": "x/y", "expected": 5, "expected_because": "2 + 3"}
UNFOUND: Row = {**FOUND, "missed": [{"owner": "a", "adds": 2, "why": "in no graph"}]}
WRONG: Row = {
    **FOUND,
    "tickets": [{**ROW["tickets"][0], "eval": {"problems": ["off"], "limits": []}}],
}
ROWS: list[tuple[str, Row]] = [
    ("complete", FOUND),
    ("found", {key: value for key, value in FOUND.items() if key != "tickets"}),
    ("none", {**FOUND, "branches": 0, "expected": 0}),
    ("partly", {**UNFOUND, "expected": 7}),
    ("unseen", {**UNFOUND, "branches": 0, "expected": 7}),
    ("unseen", {"library": "x", "name": "x/y", "expected": 5, "refusal": "TraceError: no"}),
    ("wrong", WRONG),
    ("wrong", {**FOUND, "expected": 4}),
    ("wrong", {**FOUND, "refusal": "TraceError: no"}),
    ("crash", {"library": "x", "name": "x/y", "expected": 5, "error": "KeyError: z"}),
]


@pytest.mark.parametrize(("status", "row"), ROWS)
def test_the_status_of_a_row(status: str, row: dict[str, Any]) -> None:
    assert status_of(row)[0] == status
    assert is_failed(row) == (status in ("wrong", "crash"))


def test_the_report_on_third_party_libraries() -> None:
    machine = {"date": "2000-01-01", "torch": "2", "python": "3", "architecture": "x", "cores": 2}
    rows = [{"expected_because": "2 + 3", **row} for _, row in ROWS]
    result = {"machine": machine, "versions": {"x": "1"}, "models": rows}
    text = document({"others": result})
    assert "| 10 | 1 | 1 | 1 | 1 | 1 | 2 | 3 | 1 | 2000-01-01, torch 2," in text
    assert "| partly | 2 in no graph |" in text
    assert {status for status, _ in ROWS} == set(STATUSES)
