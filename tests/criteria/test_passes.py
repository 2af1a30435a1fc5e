"""Passes that leave a block out, against the dense model run eagerly with that branch zeroed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, ResidualBlock, find_blocks
from blockprune.criteria import ScoringContext
from blockprune.criteria.passes import Passes
from blockprune.tracing import as_call, isolated, tensors_in
from tests import zoo
from tests.criteria.nets import Net, pair
from tests.oracle import Hook, Tap, call, fresh, zeroed
from tests.strategies import Architecture, architectures, truth
from tests.strategies import Net as RandomNet

LIMITS = (0, 3000, 2**30)
# Their branches are not named one by one in the zoo.
NAMED = [e for e in zoo.ENTRIES if e.branches and all(b.name for b in e.branches)]


def passes_of(model: nn.Module, analysis: BlockAnalysis) -> Passes:
    return Passes(copy.deepcopy(model).eval(), analysis, analysis.blocks)


def assert_close(found: Any, expected: Any, what: object) -> None:
    mine, theirs = list(tensors_in(found)), list(tensors_in(expected))
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=str(what))


def check(
    model: nn.Module, inputs: Any, zeros: Mapping[str, Tap | Hook], granularity: str = "branch"
) -> None:
    """Every way of leaving a block out gives what the eager model with zeros gives."""
    analysis = find_blocks(model, inputs, granularity)
    expected: dict[str | None, Any] = {}
    for block in (None, *analysis.blocks):
        eager = copy.deepcopy(model).eval()
        names = () if block is None else block.branches
        with torch.no_grad(), zeroed(eager, [zeros[name] for name in names]):
            expected[block and block.name] = call(eager, inputs)
    example = as_call(model, fresh(inputs))
    with isolated():
        passes = passes_of(model, analysis)
        for block in (None, *analysis.blocks):
            with torch.no_grad():
                assert_close(passes.run(example, block), expected[block and block.name], block)
        for limit in LIMITS:
            seen = []
            for block, outputs in passes.leave_one_out(example, limit):
                name = block and block.name
                seen.append(name)
                assert_close(outputs, expected[name], (name, limit))
            assert sorted(map(str, seen)) == sorted(map(str, (None, *analysis.names)))
            assert seen[0] is None
    assert_close((example.args, example.kwargs), fresh(inputs), "inputs")


@pytest.mark.parametrize("entry", zoo.cases(NAMED))
def test_each_block_left_out_of_every_net_of_the_zoo(entry: zoo.Entry) -> None:
    check(entry.build(), entry.example(), entry.zeros)


@given(architectures)
def test_each_block_left_out_of_random_nets(spec: Architecture) -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6)
    check(RandomNet(spec), (images,), truth(spec).removable)


@pytest.mark.parametrize("granularity", ["branch", "layer"])
def test_a_model_whose_root_is_no_graph(granularity: str) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(encoder, 3, enable_nested_tensor=False).eval()
    inputs = torch.randn(2, 5, 8)
    analysis = find_blocks(model, inputs, granularity, preserve_root=True)
    assert all(region.path for region in analysis.traced.regions)
    ends = [[f"layers.{i}.dropout1", f"layers.{i}.dropout2"] for i in range(3)]
    left_out = ends if granularity == "layer" else [[name] for pair in ends for name in pair]
    with isolated(), torch.no_grad():
        outputs = passes_of(model, analysis).leave_one_out(as_call(model, inputs), 2**30)
        found = [out for _, out in outputs]
        assert_close(found[0], model(inputs), "dense")
        assert len(found) == 1 + len(left_out)
        for names, output in zip(left_out, found[1:], strict=True):
            with zeroed(model, map(Hook, names)):
                assert_close(output, model(inputs), names)


def test_layers_of_a_graph_are_left_out_whole() -> None:
    entry = zoo.BY_NAME["resnet_one_by_one"]
    model, inputs = entry.build(), entry.example()
    check(model, inputs, entry.zeros, "layer")


def test_what_flows_through_each_block_is_what_its_module_sees() -> None:
    model, (images, _) = Net().eval(), pair(5)
    analysis = find_blocks(model, images)
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for name in analysis.names:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: expected.update({name: (args[0].clone(), out.clone())})
        )
    with torch.no_grad():
        logits = model(images)
    seen: list[str] = []

    def see(block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        seen.append(block.name)
        torch.testing.assert_close(entering, expected[block.name][0])
        torch.testing.assert_close(leaving, expected[block.name][1])

    with isolated():
        found = passes_of(model, analysis).observe(as_call(model, images), see)
    assert seen == list(analysis.names)
    torch.testing.assert_close(found, logits)


class InPlace(nn.Module):
    """The merge is written over the shortcut, and an activation over the merge."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, inputs, outputs = x * 1, [], []
        for layer in self.layers:
            inputs.append(x.detach().clone())
            x += layer(x)
            x = torch.relu_(x)
            outputs.append(x.detach().clone())
        return x, inputs, outputs


