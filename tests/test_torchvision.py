"""torchvision's models: counts derived from the published configurations, tickets checked.

A count is written as the sum it comes from, so that a reader can hold it against the
paper's table of that architecture. Sizes are the smallest at which every stage still has
a map to work on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import blockprune
from tests.oracle import Hook, disagreements, outcome


def _identities(depths: list[int]) -> int:
    """Stages whose first block changes width or stride: every block but the first."""
    return sum(d - 1 for d in depths)


def _image(size: int, batch: int = 2) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(batch, 3, size, size),)


def _clip(size: int, frames: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, 3, frames, size, size),)


def _image_list() -> tuple[Any, ...]:
    return ([torch.rand(3, 64, 64)],)


def _frames() -> tuple[Any, ...]:
    return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)


@dataclass(frozen=True)
class Case:
    """A model, what it is built with, and its truth.

    `end` is the module, below its block, whose zero output switches the branch off; None
    where the branch's own name is that module. Cases with `modes` are cut and compared.
    """

    name: str
    branches: int
    inputs: Callable[[], tuple[Any, ...]]
    layers: int | None = None  # None: as many as branches
    options: dict[str, Any] = field(default_factory=dict)
    end: str | None = None
    modes: tuple[bool, ...] = ()
    large: bool = False  # only with --large


BOTH = (False, True)
SMALL_DETECTOR = {"weights_backbone": None, "min_size": 64, "max_size": 64}
NO_INIT = {"init_weights": False}  # the default draws truncated normals for a minute

CASES = (
    # He et al. 2015: stages 2-2-2-2 and 3-4-6-3 of basic blocks (the first stage keeps its
    # width), 3-4-6-3, 3-4-23-3, 3-8-36-3 of bottlenecks (it does not).
    Case("resnet18", 1 + _identities([2, 2, 2, 2]), _image(32), end="bn2", modes=BOTH),
    Case("resnet34", 1 + _identities([3, 4, 6, 3]), _image(32)),
    Case("resnet50", _identities([3, 4, 6, 3]), _image(32), end="bn3", modes=BOTH),
    Case("resnet101", _identities([3, 4, 23, 3]), _image(32), large=True),
    Case("resnet152", _identities([3, 8, 36, 3]), _image(32), large=True),
    Case("resnext50_32x4d", _identities([3, 4, 6, 3]), _image(32)),
    Case("wide_resnet50_2", _identities([3, 4, 6, 3]), _image(32), large=True),
    # Tan & Le: repeats 1-2-2-3-3-4-1 times the depth factor, rounded up.
    Case(
        "efficientnet_b0",
        _identities([1, 2, 2, 3, 3, 4, 1]),
        _image(64),
        end="stochastic_depth",
        modes=BOTH,
    ),
    Case("efficientnet_b1", _identities([2, 3, 3, 4, 4, 5, 2]), _image(64)),
    Case("efficientnet_b4", _identities([2, 4, 4, 6, 6, 8, 2]), _image(64), large=True),
    Case("efficientnet_b7", _identities([4, 7, 7, 10, 10, 13, 4]), _image(64), large=True),
    # V2: the first stage keeps width and stride, so that all of its blocks have a shortcut.
    Case("efficientnet_v2_s", 1 + _identities([2, 4, 4, 6, 9, 15]), _image(64)),
    Case("mobilenet_v2", _identities([1, 2, 3, 4, 3, 3, 1]), _image(64), end="conv", modes=BOTH),
    # Howard et al. 2019, table 1: 16 | 24 24 | 40 40 40 | 80 x 4 | 112 112 | 160 x 3.
    Case(
        "mobilenet_v3_large",
        1 + _identities([2, 3, 4, 2, 3]),
        _image(64),
        end="block",
        modes=BOTH,
    ),
    Case("mobilenet_v3_small", _identities([1, 2, 3, 2, 3]), _image(64)),
    Case("mnasnet0_5", _identities([3, 3, 3, 2, 4, 1]), _image(64), end="layers", modes=BOTH),
    # Radosavovic et al.: depths 1-3-6-6 and 1-2-7-12.
    Case("regnet_y_400mf", _identities([1, 3, 6, 6]), _image(64), end="f", modes=BOTH),
    Case("regnet_x_400mf", _identities([1, 2, 7, 12]), _image(64)),
    Case("regnet_y_8gf", _identities([2, 4, 10, 1]), _image(64), large=True),
    # Liu et al.: 3-3-9-3, downsampling between the stages, so every block counts.
    Case("convnext_tiny", 3 + 3 + 9 + 3, _image(64), end="stochastic_depth", modes=BOTH),
    Case("convnext_small", 3 + 3 + 27 + 3, _image(64), large=True),
    # Attention and MLP: two branches a layer.
    Case("vit_b_16", 2 * 12, _image(32), layers=12, options={"image_size": 32}, modes=BOTH),
    Case("vit_l_16", 2 * 24, _image(32), layers=24, options={"image_size": 32}, large=True),
    Case("swin_t", 2 * (2 + 2 + 6 + 2), _image(64), layers=12, modes=BOTH),
    Case("swin_v2_t", 2 * (2 + 2 + 6 + 2), _image(64), layers=12),
    Case("swin_s", 2 * (2 + 2 + 18 + 2), _image(64), layers=24, large=True),
    # Tu et al.: 2-2-5-2 layers of an MBConv and two attention parts; the first MBConv of
    # each stage strides.
    Case(
        "maxvit_t",
        4 * (2 + 2 + 5 + 2) + _identities([2, 2, 5, 2]),
        _image(224, 1),
        layers=-1,
        large=True,
    ),
    # Video.
    Case("r3d_18", 1 + _identities([2, 2, 2, 2]), _clip(32, 4), end="conv2", modes=BOTH),
    Case("mc3_18", 1 + _identities([2, 2, 2, 2]), _clip(32, 4)),
    Case("r2plus1d_18", 1 + _identities([2, 2, 2, 2]), _clip(32, 4), large=True),
    Case("s3d", 0, _clip(224, 16), large=True),
    Case("swin3d_t", 2 * (2 + 2 + 6 + 2), _clip(64, 4), layers=12, large=True),
    # Fan et al.: 16 layers; three pool the shortcut of the attention, three others project
    # the shortcut of the MLP.
    Case("mvit_v1_b", (16 - 3) + (16 - 3), _clip(224, 16), layers=-1, large=True),
    # No residual connection, or none that adds.
    Case("alexnet", 0, _image(64)),
    Case("vgg11", 0, _image(32)),
    Case("vgg16_bn", 0, _image(32), large=True),
    Case("densenet121", 0, _image(32)),
    Case("googlenet", 0, _image(64), options=NO_INIT),
    Case("inception_v3", 0, _image(299), options=NO_INIT, large=True),
    Case("squeezenet1_0", 0, _image(64)),
    Case("shufflenet_v2_x0_5", 0, _image(64)),
    # Float versions of the quantised models add through FloatFunctional.
    Case("quantized_resnet18", 1 + _identities([2, 2, 2, 2]), _image(32), end="bn2", modes=BOTH),
    Case("quantized_mobilenet_v2", _identities([1, 2, 3, 4, 3, 3, 1]), _image(64)),
    Case("quantized_mobilenet_v3_large", 1 + _identities([2, 3, 4, 2, 3]), _image(64), large=True),
    # Segmentation: dilation instead of strides, the widths still change.
    Case(
        "fcn_resnet50",
        _identities([3, 4, 6, 3]),
        _image(32),
        options={"weights_backbone": None, "aux_loss": True},
        end="bn3",
        modes=BOTH,
    ),
    Case(
        "deeplabv3_resnet50",
        _identities([3, 4, 6, 3]),
        _image(32),
        options={"weights_backbone": None},
        large=True,
    ),
    Case(
        "lraspp_mobilenet_v3_large",
        1 + _identities([2, 3, 4, 2, 3]),
        _image(64),
        options={"weights_backbone": None},
        end="block",
        modes=BOTH,
    ),
    # Detection: the root does not trace, its backbone does.
    Case(
        "fasterrcnn_resnet50_fpn",
        _identities([3, 4, 6, 3]),
        _image_list,
        options=SMALL_DETECTOR,
        end="bn3",
        modes=(False,),
        large=True,
    ),
    Case(
        "fasterrcnn_mobilenet_v3_large_fpn",
        1 + _identities([2, 3, 4, 2, 3]),
        _image_list,
        options=SMALL_DETECTOR,
        end="block",
        modes=(False,),
    ),
    Case("retinanet_resnet50_fpn", 12, _image_list, options=SMALL_DETECTOR, large=True),
    Case("fcos_resnet50_fpn", 12, _image_list, options=SMALL_DETECTOR, large=True),
    Case("maskrcnn_resnet50_fpn", 12, _image_list, options=SMALL_DETECTOR, large=True),
    Case("keypointrcnn_resnet50_fpn", 12, _image_list, options=SMALL_DETECTOR, large=True),
    Case("ssd300_vgg16", 0, _image_list, options={"weights_backbone": None}, large=True),
    Case(
        "ssdlite320_mobilenet_v3_large",
        1 + _identities([2, 3, 4, 2, 3]),
        _image_list,
        options={"weights_backbone": None},
        large=True,
    ),
    # Teed & Deng: two encoders of 2-2-2 blocks, the first stage without a stride.
    Case(
        "raft_small", 2 * (1 + _identities([2, 2, 2])), _frames, end="convnormrelu3", modes=(False,)
    ),
    Case("raft_large", 2 * (1 + _identities([2, 2, 2])), _frames, large=True),
)


def _build(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torchvision.models.get_model(case.name, weights=None, **case.options).eval()


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_counts(case: Case, large: bool) -> None:
    if case.large and not large:
        pytest.skip("only with --large")
    net, inputs = _build(case), case.inputs()
    analysis = blockprune.find_blocks(net, inputs)
    assert len(analysis.blocks) == case.branches
    assert len(set(analysis.names)) == case.branches
    layers = blockprune.find_blocks(net, inputs, granularity="layer")
    if case.layers != -1:
        assert len(layers.blocks) == (case.branches if case.layers is None else case.layers)
    if not case.branches:
        with pytest.raises(blockprune.BlockpruneError, match="no removable"):
            blockprune.prune(net, "random", p=1, example_inputs=inputs)


CUT = [c for c in CASES if c.modes]


@pytest.mark.parametrize("case", CUT, ids=[c.name for c in CUT])
def test_tickets_against_hooks(case: Case, large: bool) -> None:
    if case.large and not large:
        pytest.skip("only with --large")
    net, inputs = _build(case), case.inputs()
    names = blockprune.find_blocks(net, inputs).names
    cut = (names[0], names[len(names) // 2], names[-1])
    hooks = [Hook(name if case.end is None else f"{name}.{case.end}") for name in cut]
    ticket = blockprune.remove_blocks(net, cut, inputs)
    for train in case.modes:
        # Hundreds of layers add up roundings in an order that a removed branch may change.
        problems = disagreements(
            outcome(ticket, inputs, train=train),
            outcome(net, inputs, train=train, zeros=hooks),
            ulps=64,
        )
        assert not problems, problems[:5]


def test_every_family_is_in_the_table() -> None:
    def family(name: str) -> str:
        return name.removeprefix("quantized_").partition("_")[0].rstrip("0123456789")

    known = {family(c.name) for c in CASES}
    assert {family(n) for n in torchvision.models.list_models()} <= known
