"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blockprune.cli import main
from blockprune.cli.output import print_line, working, wrap_name
from blockprune.cli.signals import sigterm_as_interrupt
from blockprune.costs import paper_memory_bytes
from blockprune.models import resnet20
from blockprune.scoring import score_blocks
from blockprune.tracing import trace_model
from blockprune.tracing.advice import advice

# The command line prints warnings; that it prints the right ones is asserted on stderr.
pytestmark = pytest.mark.filterwarnings("default", "ignore::DeprecationWarning")

RESNET20 = "blockprune:resnet20"
BLOCK_MACS = 4_718_592
DENSE_MACS = 40_813_184

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run the command line in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


def _json(cli: Cli, *arguments: object) -> Any:
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from blockprune.cli import main; sys.argv = ['blockprune', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'sklearn', 'timm'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines()[-1] == "[]"
    for command in ("analyze", "prune", "bench", "criteria", "demo"):
        assert command in ran.stdout


def test_analyze_prints_the_blocks_at_80_columns(cli: Cli) -> None:
    code, out, err = cli("analyze", RESNET20)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "7 removable blocks" in lines[0]
    assert "40,813,184 MACs" in lines[1]
    assert sum("4,718,592" in line for line in lines) == 7
    assert "2 merges refused; --rejections says why." in lines[-1]
    assert max(map(len, lines)) <= 80


def test_analyze_says_why_a_merge_is_refused(cli: Cli) -> None:
    _, out, _ = cli("analyze", RESNET20, "--rejections")
    assert "layer2.0  projection_shortcut  1x32x16x16" in out
    assert "layer3.0  projection_shortcut  1x64x8x8" in out
    assert max(map(len, out.splitlines())) <= 80


def test_analyze_as_json(cli: Cli) -> None:
    found = _json(cli, "analyze", RESNET20)
    assert found["inputs"] == [[1, 3, 32, 32]]
    assert found["macs"] == DENSE_MACS
    assert [b["name"] for b in found["blocks"]][:4] == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        "layer2.1",
    ]
    assert {b["macs"] for b in found["blocks"]} == {BLOCK_MACS}
    assert [r["reason"] for r in found["rejections"]] == ["projection_shortcut"] * 2


def test_granularity_changes_what_a_block_is(cli: Cli) -> None:
    spec = "torchvision:vit_b_32"
    branches = _json(cli, "analyze", spec)["blocks"]
    layers = _json(cli, "analyze", spec, "--granularity", "layer")["blocks"]
    assert (len(branches), len({b["owner"] for b in branches}), len(layers)) == (24, 12, 12)
    _, out, _ = cli("analyze", spec)
    assert max(map(len, out.splitlines())) <= 80
    assert "24 removable blocks (branches) in 12 modules" in out


ROOT_ADDS = """
from torch import nn

class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)

def root(): return Adds()
def child(): return nn.Sequential(Adds(), nn.Linear(4, 2))
"""


def test_a_block_that_is_a_branch_of_the_root_names_it_as_its_owner(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "root_adds.py").write_text(ROOT_ADDS)
    for factory, owner in (("root", "the root"), ("child", "0")):
        spec = (f"root_adds:{factory}", "--input-shape", "2,4")
        rows = [line.split("  ") for line in cli("analyze", *spec)[1].splitlines()]
        owners = {row[0].strip(): row[1:] for row in rows}
        branches = [block["name"] for block in _json(cli, "analyze", *spec)["blocks"]]
        assert len(branches) == 2
        for branch in branches:
            assert owner in [cell.strip() for cell in owners[branch]]
    sys.modules.pop("root_adds", None)


def test_a_model_without_blocks_is_analysed(cli: Cli) -> None:
    code, out, err = cli("analyze", "torchvision:vgg11", "--input-shape", "1,3,32,32")
    assert (code, err) == (0, "")
    assert "0 removable blocks" in out


STOPS = """
import random
import torch
from torch import nn

class Add(nn.Module):
    def __init__(self, branch=None):
        super().__init__()
        self.branch = branch or nn.Linear(4, 4)
    def forward(self, x):
        return x + self.branch(x)

class Positive(Add):
    def forward(self, x):
        return x + self.branch(x) if x.sum() > -1e9 else x

class ByRow(nn.Sequential):
    def forward(self, x):
        return super().forward(torch.stack([row for row in x]))

class Noisy(Add):
    def forward(self, x):
        return x + self.branch(x) * random.random()

class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = Add(), Add()
    def forward(self, x):
        return self.used(x) if x.sum() > -1e9 else self.idle(x)

def whole(): return nn.Sequential(Add(), Add())
def leaves(): return nn.Sequential(Add(), Positive(), *(Positive() for _ in range(4)))
def regions(): return ByRow(Add(), nn.Sequential(Add(), Positive()))
def noisy(): return nn.Sequential(Add(), Noisy())
def idle(): return Idle()
def nothing(): return ByRow(nn.Linear(4, 4))
"""


@pytest.fixture
def stops(tmp_path: Path) -> Iterator[str]:
    """A module of the current folder with models that stop a trace, each in its own way."""
    (tmp_path / "it_stops.py").write_text(STOPS)
    yield "it_stops:"
    sys.modules.pop("it_stops", None)


def _why(cli: Cli, spec: str, *options: object) -> str:
    """Return what --why prints with each run of blanks as one, once its lines are short enough."""
    code, out, err = cli("analyze", spec, "--why", *options)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    return " ".join(out.split())


def test_why_of_a_model_that_is_traced_whole(cli: Cli, stops: str) -> None:
    assert "Traced whole: every module that runs was looked into." in _why(cli, f"{stops}whole")
    found = _json(cli, "analyze", f"{stops}whole")
    assert found["traced"] == {"as": "whole", "regions": [""]}
    assert found["leaves"] == []


def test_a_refused_merge_of_unknown_shape_has_a_dash_for_it(cli: Cli, stops: str) -> None:
    # What a module does that is not looked into, nobody has seen.
    lines = cli("analyze", f"{stops}leaves", "--rejections")[1].splitlines()
    for name in ("1", "2", "3", "4", "5"):
        assert f"{name}  opaque  -" in lines
    assert all(len(one["shape"]) == 4 for one in _json(cli, "analyze", RESNET20)["rejections"])


