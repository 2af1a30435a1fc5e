"""What a caller can get wrong: the class of the error, what its message says, and no trace left.

Every message says what was asked, what was found and what would work.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune import (
    BlockNotFoundError,
    BlockNotRemovableError,
    BlockpruneError,
    CriterionError,
    PlanError,
    StalePlanError,
    TicketError,
    TraceError,
)
from tests import zoo

RESNET = zoo.BY_NAME["resnet"]  # layer1.0, layer1.1 and layer2.1 can go; layer2.0 cannot


@pytest.fixture
def net() -> Iterator[nn.Module]:
    """A net that has to be exactly as it was once the error is out."""
    net = RESNET.build()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    generator = torch.get_rng_state()
    yield net
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.fixture
def analysis(net: nn.Module) -> blockprune.BlockAnalysis:
    return blockprune.find_blocks(net, RESNET.example())


def _data() -> tuple[Tensor, Tensor]:
    return RESNET.example(4)[0], torch.tensor([0, 1, 2, 0])


def _wide() -> nn.Module:
    """The same blocks under another head."""
    wide = RESNET.build()
    with torch.random.fork_rng(devices=[]):
        wide.fc = nn.Linear(2 * zoo.C, 7)
    return wide


def _says(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    missing = [part for part in parts if part.lower() not in message.lower()]
    assert not missing, f"{message!r} does not say {missing}"


# ---------------------------------------------------------------- nothing to remove


@pytest.mark.parametrize("name", ["vgg", "densenet"])
def test_no_residual_connection_at_all(name: str) -> None:
    entry = zoo.BY_NAME[name]
    with pytest.raises(BlockpruneError) as error:
        blockprune.prune(entry.build(), "random", p=1, example_inputs=entry.example())
    _says(error, "no removable")


def test_no_removable_block_says_why() -> None:
    entry = zoo.BY_NAME["scaled_shortcut"]
    with pytest.raises(BlockpruneError) as error:
        blockprune.prune(entry.build(), "random", p=1, example_inputs=entry.example())
    _says(error, "no removable", "scaled_shortcut")


# ---------------------------------------------------------------- p


@pytest.mark.parametrize(
    ("p", "says"),
    [
        (4, ("4", "3")),
        (-1, ("-1",)),
        (math.nan, ("nan",)),
        (1.5, ("1.5", "1")),
        (-0.5, ("-0.5", "0")),
        (math.inf, ("inf",)),
        (True, ("True",)),
        ("3", ("3",)),
    ],
    ids=lambda value: repr(value) if not isinstance(value, tuple) else "",
)
def test_p_out_of_range(
    net: nn.Module, analysis: blockprune.BlockAnalysis, p: Any, says: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as error:
        blockprune.make_plan(analysis, p=p)
    _says(error, *says)
    with pytest.raises(PlanError):
        blockprune.prune(net, "random", p=p, example_inputs=RESNET.example())


@pytest.mark.parametrize("name", ["keep_macs", "keep_params", "max_latency_ms"])
@pytest.mark.parametrize(
    "value", [True, math.nan, math.inf, 0, 0.0, -1, -0.5, "1", [1]], ids=lambda value: repr(value)
)
def test_budgets_out_of_range(
    net: nn.Module, analysis: blockprune.BlockAnalysis, name: str, value: Any
) -> None:
    for call in (
        lambda: blockprune.make_plan(analysis, **{name: value}),
        lambda: blockprune.prune(net, "l1", example_inputs=RESNET.example(), **{name: value}),
    ):
        with pytest.raises(PlanError) as error:
            call()
        _says(error, name)


def test_a_share_above_all_of_it(analysis: blockprune.BlockAnalysis) -> None:
    with pytest.raises(PlanError) as error:
        blockprune.make_plan(analysis, keep_macs=5e6)
    _says(error, "keep_macs", "pass the int 5000000")


@pytest.mark.parametrize("p", [None, 1])
def test_two_budgets(net: nn.Module, analysis: blockprune.BlockAnalysis, p: int | None) -> None:
    given: dict[str, Any] = {"p": p, "keep_macs": 0.5} if p else {"keep_params": 1, "keep_macs": 1}
    with pytest.raises(PlanError) as error:
        blockprune.make_plan(analysis, **given)
    _says(error, *given, "max_latency_ms", "2 budgets")
    with pytest.raises(PlanError):
        blockprune.prune(net, "l1", example_inputs=RESNET.example(), **given)


def test_words_that_are_no_choice(net: nn.Module, analysis: blockprune.BlockAnalysis) -> None:
    with pytest.raises(PlanError) as error:
        blockprune.prune(net, "l1", p=1, example_inputs=RESNET.example(), schedule="oneshot")
    _says(error, "'oneshot'", "'one-shot'", "'iterative'")
    with pytest.raises(PlanError) as error:
        blockprune.make_plan(analysis, p=1, by="cost")
    _says(error, "'cost'", "'score'", "'score_per_cost'")


@pytest.mark.parametrize(
    "limits",
    [{"protect": ("layer1.*",)}, {"min_blocks_per_stage": 2}],
    ids=["protected", "stage_minimum"],
)
def test_p_beyond_what_the_limits_leave(
    analysis: blockprune.BlockAnalysis, limits: dict[str, Any]
) -> None:
    # Protecting layer1 leaves one block; two blocks a stage leave none (layer2 keeps its
    # projection and one more, layer1 has exactly two).
    with pytest.raises(PlanError) as error:
        blockprune.make_plan(analysis, p=3, **limits)
    _says(error, "3", "1" if "protect" in limits else "0")


def test_protecting_a_block_that_is_not_there(analysis: blockprune.BlockAnalysis) -> None:
    with pytest.raises((PlanError, BlockNotFoundError)) as error:
        blockprune.make_plan(analysis, p=1, protect=("layer9.*",))
    _says(error, "layer9.*")


@pytest.mark.parametrize("granularity", ["blocks", "", "Layer"])
def test_unknown_granularity(net: nn.Module, granularity: str) -> None:
    with pytest.raises((BlockpruneError, ValueError)) as error:
        blockprune.find_blocks(net, RESNET.example(), granularity=granularity)
    _says(error, repr(granularity), "branch", "layer")


# ---------------------------------------------------------------- names


def test_unknown_block_gives_close_names(
    net: nn.Module, analysis: blockprune.BlockAnalysis
) -> None:
    for attempt in (
        lambda: analysis.block("layer1.2"),
        lambda: blockprune.remove_blocks(net, ["layer1.2"], RESNET.example()),
    ):
        with pytest.raises(BlockNotFoundError) as error:
            attempt()
        assert isinstance(error.value, KeyError)
        _says(error, "layer1.2", "layer1.1")


def test_a_refused_block_gives_its_reason(
    net: nn.Module, analysis: blockprune.BlockAnalysis
) -> None:
    for attempt in (
        lambda: analysis.block("layer2.0"),
        lambda: blockprune.remove_blocks(net, ["layer2.0"], RESNET.example()),
    ):
        with pytest.raises(BlockNotRemovableError) as error:
            attempt()
        assert isinstance(error.value, ValueError)
        _says(error, "layer2.0", "projection_shortcut")


def test_a_string_is_not_a_list_of_names(net: nn.Module) -> None:
    # Letter by letter, "layer1.0" would be eight unknown blocks.
    with pytest.raises((BlockpruneError, TypeError)) as error:
        blockprune.remove_blocks(net, "layer9.0", RESNET.example())
    _says(error, "layer9.0")


# ---------------------------------------------------------------- criteria and data


def test_unknown_criterion(net: nn.Module) -> None:
    with pytest.raises(CriterionError) as error:
        blockprune.score_blocks(net, "grapes", _data())
    assert isinstance(error.value, ValueError)
    _says(error, "grapes", "grasp", "random")
    with pytest.raises(CriterionError):
        blockprune.prune(net, "grapes", p=1, example_inputs=RESNET.example())


@pytest.mark.parametrize(
    "scores",
    [
        lambda context: {"layer1.0": 1.0},
        lambda context: {b.name: math.nan for b in context.blocks},
        lambda context: {b.name: "high" for b in context.blocks},
        lambda context: None,
        lambda context: {**{b.name: 0.0 for b in context.blocks}, "layer9": 1.0},
    ],
    ids=["missing", "nan", "not_a_number", "nothing", "stranger"],
)
def test_scores_that_cannot_be_used(net: nn.Module, scores: Any) -> None:
    with pytest.raises(CriterionError):
        blockprune.score_blocks(net, scores, _data())


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_empty_data(net: nn.Module, criterion: str) -> None:
    with pytest.raises(BlockpruneError) as error:
        blockprune.score_blocks(net, criterion, [], example_inputs=RESNET.example())
    _says(error, "empty")


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_no_sample_in_a_batch(net: nn.Module, criterion: str) -> None:
    x, y = _data()
    with pytest.raises(BlockpruneError):
        blockprune.score_blocks(net, criterion, (x[:0], y[:0]), example_inputs=RESNET.example())


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_loss_that_is_not_finite(net: nn.Module, criterion: str, value: float) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * value

    with pytest.raises(BlockpruneError) as error:
        blockprune.score_blocks(net, criterion, _data(), loss_fn=loss)
    _says(error, "loss", "nan" if math.isnan(value) else "inf")


def test_data_that_is_not_a_pair(net: nn.Module) -> None:
    with pytest.raises(BlockpruneError):
        blockprune.score_blocks(net, "grasp", _data()[0])


# ---------------------------------------------------------------- example inputs


@pytest.mark.parametrize(
    ("inputs", "quoted"),
    [
        (torch.randn(2, 5, 8, 8), "5"),
        (torch.randn(2, 3), "2"),
        (torch.randn(2, 3, 8, 8, dtype=torch.float64), "double"),
        ((torch.randn(2, 3, 8, 8), torch.randn(1)), "argument"),
        ({"image": torch.randn(2, 3, 8, 8)}, "dict"),
        ((), "argument"),
        ("an image", ""),
        (None, ""),
    ],
    ids=["channels", "rank", "dtype", "one_too_many", "keyword", "nothing", "text", "none"],
)
def test_wrong_example_inputs_quote_the_model(net: nn.Module, inputs: Any, quoted: str) -> None:
    with pytest.raises(TraceError) as error:
        blockprune.find_blocks(net, inputs)
    assert isinstance(error.value, RuntimeError)
    _says(error, quoted)


def test_no_shape_can_be_inferred() -> None:
    # Its forward takes a dictionary with keys of its own.
    with pytest.raises(TraceError) as error:
        blockprune.prune(zoo.BY_NAME["input_dict"].build(), "random", p=1)
    _says(error, "example_inputs")


def test_something_that_is_no_module() -> None:
    with pytest.raises((BlockpruneError, TypeError)) as error:
        blockprune.find_blocks(lambda x: x, torch.randn(1))  # type: ignore[arg-type]
    _says(error, "function")


# ---------------------------------------------------------------- plans


def test_plan_of_another_model(net: nn.Module) -> None:
    other = zoo.BY_NAME["pre_activation"]
    plan = blockprune.make_plan(blockprune.find_blocks(other.build(), other.example()), p=1)
    with pytest.raises(StalePlanError) as error:
        blockprune.remove_blocks(net, plan, RESNET.example())
    assert isinstance(error.value, PlanError)
    _says(error, plan.fingerprint[:8])


def test_plan_of_another_width(analysis: blockprune.BlockAnalysis) -> None:
    plan = blockprune.make_plan(analysis, p=1)
    with pytest.raises(StalePlanError):
        blockprune.remove_blocks(_wide(), plan, RESNET.example())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"remove": ["layer1.0"]}', '{"remove": 3, "version": 1}'],
    ids=["empty", "cut", "list", "null", "partial", "wrong_type"],
)
def test_plan_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        blockprune.PruningPlan.from_json(text)


def test_plan_of_a_later_version(analysis: blockprune.BlockAnalysis) -> None:
    values = json.loads(blockprune.make_plan(analysis, p=1).to_json())
    values["version"] = 999
    with pytest.raises(PlanError) as error:
        blockprune.PruningPlan.from_json(json.dumps(values))
    _says(error, "999")


def test_plan_with_a_field_nobody_knows(analysis: blockprune.BlockAnalysis) -> None:
    values = json.loads(blockprune.make_plan(analysis, p=1).to_json())
    values["exec"] = "import os"
    with pytest.raises(PlanError):
        blockprune.PruningPlan.from_json(json.dumps(values))


def test_scores_of_another_analysis(analysis: blockprune.BlockAnalysis) -> None:
    with pytest.raises(BlockpruneError):
        blockprune.make_plan(analysis, {"layer9": 1.0}, p=1)


# ---------------------------------------------------------------- ticket files


@pytest.fixture
def saved(net: nn.Module, tmp_path: Path) -> Path:
    ticket = blockprune.remove_blocks(net, ["layer1.1"], RESNET.example())
    path = tmp_path / "ticket.safetensors"
    blockprune.save_ticket(ticket, path)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "bytes", "header", "last_byte"])
def test_truncated_ticket(saved: Path, net: nn.Module, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(TicketError) as error:
        blockprune.load_ticket(net, saved)
    assert isinstance(error.value, ValueError)
    _says(error, saved.name)


def test_absent_ticket(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises((TicketError, FileNotFoundError)) as error:
        blockprune.load_ticket(net, tmp_path / "absent.safetensors")
    _says(error, "absent.safetensors")


def test_ticket_of_another_model(saved: Path) -> None:
    other = zoo.BY_NAME["pre_activation"].build()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises((TicketError, StalePlanError)):
        blockprune.load_ticket(other, saved)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_ticket_of_a_wider_model(saved: Path) -> None:
    with pytest.raises((TicketError, StalePlanError)):
        blockprune.load_ticket(_wide(), saved)


def test_safetensors_file_that_is_no_ticket(net: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    with pytest.raises(TicketError) as error:
        blockprune.load_ticket(net, path)
    _says(error, path.name)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


def test_no_code_runs_from_a_file(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, data in (
        (tmp_path / "pickle.safetensors", pickle.dumps(_Bomb())),
        (tmp_path / "zip.safetensors", None),
    ):
        if data is None:
            torch.save(_Bomb(), path)
        else:
            path.write_bytes(data)
        with pytest.raises(TicketError):
            blockprune.load_ticket(net, path)
    assert not (tmp_path / "bomb-went-off").exists()


def _tamper(path: Path, change: Any) -> None:
    """Rewrite the plan inside a ticket file, its tensors left as they are."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    (key,) = [k for k, v in metadata.items() if "layer1.1" in v]
    values = json.loads(metadata[key])
    target = values if "remove" in values else next(v for v in values.values() if "remove" in v)
    change(target)
    metadata[key] = json.dumps(values)
    save_file(load_file(path), path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(remove=["layer1.0"]),
        lambda plan: plan.update(remove=["layer1.1", "layer2.1"]),
        lambda plan: plan.update(remove=[]),
        lambda plan: plan.update(remove=["layer2.0"]),
        lambda plan: plan.update(remove=["__import__('os').system('true')"]),
        lambda plan: plan.update(remove=7),
        lambda plan: plan.update(fingerprint="0" * len(plan["fingerprint"])),
        lambda plan: plan.update(version=999),
        lambda plan: plan.pop("fingerprint"),
    ],
    ids=[
        "another_block",
        "one_more",
        "none",
        "refused_block",
        "code",
        "number",
        "fingerprint",
        "version",
        "no_fingerprint",
    ],
)
def test_tampered_plan(saved: Path, net: nn.Module, change: Any) -> None:
    _tamper(saved, change)
    with pytest.raises(BlockpruneError):
        blockprune.load_ticket(net, saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if k != "fc.bias"},
        lambda t: {**t, "extra": torch.zeros(1)},
        lambda t: {**t, "fc.bias": torch.zeros(9)},
        lambda t: {**t, "fc.bias": torch.zeros(3, dtype=torch.int64)},
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_the_plan(saved: Path, net: nn.Module, change: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(saved, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file(change(load_file(saved)), saved, metadata=metadata)
    with pytest.raises(TicketError):
        blockprune.load_ticket(net, saved)


def test_output_that_exists_is_kept(saved: Path, net: nn.Module) -> None:
    ticket = blockprune.remove_blocks(net, ["layer1.0"], RESNET.example())
    before = _files(saved.parent)
    with pytest.raises(TicketError) as error:
        blockprune.save_ticket(ticket, saved)
    _says(error, saved.name, "overwrite")
    assert _files(saved.parent) == before
    blockprune.save_ticket(ticket, saved, overwrite=True)
    assert blockprune.plan_of(blockprune.load_ticket(net, saved)).remove == ("layer1.0",)


def test_output_in_a_folder_that_is_not_there(net: nn.Module, tmp_path: Path) -> None:
    ticket = blockprune.remove_blocks(net, ["layer1.0"], RESNET.example())
    with pytest.raises((TicketError, OSError)):
        blockprune.save_ticket(ticket, tmp_path / "absent" / "ticket.safetensors")
    assert _files(tmp_path) == {}


def test_what_is_no_ticket_is_not_saved(net: nn.Module, tmp_path: Path) -> None:
    for attempt in (
        lambda: blockprune.plan_of(net),
        lambda: blockprune.save_ticket(net, tmp_path / "ticket.safetensors"),
    ):
        with pytest.raises(TicketError) as error:
            attempt()
        _says(error, "ResNet")
    assert _files(tmp_path) == {}
