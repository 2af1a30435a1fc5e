from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.costs import (
    Costs,
    RemainingCosts,
    UncountedWarning,
    block_costs,
    counting,
    model_costs,
    node_costs,
    paper_memory_bytes,
)
from blockprune.errors import TraceError
from blockprune.models import resnet20, resnet32, resnet44, resnet56
from blockprune.plan import PruningPlan, named_plan
from blockprune.surgery import cut_blocks
from blockprune.tracing import trace_model
from tests import zoo
from tests.strategies import Architecture, Net, architectures

IMAGE = torch.zeros(1, 3, 32, 32)
IDENTITY_BLOCK_MACS = 4_718_592


@pytest.mark.parametrize(
    ("factory", "macs"),
    [
        (resnet20, 40_813_184),
        (resnet32, 69_124_736),
        (resnet44, 97_436_288),
        (resnet56, 125_747_840),
    ],
)
def test_macs_of_the_papers_networks(factory: Callable[[], nn.Module], macs: int) -> None:
    assert model_costs(factory(), IMAGE).macs == macs


@pytest.mark.parametrize(
    ("factory", "percentages"),
    [
        (resnet32, {1: 6.826, 3: 20.478, 4: 27.304, 5: 34.130}),
        (resnet56, {3: 11.257, 4: 15.009, 5: 18.762, 12: 45.029}),
    ],
)
def test_flops_column_of_table_4(
    factory: Callable[[], nn.Module], percentages: dict[int, float]
) -> None:
    model = factory()
    blocks = block_costs(find_blocks(model, IMAGE))
    assert {block.macs for block in blocks.values()} == {IDENTITY_BLOCK_MACS}
    dense = model_costs(model, IMAGE).macs
    truncated = {p: int(100_000 * p * IDENTITY_BLOCK_MACS / dense) / 1000 for p in percentages}
    assert truncated == percentages


@pytest.mark.parametrize(("factory", "memory"), [(resnet32, 6_141_268), (resnet56, 10_918_740)])
def test_memory_of_table_4_to_the_byte(factory: Callable[[], nn.Module], memory: int) -> None:
    assert paper_memory_bytes(factory(), IMAGE) == memory


def test_a_block_costs_what_a_network_without_it_saves() -> None:
    dense, without = resnet20(), resnet20()
    del without.layer2[1]
    block = block_costs(find_blocks(dense, IMAGE))["layer2.1"]
    before, after = model_costs(dense, IMAGE), model_costs(without, IMAGE)
    assert block == Costs(
        before.params - after.params,
        before.macs - after.macs,
        before.activation_bytes - after.activation_bytes,
    )


def test_costs_grow_with_the_batch_and_parameters_do_not() -> None:
    one, four = model_costs(resnet20(), IMAGE), model_costs(resnet20(), IMAGE.expand(4, 3, 32, 32))
    assert four == Costs(one.params, 4 * one.macs, 4 * one.activation_bytes)