def test_why_groups_leaves_of_one_class_and_reason(cli: Cli, stops: str) -> None:
    said = _why(cli, f"{stops}leaves")
    assert "Traced whole, but for 5 modules" in said
    assert "5 x Positive: 1, 2, 3 and 2 more" in said
    assert "reason reads numbers from a tensor (bool) (at" in said
    assert "it_stops.py:15: return x + self.branch(x) if x.sum() > -1e9 else x" in said
    assert "effect A block may hide here: its own code adds tensors of one shape." in said
    assert "advice Write the condition on an attribute of the module" in said
    assert said.count("advice") == 1


def test_why_of_a_root_that_is_not_traced(cli: Cli, stops: str) -> None:
    said = _why(cli, f"{stops}regions")
    assert "The root was not traced; 2 modules (0, 1) were traced each by itself." in said
    assert "ByRow: the root" in said
    assert "Nothing is lost: its own code adds no two tensors of one shape." in said
    assert "Inside, 2 modules could be traced: 2 blocks found." in said
    assert "for row in x" in said
    assert "no module inside was traced" in _why(cli, f"{stops}nothing", "--input-shape", "2,4")


def test_why_of_a_part_that_is_not_run(cli: Cli, stops: str) -> None:
    said = _why(cli, f"{stops}idle")
    assert "Add: idle reason not executed by the example inputs" in said
    assert "A block may hide here: nothing in it was run." in said
    assert "Pass example_inputs (--input-shape) that reach it" in said


def test_why_as_json_has_one_entry_for_each_leaf(cli: Cli, stops: str) -> None:
    found = _json(cli, "analyze", f"{stops}regions", "--why")
    assert found["traced"] == {"as": "regions", "regions": ["0", "1"]}
    root, inner = found["leaves"]
    assert (root["name"], root["class"], root["may_merge"]) == ("", "ByRow", False)
    assert (inner["name"], inner["class"], inner["may_merge"]) == ("1.1", "Positive", True)
    assert "condition" in inner["advice"]
    assert inner["reason"].startswith("reads numbers from a tensor (bool)")


def test_a_hint_leads_to_why(cli: Cli, stops: str) -> None:
    assert "--why says which" in cli("analyze", f"{stops}leaves")[1]
    assert "--why" not in cli("analyze", f"{stops}whole")[1]


def test_leaf_modules_keep_a_part_from_stopping_the_rest(cli: Cli, stops: str) -> None:
    spec = f"{stops}noisy"
    said = _why(cli, spec)
    assert "Traced whole, but for 1 module" in said
    assert "Noisy: 1 reason changes Python's random generator in its forward (at" in said
    assert "advice Draw with torch" in said
    said = _why(cli, spec, "--leaf-modules", "Noisy")
    assert "Traced whole, but for 1 module" in said
    assert "reason asked for by leaf_modules (Noisy)" in said
    assert "random generator" not in said


@pytest.mark.parametrize("command", [("analyze",), ("prune", "-p", 1), ("bench", "-p", 1)])
def test_a_pattern_of_no_module_is_refused(cli: Cli, command: tuple[object, ...]) -> None:
    name, *rest = command
    patterns = ("--leaf-modules", "layer1.*", "--leaf-modules", "BasicBlok")
    code, out, err = cli(name, RESNET20, *rest, *patterns)
    assert (code, out) == (1, "")
    assert err.startswith("error: leaf_modules: 'BasicBlok'")
    assert "Did you mean BasicBlock?" in err
    assert len(err.splitlines()) == 1


def test_leaf_modules_and_preserve_root_reach_every_command(cli: Cli, tmp_path: Path) -> None:
    from blockprune import load_ticket

    options = ("--leaf-modules", "layer1.*", "--preserve-root")
    found = _json(cli, "analyze", RESNET20, *options)
    assert [block["name"] for block in found["blocks"]] == [
        "layer2.1",
        "layer2.2",
        "layer3.1",
        "layer3.2",
    ]
    assert "" not in found["traced"]["regions"]
    assert "The root keeps its class, as asked" in _why(cli, RESNET20, "--preserve-root")

    networks = _json(cli, "bench", RESNET20, "-p", "1.0", "-c", "l1", "--repeats", 1, *options)
    assert len(networks["networks"][1]["removed"]) == 4

    _json(cli, "prune", RESNET20, "-p", 1, "-c", "l1", "--out", "t.safetensors", *options)
    ticket = load_ticket(resnet20(), tmp_path / "t.safetensors")
    assert type(ticket) is type(resnet20())


class Stopped(nn.Module):
    """One linear layer, and a forward that is given."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def _draws_with_numpy(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) * float(np.random.rand())


def _counts(layer: nn.Module, x: Tensor) -> Tensor:
    layer.calls = getattr(layer, "calls", 0) + 1
    return layer(x)


def _sets_a_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    y.grad = None
    return y


def _goes_by_a_count(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if x[x[:, 0] > -1].shape[0] > 0 else x


@pytest.mark.parametrize(
    ("forward", "kind", "words"),
    [
        (lambda layer, x: layer(x) if x.sum() > -1e9 else x, "numbers (bool)", "the condition on"),
        (lambda layer, x: layer(x) * x.sum().item(), "numbers (item)", "the condition on"),
        (_goes_by_a_count, "how many numbers", "the condition on"),
        (lambda layer, x: torch.stack([layer(row) for row in x]), "batch size", "of samples"),
        (lambda layer, x: layer(x) + (1 if layer.training else 2), "train mode", "self.training"),
        (lambda layer, x: Doubled.apply(layer(x)), "autograd.Function", "around the call"),
        (lambda layer, x: layer(x) * torch.from_numpy(np.ones(4, "f")), "input", "register_buffer"),
        (_sets_a_gradient, "sets the attribute 'grad'", "detach()"),
        (lambda layer, x: layer(x).requires_grad_(), "calls requires_grad_", "detach()"),
        (lambda layer, x: layer(x) * random.random(), "Python's random", "torch.rand"),
        (_draws_with_numpy, "numpy's random", "torch.rand"),
        (_counts, "attributes", "state in buffers"),
        (lambda layer, x: defaultdict(list, a=layer(x)), "builds a defaultdict", "use_cache"),
        (lambda layer, x: layer(x) if "Float" in x.type() else x, "type of a tensor", "dtype"),
        (lambda layer, x: checkpoint(layer, x, use_reentrant=False), "checkpointing", "is lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_reason_has_its_advice(forward: Callable[..., Any], kind: str, words: str) -> None:
    [reason] = trace_model(Stopped(forward), torch.rand(2, 4)).opaque.values()
    assert kind in reason.partition(" (at ")[0].replace("from a tensor ", "")
    assert words in advice(reason)
    assert advice(reason) != advice("something new")


def test_a_reason_is_not_told_from_the_code_that_it_quotes() -> None:
    assert advice("something new (at a.py:1: with autocast():)") == advice("something new")
    assert advice("something new") != advice("changes the grad or autocast mode")


POST_NORM = """
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.mix_norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.mlp, self.mlp_norm = nn.Linear(4, 4), nn.LayerNorm(4)
    def forward(self, x):
        x = self.mix_norm(x + self.mix(x))
        return self.mlp_norm(x + self.mlp(x))

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
    def forward(self, x):
        return x + self.mix(x)

