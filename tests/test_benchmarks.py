"""The benchmarks run on their smallest settings, and what does not depend on time is right."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision

import blockprune
from blockprune.costs import model_costs
from blockprune.models import resnet20, resnet32

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")

# From the architectures: every identity block costs 4,718,592 MACs.
FLOPS_PERCENT = {
    "resnet32": {1: 6.826, 3: 20.479, 4: 27.305},
    "resnet56": {3: 11.257, 4: 15.010, 5: 18.762, 12: 45.029},
}
DENSE = {
    "resnet32": {"macs": 69_124_736, "filters": 1232, "memory_bytes": 6_141_268},
    "resnet56": {"macs": 125_747_840, "filters": 2128, "memory_bytes": 10_918_740},
}
# How much more than the formula the paper's dense networks would take.
BASELINE_FACTOR = {"resnet32": 1.026, "resnet56": 1.0235}

Load = Callable[[str], ModuleType]
RunScript = Callable[[str, Sequence[str]], dict[str, Any]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import a script the way python runs one: its folder comes first on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunScript:
    """Run a script on the CPU and return what it wrote."""

    def run_script(name: str, arguments: Sequence[str]) -> dict[str, Any]:
        out = tmp_path / "result.json"
        options = [*arguments, "--device", "cpu", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [name, *options])
        load(name).main()
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run_script


# --- the figures that are counted -----------------------------------------------------------------


@pytest.mark.parametrize("network", list(DENSE))
def test_the_dense_networks_of_table_4_have_the_sizes_known(load: Load, network: str) -> None:
    table4 = load("table4")
    dense = table4.NETWORKS[network]()
    own = table4.counted(dense, dense, CPU)
    assert DENSE[network].items() <= own.items()
    assert own["flops_percent"] == own["memory_percent"] == 0


@pytest.mark.parametrize(
    ("network", "p"), [(network, p) for network, rows in FLOPS_PERCENT.items() for p in rows]
)
def test_removals_that_fit_the_papers_memory(load: Load, network: str, p: int) -> None:
    table4 = load("table4")
    published = table4.PUBLISHED[network][p]
    dense = table4.NETWORKS[network]()
    names = [
        f"{stage}.{1 + block}"
        for stage, count in zip(table4.STAGES, published.memory_fits, strict=True)
        for block in range(count)
    ]
    assert len(names) == p
    ticket = blockprune.remove_blocks(dense, names, torch.zeros(1, 3, 32, 32), verify=False)
    own = {**table4.counted(ticket, dense, CPU), "per_stage": list(published.memory_fits)}
    assert own["macs"] == DENSE[network]["macs"] - p * 4_718_592
    assert own["flops_percent"] == FLOPS_PERCENT[network][p]
    factor = table4.beside(published, own)["memory_baseline_factor"]
    assert factor == pytest.approx(BASELINE_FACTOR[network], abs=6e-4)


def test_filters_off_the_first_stage(load: Load) -> None:
    dense = resnet32()
    names, image = ["layer1.1", "layer1.2"], torch.zeros(1, 3, 32, 32)
    counts = [
        load("table4").counted(
            blockprune.remove_blocks(dense, names[:count], image, verify=False), dense, CPU
        )
        for count in (1, 2)
    ]
    assert [found["filters"] for found in counts] == [1200, 1168]
    assert counts[0]["memory_percent"] == 7.781


# --- the scripts ----------------------------------------------------------------------------------


def test_table4(run: RunScript, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    table4 = load("table4")
    monkeypatch.setattr(table4, "SAMPLES_PER_CLASS", 2)
    smallest = ["--networks", "resnet32", "--rounds", "1", "--latency-rounds", "1", "--batch", "2"]
    found = run("table4", smallest)
    assert found["machine"]["torch"] == torch.__version__
    rows = found["resnet32"]
    assert list(rows) == ["dense", "p=1", "p=3", "p=4", "p=5"]
    for p in (1, 3, 4, 5):
        row = rows[f"p={p}"]
        assert row["counted"]["macs"] == DENSE["resnet32"]["macs"] - p * 4_718_592
        assert sum(row["counted"]["per_stage"]) == p
        assert "layer1.0" not in row["counted"]["removed"]
        assert max(row["counted"]["per_stage"]) <= 3
        assert row["training"]["speed_up"] == pytest.approx(1 / row["training"]["ratio"], abs=1e-3)
        assert set(row["latency"]) == {"1", "2"}
    assert rows["p=4"]["published"]["flops_percent"] == 34.13
    assert rows["p=5"]["published"] is None
    assert found["targets"] == []
    assert "| 5 |" in "\n".join(load("document").SECTIONS["table4"](found))


def test_against_peers(run: RunScript, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = load("_peers").SUBJECTS
    wanting = dataclasses.replace(subjects["resnet56"], width_pruned=True, siblings=("resnet10t",))
    monkeypatch.setitem(subjects, "resnet56", wanting)
    # What `prune` costs is measured on a ResNet-50; a smaller one goes the same way.
    monkeypatch.setattr(torchvision.models, "resnet50", torchvision.models.resnet18)
    # A machine without the extras.
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    smallest = "--networks resnet56 --rounds 1 --saturated 2 --pairs 1 --images 2 --image-size 32"
    found = run("against_peers", smallest.split())
    network = found["networks"]["resnet56"]
    # 0.55 of the MACs is 12 blocks off.
    assert len(network["removed"]) == 12
    assert network["macs"]["dense"] - network["macs"]["ticket"] == 12 * 4_718_592
    assert network["macs"]["by_hand"] == network["macs"]["identity"] == network["macs"]["ticket"]
    assert network["largest_difference"] == {"by_hand": 0, "identity": 0}
    assert set(found["latency"]["resnet56"]) == {"1", "2"}
    assert set(found["latency"]["resnet56"]["1"]["ticket_over"]) == {"dense", "by_hand", "identity"}
    assert set(found["prune"]) == {"analysis_over_forward", "with_example", "as_is"}
    assert "pip install '.[filters]'" in found["skipped"]["resnet56: width"]
    assert "pip install '.[zoo]'" in found["skipped"]["resnet56: sibling"]
    assert len(found["targets"]) == 1 + 2 + 2
    assert "resnet56" in "\n".join(load("document").SECTIONS["against_peers"](found))


def test_width_is_pruned_to_the_macs_asked_for(load: Load) -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    peers = load("_peers")
    dense, image = resnet20().eval(), torch.randn(1, 3, 32, 32)
    macs = model_costs(dense, image).macs
    share = peers.ratio_for(torch_pruning, dense, macs // 3, image)
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    peers.width_pruning(torch_pruning, dense, share, batch)()
    # Widths of 16 come in steps of 8.
    assert model_costs(dense, image).macs == pytest.approx(macs / 3, rel=0.25)


def test_ticket_costs(run: RunScript, load: Load) -> None:
    slow = ["export", "exported", "compile"]
    found = run("ticket_costs", ["--networks", "resnet56", "--pairs", "1", "--skip", *slow])
    steps = found["networks"]["resnet56"]
    assert list(steps) == ["copy", "state_dict", "file", "file_unverified"]
    for step in steps.values():
        assert set(step["median_ms"]) == {"dense", "ticket"}
        assert step["quartiles"] == [step["ratio"], step["ratio"]]
    assert "| copy |" in "\n".join(load("document").SECTIONS["ticket_costs"](found))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("table4", ["--batch", "0"]),
        ("against_peers", ["--rounds", "-1"]),
        ("against_peers", ["--saturated", "0"]),
        ("ticket_costs", ["--pairs", "0"]),
        ("ticket_costs", ["--threads", "0"]),
    ],
)
def test_nonsense_is_refused_before_any_work(
    load: Load,
    name: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(out)])
    with pytest.raises(SystemExit, match=f"{arguments[0]} must be at least 1"):
        load(name).main()
    assert not out.exists()


# --- results --------------------------------------------------------------------------------------


def test_the_readme_shows_the_result_files(load: Load) -> None:
    document = load("document")
    text = document.README.read_text()
    assert document.with_results(text, document.document()) == text


def test_an_interrupted_run_keeps_what_it_has(load: Load, tmp_path: Path) -> None:
    parser = load("_results").parser_of("a script")
    options = parser.parse_args(["--out", str(tmp_path / "result.json")])
    results = load("_results").Results("script", options, CPU, rounds=1)
    results.add("section", "first", figure=1)
    results.skip("second", "there is none")
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["section"] == {"first": {"figure": 1}}
    assert kept["skipped"] == {"second": "there is none"}


def test_ratios_are_taken_within_rounds(load: Load) -> None:
    pairs = load("_pairs")
    # The machine slows down by 10 in the middle; the ratio does not notice.
    found = pairs.ratio([1.0, 1.0, 10.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0, 20.0])
    assert found == {"ratio": 0.5, "quartiles": [0.5, 0.5]}


def test_the_order_of_a_round_turns_over(load: Load) -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[[], Callable[[], None]]:
        return lambda: lambda: calls.append(name)

    samples = load("_pairs").alternate({name: noting(name) for name in "ab"}, 2, warmup=0)
    assert calls == ["a", "b", "b", "a"]
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