class Function(nn.Module):
    """A module around one function, with a weight so that it is a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def einsum(equation: str) -> Callable[..., Tensor]:
    return lambda *operands: torch.einsum(equation, *operands)


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.matmul, [(2, 3, 4), (4, 5)], 2 * 3 * 5 * 4),
        (torch.matmul, [(3, 4), (7, 4, 5)], 7 * 3 * 5 * 4),
        (torch.matmul, [(3, 4), (4,)], 3 * 4),
        (torch.matmul, [(4,), (4,)], 4),
        (torch.matmul, [(4,), (6, 4, 5)], 6 * 5 * 4),
        (lambda a, b: a @ b, [(1, 3, 4), (6, 4, 5)], 6 * 3 * 5 * 4),
        (torch.mm, [(3, 4), (4, 5)], 60),
        (torch.mv, [(3, 4), (4,)], 12),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
        (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addmm, [(5,), (3, 4), (4, 5)], 60),
        (torch.addmv, [(3,), (3, 4), (4,)], 12),
        (lambda a, b: torch.tensordot(a, b, 2), [(6, 3, 4), (3, 4, 5)], 6 * 5 * 12),
        (functional.linear, [(2, 3, 4), (5, 4)], 120),
        (functional.bilinear, [(7, 3), (7, 4), (5, 3, 4)], 7 * 5 * 4 * (3 + 1)),
        (functional.conv1d, [(2, 3, 9), (4, 3, 3)], 2 * 4 * 7 * 9),
        (functional.conv2d, [(3, 8, 8), (4, 3, 3, 3)], 4 * 36 * 27),
        (
            lambda x, w: functional.conv2d(x, w, stride=2, padding=1, groups=2),
            [(1, 4, 8, 8), (6, 2, 3, 3)],
            6 * 16 * 18,
        ),
        (
            lambda x, w: functional.conv2d(x, w, padding="same", dilation=2),
            [(1, 4, 8, 8), (6, 4, 3, 3)],
            6 * 64 * 36,
        ),
        (functional.conv3d, [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)], 3 * 27 * 16),
        (
            lambda x, w: functional.conv_transpose2d(x, w, stride=2),
            [(1, 4, 5, 5), (4, 6, 3, 3)],
            25 * 4 * 6 * 9,
        ),
        (torchvision.ops.deform_conv2d, [(1, 2, 6, 6), (1, 18, 4, 4), (3, 2, 3, 3)], 16 * 3 * 18),
        (einsum("bij,bjk->bik"), [(2, 3, 4), (2, 4, 5)], 120),
        (einsum("...ij, jk"), [(2, 3, 4), (4, 5)], 120),
        (einsum("ij,jk->k"), [(3, 4), (4, 5)], 20),
        (einsum("ij->ji"), [(3, 4)], 0),
        (einsum("ij,jk,kl->il"), [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        (einsum("b...q,bk...->bqk..."), [(2, 6, 3), (2, 4, 6)], 2 * 3 * 4 * 6),
        (
            functional.scaled_dot_product_attention,
            [(2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6)],
            2 * 3 * 4 * 5 * (8 + 6),
        ),
        (torch.relu, [(3, 4)], 0),
        (torch.add, [(3, 4), (3, 4)], 0),
        (lambda x: functional.adaptive_avg_pool2d(x, 1), [(1, 3, 4, 4)], 0),
        (lambda x: functional.layer_norm(x, (4,)), [(3, 4)], 0),
        (lambda x: functional.group_norm(x, 2), [(1, 4, 3)], 0),
        (lambda x: functional.instance_norm(x), [(1, 4, 3)], 0),
        (lambda x: functional.interpolate(x, scale_factor=2.0), [(1, 4, 3, 3)], 0),
    ],
)
def test_macs_of_single_functions(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int
) -> None:
    inputs = tuple(torch.ones(shape) for shape in shapes)
    function(*inputs)
    assert model_costs(Function(function), inputs).macs == macs


@pytest.mark.parametrize("bidirectional", [False, True])
def test_macs_of_recurrent_layers(bidirectional: bool) -> None:
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        model = kind(5, 6, num_layers=2, bidirectional=bidirectional, batch_first=True)
        ways = 2 if bidirectional else 1
        weights = ways * gates * 6 * ((5 + 6) + (6 * ways + 6))
        assert model_costs(model, torch.zeros(3, 7, 5)).macs == 3 * 7 * weights


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return out


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_macs_of_multihead_attention(need_weights: bool, batch_first: bool, training: bool) -> None:
    batch, length, width = 2, 5, 12
    shape = (batch, length, width) if batch_first else (length, batch, width)
    model = SelfAttention(need_weights, batch_first).train(training)
    projections = 4 * batch * length * width**2
    products = 2 * batch * length**2 * width
    assert model_costs(model, torch.zeros(shape)).macs == projections + products


def test_macs_of_an_encoder_layer_that_has_a_fast_path() -> None:
    model = nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, batch_first=True).eval()
    attention = 4 * 2 * 5 * 12**2 + 2 * 2 * 5**2 * 12
    assert model_costs(model, torch.zeros(2, 5, 12)).macs == attention + 2 * (2 * 5 * 12 * 20)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20,
        num_classes=7,
    )  # fmt: skip


def test_macs_of_a_vision_transformer() -> None:
    tokens, width = 16 + 1, 12
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    mlp = 2 * tokens * width * 20
    patches, head = 16 * width * 3 * 4 * 4, width * 7
    image = torch.zeros(1, 3, 16, 16)
    assert model_costs(small_vit(), image).macs == patches + 2 * (attention + mlp) + head
    blocks = block_costs(find_blocks(small_vit(), image))
    assert [block.macs for block in blocks.values()] == [attention, mlp] * 2


class Repeated(nn.Module):
    """A layer whose attribute, not its shape, tells what it costs; its two modes differ."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x @ self.weight
        return x * 2 if self.training else x