def test_what_entered_a_block_is_shown_though_it_was_overwritten() -> None:
    torch.manual_seed(3)
    model, inputs = InPlace().eval(), torch.randn(3, 4)
    analysis = find_blocks(model, inputs)
    assert len(analysis.blocks) == 2
    with torch.no_grad():
        _, before, after = model(inputs)
    entered, left = [], []

    def see(block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        entered.append(entering.clone())
        left.append(leaving.clone())

    with isolated():
        passes_of(model, analysis).observe(as_call(model, inputs), see)
    for found, expected in ((entered, before), (left, after)):
        assert len(found) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x)
        return out


class Repeated(nn.Module):
    """One residual module as often as the data say, which no graph of the root can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.shape[0] + (x.sum() > 1e9))):
            x = self.block(x)
        return x


def test_a_block_in_a_module_that_is_called_twice_is_shown_twice() -> None:
    model, inputs = Repeated().eval(), torch.randn(2, 4)
    analysis = find_blocks(model, inputs)
    assert analysis.names == ("block",)
    seen: list[str] = []
    with isolated(), torch.no_grad():
        passes = passes_of(model, analysis)
        passes.observe(as_call(model, inputs), lambda block, x, y: seen.append(block.name))
        outputs = [out for _, out in passes.leave_one_out(as_call(model, inputs), 2**30)]
        assert torch.equal(outputs[0], model(inputs))
    assert seen == ["block", "block"]
    assert torch.equal(outputs[1], inputs)


@pytest.mark.parametrize(
    ("limit", "convolutions"),
    # The second pass ends where the last block does.
    [(2**30, 7 + 4 + 2 + 0), (0, 7 + 7 + 4 + 2 + 0)],
)
def test_a_block_costs_its_tail_and_a_small_cache_one_more_pass(
    limit: int, convolutions: int
) -> None:
    """`Net` has a stem and three blocks of two convolutions."""
    model, (images, _) = Net().eval(), pair(2)
    analysis = find_blocks(model, images)
    calls = []
    with isolated():
        passes = passes_of(model, analysis)
        for module in passes.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        assert len(list(passes.leave_one_out(as_call(model, images), limit))) == 4
    assert len(calls) == convolutions


def test_cached_and_not_cached_agree_bit_by_bit_and_draw_the_same() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x + torch.randn_like(x))
            return logits + torch.randn_like(logits)

    model, (images, _) = Noisy().eval(), pair(3)
    analysis = find_blocks(model, images)
    runs = []
    for limit in (0, 20_000, 2**30):
        with isolated():
            torch.manual_seed(5)
            passes = passes_of(model, analysis)
            outputs = passes.leave_one_out(as_call(model, images), limit)
            runs.append([out.clone() for _, out in outputs])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_nothing_is_kept_behind_a_pass() -> None:
    model, (images, _) = Net().eval(), pair(2)
    analysis = find_blocks(model, images)
    tensors: list[weakref.ref[Tensor]] = []

    def see(block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        tensors.extend((weakref.ref(entering), weakref.ref(leaving)))

    with isolated():
        passes = passes_of(model, analysis)
        passes.observe(as_call(model, images), see)
        for _, outputs in passes.leave_one_out(as_call(model, images), 2**30):
            tensors.append(weakref.ref(outputs))
        del outputs
    gc.collect()
    assert all(reference() is None for reference in tensors)


def test_a_context_without_an_analysis_says_so() -> None:
    scoring = ScoringContext(Net(), (), [], as_call(Net(), pair(2)[0]))
    with pytest.raises(Exception, match="needs the analysis"):
        _ = scoring.passes


def test_what_a_module_hands_through_is_there_when_its_branch_is_left_out() -> None:
    """An attention that returns its bias beside its output: the bias is read behind the block."""

    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            if float(x.abs().max()) > 1e9:
                raise ValueError("too large")
            return self.mix(x) + bias, bias

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = Handing(), nn.Linear(8, 8)

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            mixed, bias = self.attention(x, bias + 1)
            x = x + mixed
            return x + self.mlp(x).relu() + bias, bias

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            for layer in self.layers:
                x, bias = layer(x, bias)
            return x * bias

    def zero(module: nn.Module, args: Any, out: Any) -> Any:
        return (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out

    torch.manual_seed(0)
    model, inputs = Stack().eval(), (torch.randn(2, 5, 8), torch.randn(8))
    analysis = find_blocks(model, inputs)
    assert {f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")} == set(
        analysis.names
    )
    for limit in LIMITS:
        with isolated(), torch.no_grad():
            outputs = passes_of(model, analysis).leave_one_out(as_call(model, inputs), limit)
            for block, found in outputs:
                eager = copy.deepcopy(model)
                if block is not None:
                    eager.get_submodule(block.name).register_forward_hook(zero)
                assert_close(found, eager(*inputs), (block, limit))
