"""Inputs that are inferred: the shape rules, what is asked of the user, and what is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from blockprune.errors import TraceError
from blockprune.inputs import infer_example_inputs, random_inputs


def _shapes(model: nn.Module, **options: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in infer_example_inputs(model, **options)]


class Fixed(nn.Module):
    """A convolution and a flattened classifier: reads images of one size only."""

    def __init__(self, size: int, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, padding=1)
        self.fc = nn.Linear(2 * size * size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


class Flattening(nn.Module):
    """A perceptron that insists on images."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return self.fc(x.reshape(batch, channels * height * width))


class Auxiliary(nn.Module):
    """Inception's trap: the auxiliary head of training needs a larger image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(2, 2, 250)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.mean() + self.head(x).mean() if self.training else x.mean()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return (self.conv(left) - self.conv(right)) * scale


class Branching(nn.Module):
    """Decides by a value, which fake tensors do not have, and writes to its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.fc.bias.data.add_(1)
        return self.fc(x) if x.sum().item() > 0 else -self.fc(x)


class Attention(nn.Module):
    """Reads a sequence: (batch, length, width) and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = self.norm(x)
        return self.attention(x, x, x)[0].reshape(batch, length * width)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 1024)),
        (nn.Conv2d(5, 3, 3), (1, 5, 224, 224)),
        (nn.Conv3d(1, 3, 3), (1, 1, 16, 112, 112)),
        (nn.ConvTranspose2d(4, 3, 2), (1, 4, 224, 224)),
        (nn.Linear(7, 2), (1, 7)),
        (nn.LSTM(6, 4, batch_first=True), (1, 16, 6)),
        (nn.Embedding(11, 4), (1, 16)),
        (nn.BatchNorm2d(3), (1, 3, 224, 224)),
        (nn.BatchNorm3d(3), (1, 3, 16, 112, 112)),
        (nn.BatchNorm1d(9), (1, 9)),
        (nn.GroupNorm(2, 4), (1, 4, 224, 224)),
        (nn.LayerNorm(6), (1, 6)),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(2, 2, 1))), (1, 2, 224, 224)),
        (Fixed(32), (1, 3, 32, 32)),
        (Fixed(64, channels=1), (1, 1, 64, 64)),
        (Flattening(3 * 8 * 8), (1, 3, 8, 8)),
        (Flattening(28 * 28), (1, 1, 28, 28)),
        (Attention(), (1, 16, 8)),
        (Auxiliary(), (1, 3, 256, 256)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_shape_follows_the_stem(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert _shapes(model) == [shape]
    with torch.no_grad():
        model.eval()(*infer_example_inputs(model))


@pytest.mark.parametrize(
    ("attribute", "value", "size"),
    [
        ("image_size", 48, (48, 48)),
        ("image_size", (40, 56), (40, 56)),
        ("img_size", [24, 24], (24, 24)),
        ("config", SimpleNamespace(image_size=80), (80, 80)),
        ("pretrained_cfg", {"input_size": (3, 72, 72)}, (72, 72)),
        ("default_cfg", SimpleNamespace(input_size=(3, 88, 88)), (88, 88)),
    ],
)
def test_configuration_comes_before_the_ladder(
    attribute: str, value: object, size: tuple[int, int]
) -> None:
    model = nn.Conv2d(3, 2, 3)
    setattr(model, attribute, value)
    assert _shapes(model) == [(1, 3, *size)]


def test_a_configuration_of_clips_says_the_size_of_their_images() -> None:
    model = nn.Conv3d(3, 2, 3)
    model.image_size = 48
    assert _shapes(model) == [(1, 3, 16, 48, 48)]


def test_a_submodule_may_hold_the_configuration() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    model[0].image_size = 20
    assert _shapes(model) == [(1, 1, 20, 20)]


@pytest.mark.parametrize("lie", [7, True, "large", (3, 4, 5), None])
def test_a_configuration_that_does_not_fit_is_passed_over(lie: object) -> None:
    model = Fixed(128)
    model.image_size = lie
    assert _shapes(model) == [(1, 3, 128, 128)]


def test_one_input_for_each_required_parameter() -> None:
    assert _shapes(Pair(), batch_size=3) == [(3, 3, 224, 224)] * 2
    left, right = infer_example_inputs(Pair())
    assert not torch.equal(left, right)


def test_a_forward_that_reads_values_is_tried_for_real_and_left_alone() -> None:
    model = Branching()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert _shapes(model) == [(1, 6)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_values_come_from_the_seed_alone() -> None:
    model = nn.Linear(4, 2).double()
    [first] = infer_example_inputs(model, seed=3)
    torch.manual_seed(99)
    [again] = infer_example_inputs(model, seed=3)
    [other] = infer_example_inputs(model, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64


def test_tokens_stay_in_the_vocabulary() -> None:
    [tokens] = infer_example_inputs(nn.Embedding(3, 2), batch_size=50)
    assert tokens.dtype == torch.int64
    assert set(tokens.unique().tolist()) == {0, 1, 2}


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modules, keys = list(model.modules()), list(vars(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    infer_example_inputs(model)
    assert calls == []
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert list(model.modules()) == modules
    assert list(vars(model)) == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_old_style_weight_norm_can_be_tried() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(5, 2))
    assert _shapes(nn.Sequential(layer)) == [(1, 5)]


def test_what_was_tried_is_quoted_where_nothing_fits() -> None:
    with pytest.raises(TraceError, match=r"Tried.*3,224,224: .*more.*example_inputs="):
        infer_example_inputs(Fixed(17))


def test_a_model_without_a_stem_asks_for_inputs() -> None:
    with pytest.raises(TraceError, match=r"ReLU.*example_inputs="):
        infer_example_inputs(nn.ReLU())


def test_required_keywords_ask_for_inputs() -> None:
    class Keyword(nn.Linear):
        def forward(self, *, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(TraceError, match=r"keyword.* x,.*example_inputs="):
        infer_example_inputs(Keyword(2, 2))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.lock = (step for step in range(3))
    with pytest.raises(TraceError, match=r"cannot be copied.*copy\.deepcopy"):
        infer_example_inputs(model)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(TraceError, match="at least 1, not 0"):
        infer_example_inputs(nn.Linear(2, 2), batch_size=0)


def test_random_inputs_take_the_shapes_given() -> None:
    assert [tuple(x.shape) for x in random_inputs(Pair(), [(2, 3, 9, 9)])] == [(2, 3, 9, 9)] * 2
    assert [tuple(x.shape) for x in random_inputs(Pair(), [(1, 3, 8, 8), (1, 3, 9, 9)])] == [
        (1, 3, 8, 8),
        (1, 3, 9, 9),
    ]
    assert random_inputs(nn.ReLU(), [(4,)])[0].shape == (4,)


@pytest.mark.parametrize("shapes", [[()], [(1, 0, 3)], [(1, -3)], [(1, 3, 8, 8)] * 3])
def test_random_inputs_refuse_what_cannot_be_a_shape(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(TraceError, match=r"1,3,224,224|Give one shape"):
        random_inputs(Pair(), shapes)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(1, 3, 224, 224)]),
        ("inception_v3", [(1, 3, 299, 299)]),
        ("vit_b_32", [(1, 3, 224, 224)]),
        ("lraspp_mobilenet_v3_large", [(1, 3, 224, 224)]),
        ("quantized_mobilenet_v2", [(1, 3, 224, 224)]),
        ("ssdlite320_mobilenet_v3_large", [(1, 3, 224, 224)]),
        ("raft_small", [(1, 3, 224, 224)] * 2),
        ("r3d_18", [(1, 3, 16, 112, 112)]),
        ("mvit_v2_s", [(1, 3, 16, 224, 224)]),
        ("s3d", [(1, 3, 16, 224, 224)]),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_torchvision_families(name: str, shapes: list[tuple[int, ...]]) -> None:
    extra = {"weights_backbone": None} if "lraspp" in name or "ssd" in name else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    assert _shapes(model) == shapes


def test_timm_says_its_own_input_size() -> None:
    timm = pytest.importorskip("timm")
    assert _shapes(timm.create_model("efficientnet_b1", pretrained=False)) == [(1, 3, 240, 240)]
    small = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=96)
    assert _shapes(small) == [(1, 3, 96, 96)]