class Odd(nn.Module):
    """Side inputs, in-place writes, dictionaries, and layers that look alike and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Repeated(1), Repeated(3)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.strided = nn.Conv1d(4, 4, 3, padding=1, stride=2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        x = x + self.second(self.first(x)) * scale
        y = self.conv(x.transpose(1, 2))
        y += self.conv(y).relu_()
        left, right = self.strided(y).chunk(2, dim=1)
        return {"left": left, "right": torch.einsum("bij,bik->bjk", right, right)}


@pytest.mark.parametrize(
    ("factory", "inputs"),
    [
        (resnet20, IMAGE),
        (small_vit, torch.zeros(1, 3, 16, 16)),
        (Odd, {"x": torch.zeros(2, 6, 4), "scale": torch.ones(1)}),
        (lambda: SelfAttention(True, True), torch.zeros(2, 5, 12)),
        (lambda: torchvision.models.mobilenet_v3_small(), torch.zeros(1, 3, 32, 32)),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 32, 32)),
        (lambda: torchvision.models.swin_t(), torch.zeros(1, 3, 32, 32)),
    ],
    ids=["resnet20", "vit", "odd", "attention", "mobilenet", "shufflenet", "swin"],
)
def test_nodes_of_a_graph_add_up_to_the_model(
    factory: Callable[[], nn.Module], inputs: Any
) -> None:
    model = factory()
    whole = model_costs(model, inputs)
    (region,) = trace_model(model, inputs).regions
    nodes = node_costs(region).values()
    assert whole.macs > 0
    assert sum(node.macs for node in nodes) == whole.macs
    assert sum(node.activation_bytes for node in nodes) == whole.activation_bytes


# --- what is left without a set of blocks --------------------------------------------------------


def _left_and_real(
    model: nn.Module, inputs: Any, analysis: BlockAnalysis, names: tuple[str, ...], **options: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parameters and MACs left without these blocks: counted, and of the real ticket."""
    left = RemainingCosts(analysis).without(names)
    plan = named_plan(analysis, names)
    real = model_costs(cut_blocks(model, analysis, plan, **options), inputs)
    return (left.params, left.macs), (real.params, real.macs)


@pytest.mark.parametrize("entry", zoo.cases(zoo.ENTRIES))
@pytest.mark.parametrize("preserve_root", [False, True], ids=["graph", "root"])
def test_what_is_left_is_what_the_ticket_costs(entry: zoo.Entry, preserve_root: bool) -> None:
    net, inputs = entry.build(), entry.example()
    analysis = find_blocks(net, inputs, preserve_root=preserve_root)
    names = analysis.names
    drawn = random.Random(entry.name)
    some = tuple(name for name in names if drawn.random() < 0.5)
    for chosen in dict.fromkeys([(), names[:1], names[-1:], some, names]):
        with warnings.catch_warnings():
            # Pass-throughs that stay in a list are told of, and cost nothing.
            warnings.filterwarnings("ignore", message="pass-throughs stay")
            left, real = _left_and_real(net, inputs, analysis, chosen, verify=False)
        assert left == real, chosen


@given(architectures, st.data())
def test_what_is_left_of_random_nets_is_what_the_ticket_costs(
    spec: Architecture, data: st.DataObject
) -> None:
    net, x = Net(spec), torch.ones(2, 3, 6, 6)
    analysis = find_blocks(net, x)
    names = tuple(name for name in analysis.names if data.draw(st.booleans()))
    left, real = _left_and_real(net, x, analysis, names, verify=False)
    assert left == real


@pytest.mark.parametrize("entry", zoo.cases(zoo.ENTRIES))
def test_one_block_less_leaves_what_its_costs_say(entry: zoo.Entry) -> None:
    analysis = find_blocks(entry.build(), entry.example())
    remaining, table = RemainingCosts(analysis), block_costs(analysis)
    nothing = remaining.without(())
    for name, block in table.items():
        left = remaining.without([name])
        assert nothing.params - left.params == block.params == analysis.block(name).params


class Around(nn.Module):
    """A root that does not trace; its one inner region is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Inside(), Inside())

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > -1e9:
            for _ in range(3):
                x = self.inner(x)
        return x


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mix(x)
        return out


def test_a_region_that_is_called_again_is_counted_again() -> None:
    x = torch.ones(2, 4)
    analysis = find_blocks(Around(), x)
    assert [region.path for region in analysis.traced.regions] == ["inner"]
    remaining = RemainingCosts(analysis)
    one_call = 2 * 4 * 4
    assert remaining.dense.macs == 3 * 3 * one_call
    first, second = analysis.names
    assert remaining.without([first]).macs == 3 * 2 * one_call
    assert remaining.without([first, second]).macs == 3 * one_call


class Looped(nn.Module):
    """A block around a module that traces only by itself, with a block inside."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(x)
        return out


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.around = Around()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.around(x)
        return out