def net(): return nn.Sequential(Layer(), Layer(), Plain())
"""


def test_layers_that_go_as_an_approximation_are_marked(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "post_norm.py").write_text(POST_NORM)
    spec = "post_norm:net"
    approx = ("--granularity", "layer_approx")
    assert [b["exact"] for b in _json(cli, "analyze", spec, *approx)["blocks"]] == [
        False,
        False,
        True,
    ]
    code, out, err = cli("analyze", spec, *approx)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    marked = {line.split()[0]: line.split()[-1] for line in lines if line[:1].isdigit()}
    assert {name: marked[name] for name in "012"} == {"0": "no", "1": "no", "2": "yes"}
    assert "Where exact is no" in out

    out = cli("analyze", spec, "--granularity", "layer")[1]
    assert "2 layers can go whole as an approximation only" in " ".join(out.split())
    assert "--granularity layer_approx" in out
    assert "exact" not in out
    assert "approximation" not in cli("analyze", spec)[1]


def test_input_shape_sets_the_size(cli: Cli) -> None:
    found = _json(cli, "analyze", RESNET20, "--input-shape", "2,3,16,16")
    assert found["inputs"] == [[2, 3, 16, 16]]
    assert found["macs"] < DENSE_MACS


def test_a_factory_of_the_current_directory(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here_it_is.py").write_text(
        "from blockprune.models import resnet32\n"
        "class Nets:\n    small = staticmethod(resnet32)\n"
        "ready = resnet32()\nnumber = 3\n"
        "def asks(size): return resnet32()\n"
        "def lies(): return 'a net'\n"
    )
    assert len(_json(cli, "analyze", "here_it_is:Nets.small")["blocks"]) == 13
    assert len(_json(cli, "analyze", "here_it_is:ready")["blocks"]) == 13
    for attribute, message in [
        ("number", "neither a model nor a callable"),
        ("asks", "without arguments"),
        ("lies", "gives a str"),
        ("redy", "Did you mean ready"),
    ]:
        code, out, err = cli("analyze", f"here_it_is:{attribute}")
        assert (code, out) == (2, "")
        assert message in err


PAIRS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)
    def forward(self, ids, *, scale):
        x = self.table(ids) * scale
        return x + self.mix(x)

def by_name(): return Two(), {"ids": torch.tensor([[1, 2]]), "scale": torch.ones(1, 2, 4)}
def by_place(): return nn.Linear(3, 2), (torch.rand(5, 3),)
def tensor(): return nn.Linear(3, 2), torch.rand(5, 3)
def alone(): return Two()
def a_list(): return Two(), [1, 2]
def three(): return Two(), {}, 3
def foreign(): return Two(), {"tokens": torch.tensor([[1, 2]])}
"""


def test_a_factory_may_give_example_inputs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    assert _json(cli, "analyze", "pairs:by_name")["inputs"] == [[1, 2], [1, 2, 4]]
    assert _json(cli, "analyze", "pairs:by_place")["inputs"] == [[5, 3]]
    assert _json(cli, "analyze", "pairs:tensor")["inputs"] == [[5, 3]]
    found = _json(cli, "analyze", "pairs:by_place", "--input-shape", "7,3")
    assert found["inputs"] == [[7, 3]]
    options = ("-p", 1, "-c", "l1", "--repeats", 1, "--batch", 3)
    networks = _json(cli, "bench", "pairs:by_name", *options)["networks"]
    assert [len(network["removed"]) for network in networks] == [0, 1]


@pytest.mark.parametrize(
    ("factory", "code", "message"),
    [
        ("a_list", 2, "gives a Two and a list. A factory returns a torch.nn.Module, or (model, "),
        ("three", 2, "gives a Two and a dict and a int. A factory returns"),
        ("foreign", 1, "does not take the example inputs"),
        ("alone", 1, "package.module:factory that returns (model, example_inputs)"),
    ],
)
def test_a_factory_that_gives_something_else(
    cli: Cli, tmp_path: Path, factory: str, code: int, message: str
) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    found, out, err = cli("analyze", f"pairs:{factory}")
    assert (found, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) == 1


LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def alone():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    ))

def with_inputs():
    ids = torch.randint(32, (2, 5))
    return alone(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
"""


def test_a_language_model(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tiny_llama.py").write_text(LLAMA)
    given = _json(cli, "analyze", "tiny_llama:with_inputs")
    assert given["inputs"] == [[2, 5], [2, 5]]
    inferred = _json(cli, "analyze", "tiny_llama:alone", "--input-shape", "2,5")
    assert inferred["inputs"] == [[2, 5]]
    for found in (given, inferred):
        assert [block["name"] for block in found["blocks"]] == [
            "model.layers.0.self_attn",
            "model.layers.0.mlp",
            "model.layers.1.self_attn",
            "model.layers.1.mlp",
        ]
    said = _why(cli, "tiny_llama:with_inputs")
    assert "Inside, 2 modules could be traced: 4 blocks found." in said
    options = ("-p", 1, "-c", "l1", "--granularity", "layer", "--preserve-root")
    pruned = _json(cli, "prune", "tiny_llama:with_inputs", *options)
    assert pruned["ticket"]["params"] < pruned["dense"]["params"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet20", "torchvision:NAME"),
        ("torchvision:", "torchvision:NAME"),
        ("torchvision:resnet51", "Did you mean resnet50"),
        ("timm:convnext_tinny", "Did you mean convnext_tiny"),
        ("blockprune:resnet33", "resnet32"),
        ("no_such_module:net", "does not import"),
    ],
)
def test_a_spec_that_names_nothing(cli: Cli, spec: str, message: str) -> None:
    code, out, err = cli("analyze", spec)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_error_of_the_users_own_code_keeps_its_traceback(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "it_breaks.py").write_text("def net(): raise ZeroDivisionError('mine')\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        cli("analyze", "it_breaks:net")


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "checkpoint", "data_parallel"])
def test_weights_are_loaded(cli: Cli, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(5)
    state = resnet20().state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "checkpoint":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif kind == "data_parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    scored = _json(cli, "prune", RESNET20, "-p", 1, "-c", "l1", "--weights", path, "--seed", 9)
    trained = resnet20()
    trained.load_state_dict(state)
    expected = score_blocks(trained, "l1", example_inputs=torch.zeros(1, 3, 32, 32))
    assert scored["plan"]["scores"] == expected.scores


class Payload:
    """Would run code where a pickle is trusted."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran.txt"), "it ran"))


