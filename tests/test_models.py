"""The paper's networks, held against its figures and against a formula written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from blockprune.costs import model_costs
from blockprune.models import ResNet, resnet20, resnet32, resnet44, resnet56, resnet110

FACTORIES = [(resnet20, 3), (resnet32, 5), (resnet44, 7), (resnet56, 9), (resnet110, 18)]
TABLE = [
    (resnet20, 274_442, 40_813_184, 784),
    (resnet32, 470_218, 69_124_736, 1_232),
    (resnet44, 665_994, 97_436_288, 1_680),
    (resnet56, 861_770, 125_747_840, 2_128),
]


def _with_statistics(model: nn.Module) -> int:
    statistics = [b for name, b in model.named_buffers() if "running" in name]
    return sum(t.numel() for t in [*model.parameters(), *statistics])


def _by_hand(n: int, classes: int, channels: int, side: int) -> tuple[int, int]:
    """Parameters without statistics, and MACs, counted layer by layer."""
    layers = [(channels, 16, 3, side)]
    params, before = 2 * 16, 16
    for width, size in zip((16, 32, 64), (side, side // 2, side // 4), strict=True):
        for k in range(n):
            layers += [(before, width, 3, size), (width, width, 3, size)]
            params += 2 * 2 * width
            if k == 0 and width != 16:
                layers.append((before, width, 1, size))
            before = width
    params += sum(i * o * k * k + o for i, o, k, _ in layers) + 64 * classes + classes
    macs = sum(i * o * k * k * s * s for i, o, k, s in layers) + 64 * classes
    return params, macs


@pytest.mark.parametrize(("factory", "params", "macs", "filters"), TABLE)
def test_the_table_of_the_paper(
    factory: Callable[[], ResNet], params: int, macs: int, filters: int
) -> None:
    model = factory()
    assert _with_statistics(model) == params
    assert model_costs(model, torch.zeros(1, 3, 32, 32)).macs == macs
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(convolution.out_channels for convolution in convolutions) == filters


@pytest.mark.parametrize(("factory", "n"), FACTORIES)
@pytest.mark.parametrize(("classes", "channels", "side"), [(10, 3, 32), (7, 1, 8)])
def test_costs_equal_the_formula(
    factory: Callable[..., ResNet], n: int, classes: int, channels: int, side: int
) -> None:
    model = factory(num_classes=classes, in_channels=channels)
    costs = model_costs(model, torch.zeros(1, channels, side, side))
    assert (costs.params, costs.macs) == _by_hand(n, classes, channels, side)


def test_children_are_those_of_the_agreed_layout() -> None:
    model = resnet32()
    assert [name for name, _ in model.named_children()] == [
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "fc",
    ]
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [5, 5, 5]
    assert model.image_size == 32


def test_projection_shortcuts_are_bare_convolutions_with_bias() -> None:
    shortcuts = {
        name: module for name, module in resnet20().named_modules() if name.endswith("downsample")
    }
    assert sorted(shortcuts) == ["layer2.0.downsample", "layer3.0.downsample"]
    for module in shortcuts.values():
        assert isinstance(module, nn.Conv2d)
        assert (module.kernel_size, module.stride) == ((1, 1), (2, 2))
        assert module.bias is not None


def test_weights_start_he_normal_and_biases_at_zero() -> None:
    model = resnet110()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            if module.weight.numel() >= 9_216:  # enough draws for a tight bound
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
            assert module.bias is not None
            assert not module.bias.any()


def test_the_forward_pass_equals_one_written_out() -> None:
    model = resnet20(num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randn(2, 3, 16, 16)
        x = model.bn1(model.conv1(images)).relu()
        for stage in (model.layer1, model.layer2, model.layer3):
            for block in stage:
                branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
                x = (branch + (block.downsample or nn.Identity())(x)).relu()
        torch.testing.assert_close(model(images), model.fc(x.mean(dim=(2, 3))))


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_a_size_below_one_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        resnet20(**{argument: 0})
