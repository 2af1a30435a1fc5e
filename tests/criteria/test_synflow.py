from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn

from blockprune.blocks import ResidualBlock, find_blocks
from blockprune.criteria import ScoringContext, ZeroScoresWarning
from blockprune.criteria.synflow import SynFlow
from blockprune.errors import CriterionError
from blockprune.tracing import as_call
from tests.criteria.batched import TokenNet, assert_untouched, tokens
from tests.criteria.nets import Net, context, pair


def each_layer(model: nn.Sequential, inputs: Tensor) -> ScoringContext:
    """A context in which every layer with a weight is a block of its own."""
    blocks = [
        ResidualBlock(name, "", 1, (), 0, (name,), (), (f"{name}.weight",))
        for name, layer in model.named_children()
        if hasattr(layer, "weight")
    ]
    return ScoringContext(model, blocks, None, as_call(model, inputs))


def direct(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """|theta * dR/dtheta| of each parameter, the whole state made absolute as the authors do."""
    model = copy.deepcopy(model).double().eval()
    model.load_state_dict({name: value.abs() for name, value in model.state_dict().items()})
    model(inputs).sum().backward()
    return {
        name: (p.detach() * p.grad).abs()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def sums(values: dict[str, Tensor], blocks: tuple[ResidualBlock, ...]) -> dict[str, float]:
    """Sums over the matrices and filters of each block."""
    return {
        block.name: sum(
            float(values[name].sum()) for name in block.parameters if values[name].dim() > 1
        )
        for block in blocks
    }


def test_layers_of_a_sequential_net_without_biases_all_sum_to_the_output() -> None:
    layers: list[nn.Module] = []
    for width, following in pairwise((5, 8, 6, 7, 3)):
        layers += [nn.Linear(width, following, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    signal = torch.ones(1, 5, dtype=torch.float64)
    for layer in model[::2]:
        signal = signal @ layer.weight.detach().abs().T
    scores = SynFlow()(each_layer(model, torch.randn(4, 5, dtype=torch.float64)))
    assert scores == pytest.approx(dict.fromkeys("0246", float(signal.sum())), rel=1e-12)


def test_so_do_convolutions_with_pooling_between_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 3, 2, bias=False),
        nn.Flatten(), nn.Linear(3, 4, bias=False),
    ).double()  # fmt: skip
    scores = SynFlow()(each_layer(model, torch.zeros(2, 2, 6, 6, dtype=torch.float64)))
    first, *others = scores.values()
    assert len(others) == 2
    assert others == pytest.approx([first, first], rel=1e-12)


def test_a_branch_sums_layer_by_layer_to_what_flows_through_it() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
                for _ in range(3)
            )
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            for branch in self.branches:
                x = x + branch(x)
            return x

    model, ones = Plain(), torch.ones(1, 4, dtype=torch.float64)
    scores = SynFlow()(context(model, ones))
    positive = copy.deepcopy(model)
    for parameter in positive.parameters():
        parameter.data.abs_()
        parameter.requires_grad_(False)
    whole = float(positive(ones).sum())
    for branch, score in zip(positive.branches, scores.values(), strict=True):
        weight = branch[2].weight.data.clone()
        branch[2].weight.data.zero_()
        through = whole - float(positive(ones).sum())
        branch[2].weight.data.copy_(weight)
        assert score == pytest.approx(2 * through, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_direct_computation(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    images = pair(5)[0].to(dtype)
    scoring = context(model, images)
    expected = sums(direct(model, torch.ones_like(images[:1], dtype=torch.float64)), scoring.blocks)
    assert SynFlow()(scoring) == pytest.approx(expected, rel=1e-12)
    means = {name: value / (2 * 4 * 4 * 9) for name, value in expected.items()}
    assert SynFlow("mean")(scoring) == pytest.approx(means, rel=1e-12)


def test_attention_against_a_direct_computation() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8,
        num_classes=3,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    scoring = context(model, torch.randn(2, 3, 8, 8))
    expected = sums(direct(model, torch.ones(1, 3, 8, 8, dtype=torch.float64)), scoring.blocks)
    assert len(expected) == 4
    assert SynFlow()(scoring) == pytest.approx(expected, rel=1e-9)


def test_token_ids_stay_those_of_the_first_sample() -> None:
    model, (ids, _) = TokenNet(), tokens()
    scoring = context(model, ids)
    expected = sums(direct(model, ids[:1]), scoring.blocks)
    assert SynFlow()(scoring) == pytest.approx(expected, rel=1e-12)


def test_neither_data_nor_signs_matter() -> None:
    model, (images, labels) = Net(), pair()
    scores = SynFlow()(context(model, images, labels))
    assert SynFlow()(context(model, torch.randn_like(images)[:3])) == scores
    for parameter in model.parameters():
        parameter.data.neg_()
    assert SynFlow()(context(model, images)) == scores


def test_other_buffers_are_part_of_the_function() -> None:
    class Masked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            seen = super().forward(x)
            weights: Tensor = self.mask.softmax(0)
            return torch.stack((seen, seen.square()), -1) @ weights

    model, (images, _) = Masked(), pair(2)
    plain = Net()
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = SynFlow()(context(plain, images))
    assert SynFlow()(context(model, images)) == pytest.approx(expected, rel=1e-12)


def test_the_model_is_untouched() -> None:
    for dtype in (torch.float32, torch.float64):
        scoring = context(Net().to(dtype), pair(3)[0].to(dtype))
        assert_untouched(scoring, SynFlow())


def test_overflow_is_an_error_that_names_a_block() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(200))
            for branch in self.branches:
                nn.init.normal_(branch.weight, std=10.0)

        def forward(self, x: Tensor) -> Tensor:
            for branch in self.branches:
                x = x + branch(torch.tanh(x) + x)
            return x

    scoring = context(Deep(), torch.randn(2, 16))
    with pytest.raises(CriterionError, match=r"block 'branches\.\d+'.*beyond float64"):
        SynFlow()(scoring)


def test_a_frozen_block_is_named() -> None:
    model = Net()
    model.blocks[1].requires_grad_(False)
    with pytest.raises(CriterionError, match=r"'blocks\.1'.*frozen"):
        SynFlow()(context(model, pair(2)[0]))


def test_branches_initialised_to_zero_are_reported() -> None:
    model = Net()
    for block in model.blocks:
        nn.init.zeros_(block.bn2.weight)
    with pytest.warns(ZeroScoresWarning):
        assert set(SynFlow()(context(model, pair(2)[0])).values()) == {0}


def test_a_model_that_insists_on_another_precision_is_reported() -> None:
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    scoring = context(Single().float(), pair(2)[0].float())
    with pytest.raises(CriterionError, match=r"float64 on ones.*Single does not run"):
        SynFlow()(scoring)


def test_a_detached_output_is_reported() -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    images = pair(2)[0]
    scoring = ScoringContext(
        Detached().eval(), find_blocks(Net(), images).blocks, None, as_call(Net(), images)
    )
    with pytest.raises(CriterionError, match="does not depend on any weight"):
        SynFlow()(scoring)


def test_unknown_aggregation() -> None:
    with pytest.raises(CriterionError, match="'mean' or 'sum', not 'max'"):
        SynFlow("max")  # type: ignore[arg-type]
