"""The papers' networks, held against its figures and against a formula written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from blockprune import find_blocks, make_plan, score_blocks
from blockprune.costs import model_costs
from blockprune.errors import MissingExtraError, ModelSpecError, PlanError
from blockprune.models import (
    ResNet,
    lenet300,
    resnet18,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    vgg16,
    vgg19,
)
from blockprune.models.building import model_factory

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


# --- the networks of papers/003 and papers/004 ----------------------------------------------------


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spec", "arguments", "shape", "published"),
    [
        # Frankle and Carbin, 2019, Figure 2: 266K, and 20.0M; kuangliu's CIFAR ResNet18: 11.17M.
        ("lenet300", {}, (2, 1, 28, 28), 266_610),
        ("vgg19", {}, (2, 3, 32, 32), 20_040_522),
        ("vgg16", {}, (2, 3, 32, 32), 14_728_266),
        ("resnet18", {}, (2, 3, 32, 32), 11_173_962),
    ],
)
def test_parameters_are_the_published_ones(
    spec: str, arguments: dict[str, int], shape: tuple[int, ...], published: int
) -> None:
    model = model_factory(f"blockprune:{spec}", arguments)()
    assert isinstance(model, nn.Module)
    assert _count(model) == published
    assert model.eval()(torch.rand(shape)).shape == (2, 10)


@pytest.mark.parametrize("spec", ["lenet300", "vgg16", "vgg19", "resnet18"])
def test_they_are_built_for_digits_too(spec: str) -> None:
    arguments = {"in_channels": 1, "num_classes": 7, "image_size": 8}
    model = model_factory(f"blockprune:{spec}", arguments)()
    assert isinstance(model, nn.Module)
    for mode in (True, False):
        assert model.train(mode)(torch.rand(2, 1, 8, 8)).shape == (2, 7)


def test_lenet300_layer_by_layer() -> None:
    sizes = [(784, 300), (300, 100), (100, 10)]
    assert sum(i * o + o for i, o in sizes) == 266_610
    model = lenet300(in_features=12).eval()
    images = torch.rand(2, 3, 2, 2)
    hidden = model.fc2(model.fc1(images.reshape(2, 12)).clamp(min=0)).clamp(min=0)
    torch.testing.assert_close(model(images), model.fc3(hidden))
    assert _count(lenet300(in_channels=1, image_size=8)) == 64 * 300 + 300 + 30_100 + 1_010


@pytest.mark.parametrize(("factory", "depths"), [(vgg16, "2 2 3 3 3"), (vgg19, "2 2 4 4 4")])
@pytest.mark.parametrize(("side", "poolings"), [(32, 4), (16, 3), (8, 2), (4, 1), (1, 0)])
def test_vgg_layer_by_layer(
    factory: Callable[..., nn.Module], depths: str, side: int, poolings: int
) -> None:
    with torch.device("meta"):
        model = factory(image_size=side)
    pools = [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    assert len(pools) == poolings
    before, params, macs = 3, 512 * 10 + 10, 512 * 10
    for group, (depth, width) in enumerate(
        zip(map(int, depths.split()), (64, 128, 256, 512, 512), strict=True)
    ):
        size = side // 2 ** min(group, poolings)
        for _ in range(depth):
            params += before * width * 9 + width + 2 * width
            macs += before * width * 9 * size * size
            before = width
    assert _count(model) == params
    if side == 8:
        assert model_costs(factory(image_size=8), torch.zeros(1, 3, 8, 8)).macs == macs


def test_vgg_at_32_averages_the_last_four_pixels() -> None:
    model = vgg16().eval()
    images = torch.rand(1, 3, 32, 32)
    last = functional.avg_pool2d(model.features(images), 2)
    assert last.shape == (1, 512, 1, 1)
    torch.testing.assert_close(model(images), model.fc(last.flatten(1)))


@pytest.mark.parametrize("factory", [lenet300, vgg16, resnet18])
def test_the_new_networks_start_he_normal(factory: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for module in factory().modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module.weight.numel() >= 9_216:
                expected = (2 / module.weight[0].numel()) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert module.bias is None or not module.bias.any()


def test_resnet18_keeps_the_size_of_a_small_image() -> None:
    model = resnet18(num_classes=200)
    sizes = []
    model.layer1.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[-1]))
    model.layer4.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[-1]))
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 200)
    assert sizes == [64, 8]


@pytest.mark.parametrize("factory", [lenet300, vgg16, resnet18])
@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "image_size"])
def test_the_new_networks_refuse_a_size_below_one(
    factory: Callable[..., nn.Module], argument: str
) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        factory(**{argument: 0})


def test_blocks_of_the_new_networks() -> None:
    found = {
        "lenet300": (lenet300(image_size=8), torch.rand(2, 1, 8, 8)),
        "vgg16": (vgg16(image_size=8), torch.rand(2, 3, 8, 8)),
        "resnet18": (resnet18(), torch.rand(2, 3, 8, 8)),
    }
    counts = {name: len(find_blocks(*given).blocks) for name, given in found.items()}
    # Of eight blocks of ResNet18 three change the shape.
    assert counts == {"lenet300": 0, "vgg16": 0, "resnet18": 5}


@pytest.mark.parametrize(
    ("name", "side", "blocks"),
    [("squeezenet1_1", 32, 0), ("inception_v3", 75, 0), ("resnet50", 32, 12)],
)
def test_networks_from_torchvision_build_run_and_are_analysed(
    name: str, side: int, blocks: int
) -> None:
    model = model_factory(f"torchvision:{name}", {"num_classes": 10})()
    assert isinstance(model, nn.Module)
    images = torch.rand(2, 3, side, side)
    analysis = find_blocks(model, images)
    assert model.eval()(images).shape == (2, 10)
    assert len(analysis.blocks) == blocks
    if not blocks:
        scores = score_blocks(model, "l1", example_inputs=images, analysis=analysis)
        with pytest.raises(PlanError):
            make_plan(analysis, scores, p=1)


def test_inception_v3_trains_at_its_own_size() -> None:
    model = model_factory("torchvision:inception_v3", {"num_classes": 10})()
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        logits, auxiliary = model.train()(torch.rand(2, 3, 299, 299))
    assert logits.shape == auxiliary.shape == (2, 10)


def test_a_network_of_timm_is_built_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    model = model_factory("timm:resnet10t", {"num_classes": 3})()
    assert isinstance(model, nn.Module)
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ModelSpecError, match=r"no model 'resnet10'.*Did you mean"):
        model_factory("timm:resnet10", {})
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'blockprune\[zoo\]'"):
        model_factory("timm:resnet10t", {})