def test_what_runs_inside_an_operation_that_goes_is_not_taken_off_twice() -> None:
    net, x = Looped(), torch.ones(2, 4)
    analysis = find_blocks(net, x)
    assert [region.path for region in analysis.traced.regions] == ["", "outer.around.inner"]
    for names in [(), analysis.names, *((name,) for name in analysis.names), analysis.names[1:]]:
        left, real = _left_and_real(net, x, analysis, names)
        assert left == real, names
    assert RemainingCosts(analysis).without(["outer"]) == Costs(0, 0, 0)


def test_asking_again_runs_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    remaining = RemainingCosts(find_blocks(resnet20(), IMAGE))
    everything = remaining.without(["layer1.0", "layer2.1", "layer3.1"])

    def measure(*args: Any) -> Any:
        pytest.fail("an operation was run")

    monkeypatch.setattr(counting, "_measure", measure)
    assert remaining.without(["layer3.1", "layer1.0", "layer2.1"]) == everything
    assert remaining.of("macs")(["layer1.0"]) == remaining.dense.macs - IDENTITY_BLOCK_MACS
    assert remaining.of("params").total == remaining.dense.params


def test_equal_operations_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    measure = counting._measure

    def recording(*args: Any) -> Any:
        runs.append(args)
        return measure(*args)

    monkeypatch.setattr(counting, "_measure", recording)
    shallow = find_blocks(resnet20(), IMAGE)
    block_costs(shallow)
    first = len(runs)
    block_costs(find_blocks(resnet56(), IMAGE))
    assert first > 0
    assert len(runs) == 2 * first


def test_an_operation_that_refuses_zeros_is_reported_and_counts_nothing() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(x) @ x

    (region,) = trace_model(Inverse(), torch.eye(3)[None]).regions
    with pytest.warns(UncountedWarning, match=r"linalg_inv.*counted as 0"):
        nodes = node_costs(region)
    assert sum(node.macs for node in nodes.values()) == 27


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    found = model_costs(model, torch.zeros(1, 4))
    assert (found.params, found.macs) == (20, 32)


def test_activation_bytes_follow_the_dtype() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.zeros(2, 4)
    assert model_costs(model, x).activation_bytes == 2 * (2 * 6) * 4
    assert model_costs(model.double(), x.double()).activation_bytes == 2 * (2 * 6) * 8


class Watched(nn.Module):
    """Everything that counting could disturb: dropout, statistics, hooks, a call counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        x = self.conv(x)
        return x + self.drop(self.norm(self.conv(x[:, :3]))) * noise


def test_counting_changes_nothing() -> None:
    model = Watched()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    seen: list[int] = []
    model.conv.register_forward_hook(lambda *_: seen.append(1))
    x = torch.rand(2, 3, 5, 5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    kept = x.clone()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model_costs(model, x)
    block_costs(find_blocks(model, x))
    with pytest.raises(TraceError):
        model_costs(model, torch.zeros(2, 7, 5, 5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert torch.backends.mha.get_fastpath_enabled()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.conv.weight.grad is not None
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert [len(module._forward_hooks) for module in model.modules()] == [0, 1, 0, 0]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (model.calls, seen) == (0, [])
    assert torch.equal(x, kept)


def test_wrong_inputs_quote_the_models_own_error() -> None:
    with pytest.raises(TraceError, match=r"ResNet.*\(1, 7, 32, 32\).*7 channels"):
        model_costs(resnet20(), torch.zeros(1, 7, 32, 32))


def test_counting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_costs(Watched(), torch.rand(2, 3, 5, 5)).macs > 0


def test_a_ticket_called_as_it_was_not_cut_says_so_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            x = x + self.first(x)
            return x + self.second(x) if twice else x

    inputs = {"x": torch.ones(2, 4), "twice": True}
    model = Twice()
    analysis = find_blocks(model, inputs)
    plan = PruningPlan(
        remove=analysis.names[:1], granularity="branch", fingerprint=analysis.fingerprint
    )
    ticket = cut_blocks(model, analysis, plan)
    assert model_costs(ticket, inputs).macs == 2 * 4 * 4
    with pytest.raises(TraceError, match=r"^this ticket was cut with twice=True"):
        model_costs(ticket, torch.ones(2, 4))


def test_parameters_that_no_forward_reads_stay_where_the_class_stays() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Parameter(torch.zeros(7))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.used(x)

    model, x = nn.Sequential(Spare(), Spare()), torch.ones(2, 4)
    analysis = find_blocks(model, x, preserve_root=True)
    assert RemainingCosts(analysis).without(()).params == 2 * (20 + 7)
    left, real = _left_and_real(model, x, analysis, analysis.names[:1])
    # Code around what became a graph may read them.
    assert left == real == (20 + 2 * 7, 2 * 4 * 4)