def test_weights_that_do_not_fit_are_refused(cli: Cli, tmp_path: Path) -> None:
    state = resnet20().state_dict()
    faults = {
        "missing": {key: value for key, value in state.items() if key != "fc.bias"},
        "unknown": {**state, "extra.weight": torch.zeros(2)},
        "another shape": {**state, "fc.bias": torch.zeros(7)},
    }
    for message, fault in faults.items():
        torch.save(fault, tmp_path / "w.pt")
        code, out, err = cli("analyze", RESNET20, "--weights", "w.pt")
        assert (code, out) == (2, "")
        assert message in err
    assert "fc.bias (7, not 10)" in err


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_of_weights_runs_no_code(cli: Cli, tmp_path: Path, name: str) -> None:
    torch.save({"fc.bias": Payload()}, tmp_path / name)
    code, out, err = cli("analyze", RESNET20, "--weights", name)
    assert (code, out) == (2, "")
    assert "cannot be read as a state dict" in err
    assert not (tmp_path / "ran.txt").exists()


def test_a_file_that_is_not_weights(cli: Cli, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "holds no state dict" in cli("analyze", RESNET20, "--weights", "list.pt")[2]
    assert "cannot be read" in cli("analyze", RESNET20, "--weights", "text.pt")[2]
    assert cli("analyze", RESNET20, "--weights", "absent.pt")[0] == 2


def test_prune_writes_a_ticket_that_loads(cli: Cli, tmp_path: Path) -> None:
    from blockprune import load_ticket

    code, out, err = cli("prune", RESNET20, "-p", 2, "-c", "random", "--out", "t.safetensors")
    assert (code, err) == (0, "")
    assert "2 of 7 blocks removed" in out
    assert "t.safetensors" in out
    ticket = load_ticket(resnet20(), tmp_path / "t.safetensors")
    left = sum(p.numel() for p in ticket.parameters())
    assert f"-> {left:,}" in out


def test_prune_warns_once_that_it_saw_no_data(cli: Cli) -> None:
    _, _, err = cli("prune", RESNET20, "-p", 1)
    [line] = err.splitlines()
    assert line.startswith("warning: ")
    assert "random" in line
    assert cli("prune", RESNET20, "-p", 1, "--data", "digits", "--force")[2] == ""


def test_data_must_fit_the_model(cli: Cli) -> None:
    code, _, err = cli("prune", RESNET20, "-p", 1, "--data", "cifar10")
    assert (code, "CIFAR-10" in err) == (1, True)
    # Digits are resized to squares of any size, and to no other shape.
    options = ("--input-shape", "1,3,16,8", "--data", "digits")
    code, _, err = cli("prune", RESNET20, "-p", 1, *options)
    assert (code, "3x8x8" in err) == (1, True)


def test_prune_refuses_an_existing_path_before_any_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.cli import models

    def build(spec: str, seed: int) -> torch.nn.Module:
        pytest.fail(f"{spec} was built with seed {seed}")

    (tmp_path / "t.safetensors").write_text("precious")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(models, "build_model", build)
    for out, message in [
        ("t.safetensors", "--force"),
        ("folder", "is a folder"),
        ("nowhere/t.safetensors", "is no folder"),
    ]:
        code, _, err = cli("prune", RESNET20, "-p", 1, "--out", out)
        assert (code, message in err) == (1, True)
    assert (tmp_path / "t.safetensors").read_text() == "precious"


def test_force_replaces_a_ticket(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "ticket.safetensors").write_text("old")
    assert cli("prune", RESNET20, "-p", 1, "-c", "l1", "--force")[0] == 0
    assert (tmp_path / "ticket.safetensors").read_bytes() != b"old"


def test_protected_blocks_stay(cli: Cli) -> None:
    options = ("--protect", "layer1.*", "--protect", "layer2.*", "-c", "random")
    plan = _json(cli, "prune", RESNET20, "-p", 2, *options)["plan"]
    assert plan["remove"] == ["layer3.1", "layer3.2"]


def test_min_blocks_per_stage(cli: Cli) -> None:
    options = ("--min-blocks-per-stage", 2, "-c", "random", "--out", "two.safetensors")
    plan = _json(cli, "prune", RESNET20, "-p", 3, *options)["plan"]
    stages = [name.split(".")[0] for name in plan["remove"]]
    assert sorted(stages) == ["layer1", "layer2", "layer3"]
    code, _, err = cli("prune", RESNET20, "-p", 4, *options, "--force")
    assert (code, "3" in err) == (1, True)


@pytest.mark.parametrize(
    ("model", "budget", "message"),
    [
        (RESNET20, "8", "7"),
        ("torchvision:vgg11", "1", "no removable"),
    ],
)
def test_what_cannot_be_planned_is_said(cli: Cli, model: str, budget: str, message: str) -> None:
    code, out, err = cli("prune", model, "-p", budget, "-c", "random", "--input-shape", "1,3,32,32")
    assert (code, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "options",
    [
        ("-p", "-1"),
        ("-p", "nan"),
        ("-p", "1.5"),
        ("-p", "two"),
        ("-p", ""),
        ("-p", "1,,2"),
        ("--batch", "0"),
        ("--batch", "-4"),
        ("--batch", "1,x"),
        ("--batch", "99999999"),
        ("--repeats", "0"),
        ("--repeats", "many"),
        ("--device", "toaster"),
        ("--device", "cuda:99"),
        ("--device", "meta"),
        ("--criterion", "grsap"),
        ("--criterion", "no_such_module:score"),
        ("--criterion", "math:no_such_function"),
        ("--criterion", "math:pi"),
        ("--criterion", ":score"),
        ("--criterion", "math:"),
        ("--keep-macs", "0"),
        ("--keep-macs", "1.5"),
        ("--keep-macs", "nan"),
        ("--keep-macs", "-5"),
        ("--keep-params", "half"),
        ("--keep-params", "0.5,"),
        ("--max-latency-ms", "0"),
        ("--max-latency-ms", "fast"),
        ("--max-cache-bytes", "-1"),
        ("--by", "cost"),
        ("--schedule", "oneshot"),
        ("--beam-width", "0"),
        # Without --schedule beam.
        ("--beam-width", "2"),
        ("--input-shape", "1,3,0,0"),
        ("--input-shape", "big"),
        ("--granularity", "stage"),
        ("--data", "imagenette"),
        ("--seed", "-1"),
        ("--min-blocks-per-stage", "-1"),
    ],
    ids="=".join,
)
def test_nonsense_is_refused_before_any_work(
    cli: Cli, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.cli import models

    def build(spec: str, seed: int) -> torch.nn.Module:
        pytest.fail(f"{spec} was built with seed {seed}")

    monkeypatch.setattr(models, "build_model", build)
    code, out, err = cli("bench", RESNET20, *options)
    assert (code, out) == (2, "")
    assert options[0].lstrip("-") in err or options[1] in err
    assert "Traceback" not in err


def test_bench_counts_to_the_unit(cli: Cli) -> None:
    options = ("-p", "1,3,0.5", "-c", "random", "--batch", "1,2", "--repeats", 2)
    found = _json(cli, "bench", RESNET20, *options)
    networks = found["networks"]
    assert [n["name"] for n in networks] == ["dense", "p=1", "p=3", "p=0.5"]
    assert [len(n["removed"]) for n in networks] == [0, 1, 3, 3]
    for network in networks:
        gone = len(network["removed"])
        assert network["macs"] == DENSE_MACS - gone * BLOCK_MACS
        assert network["macs_saved_percent"] == pytest.approx(100 * gone * BLOCK_MACS / DENSE_MACS)
        assert [timed["batch"] for timed in network["latency"]] == [1, 2]
        assert all(timed["median_ms"] > 0 for timed in network["latency"])


@pytest.mark.parametrize(
    ("model", "saved"),
    [
        ("resnet32", {1: "6.826", 3: "20.479", 4: "27.305", 5: "34.131"}),
        ("resnet56", {3: "11.257", 4: "15.010", 5: "18.762", 12: "45.029"}),
    ],
)
def test_bench_prints_the_flops_column_of_the_paper(
    cli: Cli, model: str, saved: dict[int, str]
) -> None:
    budgets = ",".join(map(str, saved))
    options = ("-p", budgets, "-c", "random", "--repeats", 1)
    code, out, err = cli("bench", f"blockprune:{model}", *options)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("p=")}
    assert max(map(len, out.splitlines())) <= 80
    first = out.split("latency ms")[0].splitlines()
    macs = {line.split()[0]: line.split()[-2] for line in first if line.startswith("p=")}
    assert macs == {f"p={p}": percent for p, percent in saved.items()}
    assert set(rows) == set(macs)


def test_bench_says_everything_in_absolute_terms_and_against_dense(cli: Cli) -> None:
    options = ("-p", "1,2", "-c", "random", "--batch", "1,3", "--repeats", 6)
    training = ("--train", "--train-batch", 4, "--epoch-samples", 10, "--watts", 200, "--grid", 0.5)
    found = _json(cli, "bench", RESNET20, *options, *training)
    assert found["complete"]
    assert found["training"] == {
        "batch": 4,
        "epoch_samples": 10,
        "watts": 200.0,
        "grid_kg_per_kwh": 0.5,
    }
    dense, *tickets = found["networks"]
    # The papers' figure of a ResNet20: 4 bytes a layer output, a parameter and a statistic.
    assert dense["paper_memory_bytes"] == paper_memory_bytes(resnet20(), torch.zeros(1, 3, 32, 32))
    for network in (dense, *tickets):
        assert [figures["batch"] for figures in network["memory"]] == [1, 3]
        for figures, whole in zip(network["memory"], dense["memory"], strict=True):
            share = 100 * figures["peak_bytes"] / whole["peak_bytes"]
            assert figures["percent"] == pytest.approx(share)
            assert figures["peak_bytes"] >= figures["state_bytes"] >= 4 * network["params"]
        for figures in network["latency"]:
            low, high = figures["interval_ms"]
            assert low <= figures["median_ms"] <= high
            low, high = figures["percent_interval"]
            assert low <= figures["percent"] <= high
            assert figures["speed_up"] == pytest.approx(100 / figures["percent"])
            in_a_second = 1e3 * figures["batch"] / figures["median_ms"]
            assert figures["samples_per_s"] == pytest.approx(in_a_second)
        trained = network["training"]
        # Ten samples are three steps of four.
        assert trained["epoch_seconds"] == pytest.approx(3 * trained["step_ms"] / 1e3)
        assert trained["kwh"] == pytest.approx(200 * trained["epoch_seconds"] / 3600 / 1000)
        assert trained["co2_kg"] == pytest.approx(0.5 * trained["kwh"])
        assert trained["co2_percent"] == trained["percent"]
        assert [part["part"] for part in trained["energy"]] == ["device"]
    assert dense["latency"][0]["percent"] == dense["training"]["percent"] == 100
    assert dense["training"]["memory"]["percent"] == 100
    peaks = [network["training"]["memory"]["peak_bytes"] for network in (dense, *tickets)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_bench_reads_at_80_columns(cli: Cli) -> None:
    options = ("--keep-macs", 0.8, "-c", "l1", "--batch", "1,16", "--repeats", 2, "--train")
    code, out, err = cli("bench", RESNET20, *options, "--train-batch", 2)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for header in ("latency ms", "memory MB", "paper saved", "epoch s", "CO2 g an epoch"):
        assert header in out
    # Two rounds are too few for an interval.
    assert "the rounds are too few for one" in " ".join(out.split())
    assert "CO2 by formula: kg = 85 W x hours / 1000 x 0.432 kg/kWh" in out


def test_without_train_nothing_is_trained(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.cli import measuring

    for name in ("compare_training", "training_memory", "metered_step"):
        monkeypatch.setattr(measuring, name, lambda *args, **options: pytest.fail("it trained"))
    found = _json(cli, "bench", RESNET20, "-c", "random", "--repeats", 1)
    assert found["training"] is None
    assert [network["training"] for network in found["networks"]] == [None, None]


def test_bench_converts_copies(cli: Cli) -> None:
    options = ("-c", "random", "--repeats", 1)
    plain = _json(cli, "bench", RESNET20, *options)
    half = _json(cli, "bench", RESNET20, *options, "--dtype", "bfloat16", "--channels-last")
    assert (plain["execution"], half["execution"]) == ("", "channels last, bfloat16")
    [[whole], [halved]] = ([n["memory"][0] for n in f["networks"][:1]] for f in (plain, half))
    # Statistics' counters stay 64 bits wide.
    counters = 8 * sum(isinstance(m, nn.BatchNorm2d) for m in resnet20().modules())
    assert 2 * (halved["state_bytes"] - counters) == whole["state_bytes"] - counters


def test_bench_finds_the_saturated_batch(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.cli import bench
    from blockprune.profiling import Saturation

    found = Saturation(2, {1: 1.0, 2: 2.0, 4: 2.0}, "throughput")
    monkeypatch.setattr(bench, "saturated_batch", lambda *args, **options: found)
    options = ("-c", "random", "--repeats", 1, "--batch", "1,saturated,3")
    networks = _json(cli, "bench", RESNET20, *options)["networks"]
    assert [figures["batch"] for figures in networks[1]["latency"]] == [1, 2, 3]


def test_bench_draws_and_writes_what_it_prints(cli: Cli, tmp_path: Path) -> None:
    options = ("-c", "random", "--repeats", 6, "--out", "r.json", "--plot", "r.png")
    found = _json(cli, "bench", RESNET20, *options)
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]
    code, out, err = cli("bench", RESNET20, *options)
    assert (code, out) == (2, "")
    assert "--force" in err
    code, out, _ = cli("bench", RESNET20, *options, "--force")
    assert code == 0
    assert "Written to r.json\nWritten to r.png" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--watts", "200"),
        ("--grid", "0.4"),
        ("--train-batch", "8"),
        ("--epoch-samples", "8"),
        ("--meter-energy",),
        ("--train", "--watts", "0"),
        ("--train", "--watts", "nan"),
        ("--train", "--grid", "-1"),
        ("--train", "--train-batch", "0"),
        ("--train", "--epoch-samples", "0"),
        ("--train", "--watts", "100", "--meter-energy"),
        ("--dtype", "int8"),
        ("--batch", "saturate"),
        ("--out", "."),
        ("--out", "absent/r.json"),
        ("--plot", "r.svg"),
    ],
    ids=" ".join,
)
def test_bench_options_without_sense_are_refused_before_any_work(
    cli: Cli, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from blockprune.cli import models

    monkeypatch.setattr(models, "build_model", lambda *args: pytest.fail("a model was built"))
    code, out, err = cli("bench", RESNET20, *options)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_absent_meter_is_told_before_any_work(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.cli import models

    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr(models, "build_model", lambda *args: pytest.fail("a model was built"))
    code, out, err = cli("bench", RESNET20, "--train", "--meter-energy")
    assert (code, out) == (1, "")
    assert "pip install 'blockprune[carbon]'" in err


def test_metered_energy_is_shown_with_its_sources(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.cli import bench, measuring
    from blockprune.profiling import Energy, EnergyPart

    parts = (EnergyPart("CPU", 3e-6, True, "a counter"), EnergyPart("RAM", 1e-6, False, "a guess"))
    metered = []

    def meter(model: nn.Module, *args: Any, **options: Any) -> Energy:
        # Tickets use half of what the dense network uses.
        metered.append(model)
        return Energy(1.0, parts, options["grid_kg_per_kwh"]).times(len(metered) % 2 or 2)

    monkeypatch.setattr(bench, "check_meter", lambda: None)
    monkeypatch.setattr(measuring, "metered_step", meter)
    options = ("-p", "1,2", "-c", "random", "--repeats", 1, "--train", "--meter-energy")
    options = (*options, "--train-batch", 2, "--epoch-samples", 6)
    networks = _json(cli, "bench", RESNET20, *options)["networks"]
    assert [network["training"]["co2_percent"] for network in networks] == [100.0, 50.0, 50.0]
    assert [n["training"]["kwh"] for n in networks] == pytest.approx([24e-6, 12e-6, 12e-6])
    assert [part["measured"] for part in networks[1]["training"]["energy"]] == [True, False]
    _, out, _ = cli("bench", RESNET20, *options)
    text = " ".join(out.split())
    assert "CPU measured (a counter); RAM estimated (a guess)" in text


def _interrupting(after: int) -> Callable[..., Any]:
    """Return a timing of passes that is interrupted when so many tickets were timed."""
    from blockprune.profiling import compare_latency

    calls = iter(range(after))

    def timing(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return compare_latency(*args, **options)

    return timing


def test_an_interrupted_bench_keeps_the_networks_it_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from blockprune.cli import measuring

    options = ("-p", "1,2,3", "-c", "random", "--repeats", 1, "--out", "r.json")
    monkeypatch.setattr(measuring, "compare_latency", _interrupting(after=2))
    code, out, err = cli("bench", RESNET20, *options)
    assert code == 130
    assert "Unfinished: measured dense, p=1, p=2; in r.json. Missing: p=3." in err
    assert "p=2" in out
    kept = json.loads((tmp_path / "r.json").read_text())
    assert not kept["complete"]
    assert [network["name"] for network in kept["networks"]] == ["dense", "p=1", "p=2"]
    assert all(network["latency"] for network in kept["networks"])

    monkeypatch.setattr(measuring, "compare_latency", _interrupting(after=1))
    code, out, err = cli("bench", RESNET20, "-p", "1,2", "-c", "random", "--repeats", 1, "--json")
    assert code == 130
    assert [network["name"] for network in json.loads(out)["networks"]] == ["dense", "p=1"]
    assert "Missing: p=2." in err


def test_a_bench_interrupted_before_the_first_network(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from blockprune.cli import models

    def interrupt(spec: str, seed: int) -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "build_model", interrupt)
    code, out, err = cli("bench", RESNET20, "--out", "r.json")
    assert (code, out) == (130, "")
    assert "nothing was measured" in err
    assert list(tmp_path.iterdir()) == []


def test_a_ticket_that_fails_takes_no_other_with_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.cli import measuring
    from blockprune.errors import MeasurementError

    timing = _interrupting(after=1)

    def failing(*args: Any, **options: Any) -> Any:
        try:
            return timing(*args, **options)
        except KeyboardInterrupt:
            raise MeasurementError("p=2 does not fit") from None

    monkeypatch.setattr(measuring, "compare_latency", failing)
    code, out, err = cli("bench", RESNET20, "-p", "1,2", "-c", "random", "--repeats", 1)
    assert code == 1
    assert "p=1" in out
    assert err.splitlines() == [
        "Unfinished: measured dense, p=1. Missing: p=2.",
        "error: p=2 does not fit",
    ]


def test_a_bench_that_is_killed_leaves_whole_figures(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from blockprune.cli import main, measuring\n"
        "timing, calls = measuring.compare_latency, iter(range(1))\n"
        "def kill(*args, **options):\n"
        "    if next(calls, None) is None: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return timing(*args, **options)\n"
        "measuring.compare_latency = kill\n"
        "sys.argv = ['blockprune', 'bench', 'blockprune:resnet20', '-p', '1,2', '-c', 'random',\n"
        "            '--repeats', '1', '--out', 'r.json']\n"
        "main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [network["name"] for network in kept["networks"]] == ["dense", "p=1"]
    assert not kept["complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_one_block_and_all_of_them_are_two_budgets(cli: Cli) -> None:
    options = ("-p", "1,1.0,1", "-c", "random", "--repeats", 1, "--batch", "1,1")
    networks = _json(cli, "bench", RESNET20, *options)["networks"]
    assert [len(network["removed"]) for network in networks] == [0, 1, 7]
    assert [len(network["latency"]) for network in networks] == [1, 1, 1]


def test_bench_takes_budgets_on_what_is_left(cli: Cli) -> None:
    options = ("--keep-macs", f"0.9,{DENSE_MACS - 3 * BLOCK_MACS},0.9", "-c", "l1", "--repeats", 1)
    networks = _json(cli, "bench", RESNET20, *options)["networks"]
    labels = ["dense", "keep_macs=0.9", f"keep_macs={DENSE_MACS - 3 * BLOCK_MACS}"]
    assert [network["name"] for network in networks] == labels
    assert [len(network["removed"]) for network in networks] == [0, 1, 3]


@pytest.mark.parametrize("schedule", ["one-shot", "iterative"])
def test_prune_to_a_budget(cli: Cli, schedule: str) -> None:
    options = ("-c", "snip", "--data", "digits", "--schedule", schedule, "--by", "score_per_cost")
    found = _json(cli, "prune", RESNET20, "--keep-params", "0.5", *options)
    assert found["plan"]["budget"] == {"kind": "keep_params", "value": 0.5}
    assert found["plan"]["p"] is None
    assert found["ticket"]["params"] <= found["dense"]["params"] / 2


def test_prune_by_a_beam(cli: Cli) -> None:
    options = ("-p", 2, "-c", "l1", "--force")
    found = _json(cli, "prune", RESNET20, *options, "--schedule", "beam", "--beam-width", 2)
    # What blocks weigh does not depend on what else goes.
    assert found["plan"] == _json(cli, "prune", RESNET20, *options)["plan"]


def test_prune_to_a_latency(cli: Cli) -> None:
    found = _json(cli, "prune", RESNET20, "--max-latency-ms", "1e7", "-c", "l1")
    assert found["plan"]["remove"] == []
    code, out, err = cli("prune", RESNET20, "--max-latency-ms", "1e-9", "-c", "l1", "--force")
    assert (code, out) == (1, "")
    assert "fastest ticket" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "none is given"),
        (("-p", 1, "--keep-macs", 0.5), "-p and --keep-macs are 2"),
        (("--keep-macs", 0.5, "--keep-params", 0.5), "--keep-macs and --keep-params are 2"),
        (("-p", "1,2"), "One ticket has one budget, not 2"),
    ],
)
def test_prune_has_one_budget(cli: Cli, options: tuple[object, ...], message: str) -> None:
    code, out, err = cli("prune", RESNET20, *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_an_impossible_budget_is_one_line(cli: Cli) -> None:
    code, out, err = cli("prune", RESNET20, "--keep-macs", "0.1", "-c", "l1")
    assert (code, out) == (1, "")
    assert err.startswith("error: keep_macs=0.1 allows 4,081,318 of 40,813,184 MACs")
    assert "(19.07 %) are left" in err
    assert len(err.splitlines()) == 1


CRITERIA_OF_MINE = """
from dataclasses import dataclass

def smallest(context):
    return {block.name: float(block.params) for block in context.blocks}

class Largest:
    def __call__(self, context):
        return {block.name: -float(block.params) for block in context.blocks}

@dataclass(frozen=True)
class Scaled:
    factor: float
    def __call__(self, context):
        return {block.name: self.factor * block.params for block in context.blocks}

twice = Scaled(2.0)
nan = Scaled(float("nan"))
number = 3
class Inner:
    smallest = staticmethod(smallest)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    """A module of the current folder with criteria, right and wrong ones."""
    (tmp_path / "of_mine.py").write_text(CRITERIA_OF_MINE)
    yield "of_mine:"
    sys.modules.pop("of_mine", None)


@pytest.mark.parametrize(
    ("attribute", "name", "removed"),
    [
        ("smallest", "smallest", "layer1.0"),
        ("Inner.smallest", "smallest", "layer1.0"),
        ("Largest", "Largest", "layer3.1"),
        ("twice", "Scaled", "layer1.0"),
    ],
)
def test_a_criterion_of_the_current_directory(
    cli: Cli, mine: str, attribute: str, name: str, removed: str
) -> None:
    plan = _json(cli, "prune", RESNET20, "-p", 1, "-c", f"{mine}{attribute}")["plan"]
    assert (plan["criterion"], plan["remove"]) == (name, [removed])
    out = cli("prune", RESNET20, "-p", 1, "-c", f"{mine}{attribute}", "--force")[1]
    assert f"{name} score" in out
    found = _json(cli, "bench", RESNET20, "-c", f"{mine}{attribute}", "--repeats", 1)
    assert found["criterion"] == name


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("of_mine:smalest", "has no attribute 'smalest'. Did you mean smallest"),
        ("of_mine:number", "is a int, which cannot be called"),
        ("of_mine:Scaled", "is a class that cannot be called without arguments"),
        ("no_such_module:score", "no_such_module does not import (ModuleNotFoundError"),
        ("of_mine:", "names nothing. Give a name that `blockprune criteria` lists"),
        ("smallest", "there is no criterion 'smallest'"),
    ],
)
def test_a_criterion_that_is_none(cli: Cli, mine: str, criterion: str, message: str) -> None:
    code, out, err = cli("prune", RESNET20, "-p", 1, "-c", criterion)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_criterion_that_scores_nonsense(cli: Cli, mine: str) -> None:
    code, out, err = cli("prune", RESNET20, "-p", 1, "-c", f"{mine}nan")
    assert (code, out) == (1, "")
    assert "'Scaled' scored block 'layer1.0' nan" in err


def test_criteria_are_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockprune.criteria import CRITERIA

    listed = _json(cli, "criteria")
    assert list(listed) == list(CRITERIA)
    assert all(row["importance"] for row in listed.values())
    _, out, _ = cli("criteria")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line and line[0] != " "] == list(CRITERIA)
    assert max(map(len, lines)) <= 80
    assert all(row["needs"] in out for row in listed.values())

    def of_mine(context: Any) -> dict[str, float]:
        """What I find important."""
        return {}

    monkeypatch.setitem(CRITERIA, "of_mine", of_mine)
    assert _json(cli, "criteria")["of_mine"] == {"needs": "", "importance": of_mine.__doc__}
    assert "of_mine\n    What I find important.\n" in cli("criteria")[1]


def test_demo_gets_its_options_and_gives_its_exit_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockprune.cli import demo

    calls: list[dict[str, object]] = []

    def demo_command(**options: object) -> int:
        calls.append(options)
        return 3

    monkeypatch.setattr(demo, "demo_command", demo_command)
    assert cli("demo", "--quick", "--out", "here", "--seed", 4)[0] == 3
    assert calls == [{"out": Path("here"), "quick": True, "seed": 4, "force": False}]


def test_version(cli: Cli) -> None:
    code, out, _ = cli("--version")
    assert (code, out.split()[0]) == (0, "blockprune")


def test_no_command_prints_the_help(cli: Cli) -> None:
    _, out, err = cli()
    assert "analyze" in out + err


def test_an_end_of_options_alone_is_no_command(cli: Cli) -> None:
    code, out, err = cli("--")
    assert (code, out) == (2, "")
    assert "Missing command." in err


def test_sigterm_is_left_alone_outside_the_main_thread() -> None:
    handlers: list[Any] = [signal.getsignal(signal.SIGTERM)]

    def work() -> None:
        with sigterm_as_interrupt():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(handlers) == 2
    assert handlers[0] == handlers[1] == signal.getsignal(signal.SIGTERM)


def test_a_spinner_turns_on_stderr_for_who_watches_and_shows_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        err = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setenv("TERM", "xterm")
        with working("Analysing [bold]x[/] ..."):
            pass
        assert out.getvalue() == ""
        assert ("Analysing [bold]x[/] ..." in err.getvalue()) == is_shown


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("lm:llama: [bold] 2 blocks")
    assert capsys.readouterr().out == "lm:llama: [bold] 2 blocks\n"


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("a.b", 80, ["a.b"]),
        ("encoder.layers.0", 8, ["encoder.", "layers.0"]),
        ("undotted_but_long", 4, ["undotted_but_long"]),
        ("", 4, [""]),
    ],
)
def test_names_break_at_their_dots(name: str, width: int, lines: list[str]) -> None:
    assert wrap_name(name, width).split("\n") == lines


def test_a_ticket_is_recovered(cli: Cli, tmp_path: Path) -> None:
    from blockprune import load_ticket, recovery_of

    asked = ("-p", 3, "-c", "l1", "--out", "t.safetensors", "--data", "digits")
    assert cli("prune", RESNET20, *asked)[0] == 0
    asked = ("--data", "digits", "--samples", 100, "--out", "r.safetensors")
    code, out, err = cli("recover", "t.safetensors", RESNET20, *asked)
    assert (code, "about what guessing does" in err) == (0, True)
    assert "recovered by refit, from 100 images" in out
    [gap] = recovery_of(load_ticket(resnet20(), tmp_path / "r.safetensors")).gaps
    assert gap.residual_after < gap.residual_before
    for text in (", ".join(gap.blocks), *gap.weights, f"{gap.residual_after:.3f}"):
        assert text in out
    found = _json(cli, "recover", "t.safetensors", RESNET20, *asked, "--method", "map", "--force")
    assert found["recovery"]["method"] == "map"
    # The file that was there is not touched where a name is taken.
    code, _, err = cli("recover", "t.safetensors", RESNET20, *asked)
    assert (code, "--force" in err) == (1, True)


def test_prune_and_recover_in_one_command(cli: Cli, tmp_path: Path) -> None:
    from blockprune import load_ticket, recovery_of

    options = ("-p", 3, "-c", "l1", "--data", "digits", "--recover", "scale", "--samples", 40)
    found = _json(cli, "prune", RESNET20, *options)
    record = recovery_of(load_ticket(resnet20(), tmp_path / "ticket.safetensors"))
    assert found["recovery"] == record.model_dump(mode="json")
    assert (record.method, record.samples) == ("scale", 40)
    _, out, _ = cli("prune", RESNET20, *options, "--force")
    assert "recovered by scale, from 40 images" in out
    code, _, err = cli("prune", RESNET20, "-p", 1, "--recover", "refit", "--force")
    assert (code, "name a data set with --data" in err) == (1, True)


def test_accuracies_stand_beside_the_recovery(cli: Cli) -> None:
    options = ("-p", 2, "-c", "l1", "--data", "digits", "--recover", "refit", "--samples", 40)
    shown = _json(cli, "prune", RESNET20, *options)["accuracy"]
    assert list(shown) == ["dense", "cut", "recovered"]
    _, out, _ = cli("prune", RESNET20, *options, "--force")
    for name, share in shown.items():
        assert [name, f"{100 * share:.1f}"] in [line.split() for line in out.splitlines()]


def test_a_ticket_is_distilled(cli: Cli, tmp_path: Path) -> None:
    from blockprune import load_ticket, recovery_of

    assert cli("prune", RESNET20, "-p", 2, "-c", "l1", "--data", "digits")[0] == 0
    asked = ("recover", "ticket.safetensors", RESNET20, "--data", "digits", "--method", "distill")
    asked += ("--samples", 130, "--epochs", 2, "--lr", "0.01", "--checkpoint", "c.safetensors")
    found = _json(cli, *asked)
    assert (tmp_path / "c.safetensors").exists()
    record = recovery_of(load_ticket(resnet20(), tmp_path / "recovered.safetensors"))
    assert found["recovery"] == record.model_dump(mode="json")
    assert (record.method, record.samples) == ("distill", 130)
    written = (tmp_path / "recovered.safetensors").read_bytes()
    _, out, _ = cli(*asked, "--force")
    assert "recovered by distill, from 130 images" in out
    assert "all are trained" in out
    # From the end of the checkpoint: the same weights.
    assert (tmp_path / "recovered.safetensors").read_bytes() == written
    code, _, err = cli(*asked[:-4], "--lr", "0.02", "--checkpoint", "c.safetensors", "--force")
    assert (code, "another recipe" in err) == (1, True)
    code, _, err = cli(*asked[:5], "--method", "refit", "--epochs", 2, "--force")
    assert (code, "--epochs is for distill" in err) == (2, True)


def test_the_methods_of_recovery_are_those_of_the_package() -> None:
    from blockprune.cli.app import RecoveryMethod
    from blockprune.recovery import METHODS

    assert {method.value for method in RecoveryMethod} == set(METHODS)
