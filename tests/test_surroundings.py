"""What surrounds a model: wrappers, modes of torch, hooks, and code that reads its modules."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.models import resnet20

IMAGES = (2, 3, 8, 8)


def test_a_compiled_model_is_analysed_as_the_model_it_wraps() -> None:
    inner = resnet20()
    names = blockprune.find_blocks(inner, torch.rand(IMAGES)).names
    found = blockprune.find_blocks(torch.compile(inner), torch.rand(IMAGES)).names
    assert found == tuple(f"_orig_mod.{name}" for name in names)


@pytest.mark.parametrize("package", ["blockprune.lottery", "blockprune.robustness"])
def test_names_that_load_late_are_listed_early(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_a_data_parallel_wrapper_is_looked_into() -> None:
    dense, images = nn.DataParallel(resnet20()).eval(), torch.rand(IMAGES)
    ticket = blockprune.remove_blocks(dense, "module.layer1.1", images)
    by_hand = blockprune.remove_blocks(dense.module, "layer1.1", images)
    assert torch.equal(ticket(images), by_hand(images))


def test_a_torchscript_module_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated, and still met
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(blockprune.TraceError, match="TorchScript"):
        blockprune.find_blocks(scripted, torch.rand(1, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_ticket_cut_without_gradients_trains(mode: type) -> None:
    dense = resnet20()
    with mode():
        ticket = blockprune.remove_blocks(dense, "layer1.1", torch.rand(IMAGES))
    ticket(torch.rand(IMAGES)).sum().backward()
    assert all(parameter.grad is not None for parameter in ticket.parameters())


def test_garbage_collection_is_on_again_after_an_analysis() -> None:
    assert gc.isenabled()
    blockprune.find_blocks(resnet20(), torch.rand(IMAGES))
    assert gc.isenabled()
    with pytest.raises(blockprune.TraceError):
        blockprune.find_blocks(resnet20(), torch.rand(1, 4, 8, 8))
    assert gc.isenabled()


def test_user_hooks_neither_run_nor_vanish_and_lost_ones_are_told() -> None:
    dense, calls = resnet20(), []
    dense.conv1.register_forward_hook(lambda *_: calls.append("layer"))
    dense.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    with pytest.warns(UserWarning, match=r"hooks of 'layer1\.0' are not carried"):
        ticket = blockprune.remove_blocks(dense, "layer1.1", torch.rand(IMAGES))
    assert calls == []
    dense(torch.rand(IMAGES))
    assert calls == ["layer", "block"]
    ticket(torch.rand(IMAGES))
    assert calls == ["layer", "block", "layer"]


class TestTransformerEncoder:
    """Its forward does not trace, and reads attributes of its first layer's attention."""

    @pytest.fixture
    def dense(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        # The layers are copies of one; let them differ.
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.3)
        return encoder.eval()

    @staticmethod
    def _without_first_attention(dense: nn.Module) -> nn.Module:
        reference = copy.deepcopy(dense)
        nn.init.zeros_(reference.layers[0].self_attn.out_proj.weight)
        nn.init.zeros_(reference.layers[0].self_attn.out_proj.bias)
        return reference

    def test_the_first_attention_can_go(self, dense: nn.Module) -> None:
        tokens = torch.rand(2, 5, 8)
        ticket = blockprune.remove_blocks(dense, "layers.0.self_attn", tokens)
        expected = self._without_first_attention(dense)(tokens)
        for module in (ticket, copy.deepcopy(ticket)):
            assert torch.allclose(module(tokens), expected, atol=1e-5)
        assert not any("layers.0.self_attn" in name for name, _ in ticket.named_modules())

    def test_a_whole_layer_can_go(self, dense: nn.Module) -> None:
        tokens = torch.rand(2, 5, 8)
        analysis = blockprune.find_blocks(dense, tokens, granularity="layer")
        assert analysis.names == ("layers.0", "layers.1", "layers.2")
        ticket = blockprune.prune(
            dense, "random", 2, example_inputs=tokens, granularity="layer", protect="layers.2"
        )
        assert torch.allclose(ticket(tokens), dense.layers[2](tokens), atol=1e-5)


class Checked(nn.Module):
    """A block that asserts something about its own branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.f(x)
        torch._assert(hidden.shape[-1] == 4, "wrong width")
        _, _ = hidden.size()
        return x + hidden.relu()


def test_an_assertion_about_a_branch_goes_with_it() -> None:
    dense, x = nn.Sequential(nn.Linear(4, 4), Checked(), Checked()), torch.rand(2, 4)
    analysis = blockprune.find_blocks(dense, x)
    assert analysis.names == ("1", "2")
    ticket = blockprune.remove_blocks(dense, analysis.names, x)
    assert ticket.code.count("_assert") == 0
    assert torch.equal(ticket(x), dense[0](x))


def test_an_argument_that_was_a_constant_is_guarded() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + self.f(x if mask is None else x * mask)

    dense, x = Masked(), torch.rand(2, 4)
    ticket = blockprune.remove_blocks(dense, [], x)
    assert torch.equal(ticket(x), dense(x))
    assert torch.equal(ticket(x, mask=None), dense(x))
    with pytest.raises(
        blockprune.TraceError, match=r"cut with mask=None.*tensor of shape \(2, 4\)"
    ):
        ticket(x, torch.ones(2, 4))


class ChangesLayout(nn.Module):
    """Without the branch its sum lies in memory in another order, in which dropout would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).contiguous(memory_format=torch.channels_last) + x
        out: Tensor = self.head(self.drop(x))
        return out


def test_dropout_behind_a_change_of_memory_layout_is_verified() -> None:
    ticket = blockprune.remove_blocks(ChangesLayout().eval(), ["conv"], torch.randn(2, 4, 5, 5))
    assert not any(name.startswith("conv") for name, _ in ticket.named_parameters())


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out


class _Pair(nn.Module):
    """Returns the input of its block, and the block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.block = _Sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.relu(self.stem(x))
        return first, self.block(first)


class _Writer(nn.Module):
    """Cannot be traced, and writes into one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = _Pair()
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(x)
        if second.sum() > 1e9:
            second = -second
        second.mul_(3)
        out: Tensor = self.head(first) + self.head(second)
        return out


def test_code_around_a_region_may_write_into_what_it_is_given() -> None:
    torch.manual_seed(0)
    model, images = _Writer(), torch.rand(IMAGES)
    ticket = blockprune.remove_blocks(model, "pair.block", images)
    ticket(images).sum().backward()
    # By hand: a branch of zeros adds nothing.
    nn.init.zeros_(model.pair.block.conv.weight)
    nn.init.zeros_(model.pair.block.conv.bias)
    model(images).sum().backward()
    assert torch.equal(ticket(images), model(images))
    for name, parameter in ticket.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)
