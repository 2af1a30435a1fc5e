from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from blockprune.blocks import find_blocks
from blockprune.criteria import ScoringContext, ZeroScoresWarning
from blockprune.criteria.fisher import Fisher
from blockprune.criteria.layer_outputs import sample_axis
from blockprune.errors import CriterionError, DataError
from tests.criteria.batched import TokenNet, assert_untouched, batched, split, tokens
from tests.criteria.nets import Net, context, pair

Pairs = list[tuple[Tensor, Tensor]]
Layers = Mapping[str, Sequence[str]]
# Modules by block; behind each, whether its channels are the second axis.
NET_LAYERS = {f"blocks.{i}": (f"blocks.{i}.conv1", f"blocks.{i}.conv2") for i in range(3)}


def direct(model: nn.Module, pairs: Pairs, layers: Layers) -> dict[str, float]:
    """The definition: each sample alone, and a mask on each output of each call.

    Its derivative is that of the sample's loss with respect to a mask of ones.
    """
    model = copy.deepcopy(model).eval()
    scores = dict.fromkeys(layers, 0.0)
    samples = [(x[n : n + 1], y[n : n + 1]) for x, y in pairs for n in range(len(y))]
    for inputs, label in samples:
        masks: dict[str, list[Tensor]] = {block: [] for block in layers}
        handles = []
        for block, paths in layers.items():
            for path in paths:
                hook = masked(masks[block])
                handles.append(model.get_submodule(path).register_forward_hook(hook))
        loss = functional.cross_entropy(model(inputs), label)
        for handle in handles:
            handle.remove()
        for block, own in masks.items():
            derivatives = torch.autograd.grad(
                loss, own, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            scores[block] += sum(float(d.double().square().sum()) for d in derivatives) / 2
    return {block: score / len(samples) for block, score in scores.items()}


def masked(
    masks: list[Tensor],
) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], object]:
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        first = output[0] if isinstance(output, tuple) else output
        second = isinstance(module, nn.Conv2d)
        size = first.shape[1 if second else -1]
        masks.append(torch.ones(size, dtype=first.dtype, requires_grad=True))
        product = first * (masks[-1].view(1, -1, 1, 1) if second else masks[-1])
        return (product, *output[1:]) if isinstance(output, tuple) else product

    return hook


class Branches(nn.Module):
    """Residual branches on features, between a linear stem and a linear head, in float64."""

    def __init__(self, *branches: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.branches = nn.ModuleList(branches)
        self.fc = nn.Linear(width, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        logits: Tensor = self.fc(x.mean(1))
        return logits


def features(size: int = 7, positions: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(size, positions, 4, dtype=torch.float64), torch.arange(size) % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(dtype: torch.dtype) -> None:
    model, (images, labels) = Net().to(dtype), pair(9)
    with torch.no_grad():
        model.train()(images.to(dtype) * 2 + 1)
    pairs = split((images.to(dtype), labels), 5, 3, 1)
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert Fisher()(batched(model, pairs)) == pytest.approx(
        direct(model, pairs, NET_LAYERS), rel=rel
    )


def test_the_split_into_batches_does_not_matter() -> None:
    model = Net()
    expected = Fisher()(batched(model, [pair(8)]))
    for sizes in ((4, 4), (5, 3), (2, 6), (1,) * 8):
        found = Fisher()(batched(model, split(pair(8), *sizes)))
        assert found == pytest.approx(expected, rel=1e-10)


def test_a_linear_layer_of_a_linear_net_by_hand() -> None:
    """With the loss half the squared distance, s_c = a_c * (what the head sends back to a_c)."""
    model, (x, _) = Branches(nn.Linear(4, 4)), features(5, 1)
    targets = torch.randn(5, 3, dtype=torch.float64)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).mean() / 2

    with torch.no_grad():
        entering = model.stem(x.squeeze(1))
        leaving = model.branches[0](entering)
        error = model.fc(entering + leaving) - targets
        sums = leaving * (error @ model.fc.weight)
    (score,) = Fisher()(batched(model, [(x, targets)], loss_fn=loss)).values()
    assert score == pytest.approx(float(sums.square().sum(1).mean()) / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens(dtype: torch.dtype) -> None:
    model, pairs = TokenNet().to(dtype), split(tokens(9), 5, 4)
    layers = {f"layers.{i}": (f"layers.{i}.first", f"layers.{i}.second") for i in range(2)}
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert Fisher()(batched(model, pairs)) == pytest.approx(direct(model, pairs, layers), rel=rel)


def test_attention_counts_by_what_it_returns() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12,
        num_classes=3,
    ).double()  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    pairs = split((torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.arange(5) % 3), 3, 2)
    scoring = batched(model, pairs)
    layers = {}
    for block in scoring.blocks:
        owners = dict.fromkeys(
            name.rpartition(".")[0].removesuffix(".out_proj")
            for name in block.parameters
            if model.get_parameter(name).dim() > 1
        )
        layers[block.name] = tuple(owners)
    assert sorted(map(len, layers.values())) == [1, 1, 2, 2]
    assert Fisher()(scoring) == pytest.approx(direct(model, pairs, layers), rel=1e-9)


def test_what_is_written_into_an_activation_later_does_not_count() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = (x + block.conv2(block.conv1(x).relu_()).mul_(2)).relu_()
            logits: Tensor = self.fc(x.mean((2, 3)))
            return logits

    model, pairs = InPlace(), split(pair(7), 4, 3)
    # Its blocks are named otherwise, the root doing the adds.
    expected = direct(model, pairs, NET_LAYERS)
    scores = Fisher()(batched(model, pairs))
    assert list(scores.values()) == pytest.approx(list(expected.values()), rel=1e-10)


def test_each_call_of_a_module_is_a_layer() -> None:
    again = nn.Linear(4, 4)
    inside = nn.Sequential(again, nn.Tanh(), again)
    model, pairs = Branches(inside, nn.Sequential(nn.Tanh(), again)), [features()]
    scoring = batched(model, pairs)
    # Both blocks hold the module, and so all of its three calls.
    expected = direct(model, pairs, {"either": ("branches.0.0",)})["either"]
    scores = Fisher()(scoring)
    assert len(scores) == 2
    assert list(scores.values()) == pytest.approx([expected] * 2, rel=1e-10)


def test_a_weight_of_two_modules_counts_with_both() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model, pairs = Branches(nn.Sequential(first, nn.Tanh(), second)), [features()]
    (score,) = Fisher()(batched(model, pairs)).values()
    expected = direct(model, pairs, {"": ("branches.0.0", "branches.0.2")})[""]
    assert score == pytest.approx(expected, rel=1e-10)
    model = Branches(nn.Sequential(nn.Tanh(), first), second)
    expected = direct(model, pairs, {"": ("branches.0.1", "branches.1")})[""]
    scores = Fisher()(batched(model, pairs))
    assert list(scores.values()) == pytest.approx([expected] * 2, rel=1e-10)


def test_a_parametrized_weight_counts_by_what_its_layer_returns() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    model, pairs = Branches(nn.Sequential(nn.Tanh(), layer)), [features()]
    (score,) = Fisher()(batched(model, pairs)).values()
    expected = direct(model, pairs, {"": ("branches.0.1",)})[""]
    assert score == pytest.approx(expected, rel=1e-10)


def test_a_module_that_is_not_called_counts_by_the_one_around_it() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.inner.weight).tanh()

    model, pairs = Branches(Reading()), [features()]
    (score,) = Fisher()(batched(model, pairs)).values()
    assert score == pytest.approx(direct(model, pairs, {"": ("branches.0",)})[""], rel=1e-10)


def test_a_branch_without_matrices_counts_by_its_normalisation() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.head = nn.Linear(3, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head((x + self.norm(x)).mean((2, 3)))
            return logits

    model, (images, labels) = Normalised(), pair(4)
    (score,) = Fisher()(batched(model, [(images, labels)])).values()
    sums = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        mask = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
        logits = model.eval().head((image + model.norm(image) * mask).mean((2, 3)))
        loss = functional.cross_entropy(logits, label)
        sums.append(torch.autograd.grad(loss, mask)[0].square().sum() / 2)
    assert score == pytest.approx(float(torch.stack(sums).mean()), rel=1e-10)


class PositionsFirst(nn.Module):
    """(positions, samples, features) inside, with attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = self.linear(self.attention(x, x, x, need_weights=False)[0].tanh())
        return x.transpose(0, 1)


class Windows(nn.Module):
    """Two windows of each sample, folded into the axis of the samples, in front or behind them."""

    def __init__(self, *, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        samples, positions, width = x.shape
        x = x.view(samples, 2, positions // 2, width)
        x = x if self.behind else x.transpose(0, 1)
        x = self.linear(x.flatten(0, 1)).tanh()
        x = x.unflatten(0, (samples, 2) if self.behind else (2, samples))
        x = x if self.behind else x.transpose(0, 1)
        return x.reshape(samples, positions, width)


class Chosen(nn.Module):
    """Only the rows with a positive first feature go through the layer, however many they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        return torch.zeros_like(x).masked_scatter(
            chosen.unsqueeze(-1), self.linear(x[chosen]).tanh()
        )


@pytest.mark.parametrize(
    ("branch", "layers"),
    [
        (PositionsFirst, ("branches.0.attention", "branches.0.linear")),
        (lambda: Windows(behind=True), ("branches.0.linear",)),
        (lambda: Windows(behind=False), ("branches.0.linear",)),
        (Chosen, ("branches.0.linear",)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_samples_are_told_apart_in_any_layout(
    branch: Callable[[], nn.Module], layers: tuple[str, ...], size: int
) -> None:
    """Eight positions, so that a batch of four or eight could be taken for them."""
    model, pairs = Branches(branch()), split(features(size + 3, 8), size, 3)
    (score,) = Fisher()(batched(model, pairs)).values()
    assert score == pytest.approx(direct(model, pairs, {"": layers})[""], rel=1e-9)


def test_one_pass_serves_a_batch_where_samples_can_be_told_apart() -> None:
    class Counting(Branches):
        sizes: tuple[int, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            type(self).sizes += (len(x),)
            return super().forward(x)

    for branch in (PositionsFirst(), Windows(behind=True)):
        scoring = batched(Counting(branch), split(features(13, 8), 8, 5))
        Counting.sizes = ()
        Fisher()(scoring)
        assert Counting.sizes == (2, 3, 8, 5)


def test_the_model_is_untouched() -> None:
    assert_untouched(batched(Net(), split(pair(), 8, 4)), Fisher())
    assert_untouched(batched(Branches(Chosen()), [features(5, 3)]), Fisher())


def test_hooks_are_gone_after_an_error() -> None:
    images, labels = pair(4)
    scoring = context(Net(), images, labels, loss_fn=lambda outputs, targets: 1 / 0)
    with pytest.raises(CriterionError, match="loss_fn failed"):
        Fisher()(scoring)
    assert not any(module._forward_hooks for module in scoring.model.modules())


def test_frozen_weights_are_left_out_and_a_frozen_block_is_named() -> None:
    model, pairs = Net(), [pair(5)]
    model.blocks[1].conv1.weight.requires_grad_(False)
    layers = {**NET_LAYERS, "blocks.1": ("blocks.1.conv2",)}
    expected = direct(model, pairs, layers)
    assert Fisher()(batched(model, pairs)) == pytest.approx(expected, rel=1e-10)
    model.blocks[1].conv2.weight.requires_grad_(False)
    with pytest.raises(CriterionError, match=r"'blocks\.1'.*all of its weights.*frozen"):
        Fisher()(batched(model, pairs))


def test_a_block_that_the_loss_does_not_reach_scores_zero() -> None:
    class Unread(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[:2](torch.relu(self.norm(self.stem(x))))
            with torch.no_grad():
                self.blocks[2](x)
            logits: Tensor = self.fc(x.mean((2, 3)))
            return logits

    images, labels = pair(5)
    scoring = context(Unread(), images, labels)
    scoring.blocks = find_blocks(Net(), images).blocks
    scores = Fisher()(scoring)
    assert scores["blocks.2"] == 0
    assert scores["blocks.0"] > 0


def test_branches_initialised_to_zero_are_reported() -> None:
    model = Net()
    for block in model.blocks:
        nn.init.zeros_(block.bn2.weight)
    with pytest.warns(ZeroScoresWarning):
        scores = Fisher()(context(model, *pair(4)))
    assert set(scores.values()) == {0}


def test_without_data_labels_or_a_finite_loss_there_is_no_score() -> None:
    images, labels = pair(4)
    with pytest.raises(DataError, match="empty"):
        Fisher()(batched(Net(), [], example=images))
    with pytest.raises(CriterionError, match="needs labels"):
        Fisher()(batched(Net(), [(images, None)]))
    with pytest.raises(CriterionError, match="loss is nan"):
        Fisher()(batched(Net(), [(images * torch.nan, labels)], example=images))


def test_a_model_with_no_gradient_at_all_is_reported() -> None:
    images, labels = pair(4)
    scoring = context(Net(), images, labels, loss_fn=lambda outputs, y: outputs.detach().sum())
    with pytest.raises(CriterionError, match="does not depend on any weight"):
        Fisher()(scoring)


def test_blocks_without_a_context_of_their_own_are_none() -> None:
    images, labels = pair(4)
    scoring: ScoringContext = context(Net(), images, labels)
    scoring.blocks = ()
    assert Fisher()(scoring) == {}


class InChunks(nn.Module):
    """Runs some samples at a time, so a layer is called more often for a larger batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.inner = size, Branches(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(part) for part in x.split(self.size)])


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_that_takes_its_batch_in_chunks(size: int) -> None:
    model, pairs = InChunks(size), split(features(9), 6, 3)
    scoring = batched(model, pairs)
    names = [block.name for block in scoring.blocks]
    assert len(names) == 2
    layers = {name: (f"inner.branches.{i}",) for i, name in enumerate(names)}
    assert Fisher()(scoring) == pytest.approx(direct(model, pairs, layers), rel=1e-10)


class Routed(nn.Module):
    """A branch whose router, which has weights, returns numbers without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.mix = Router(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) * (1 + self.router(x)).unsqueeze(-1).to(x.dtype)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).argmax(-1)


def test_a_router_that_returns_integers() -> None:
    model, pairs = Branches(Routed()), split(features(7), 4, 3)
    layers = {"branches.0": ("branches.0.router.gate", "branches.0.mix")}
    assert Fisher()(batched(model, pairs)) == pytest.approx(direct(model, pairs, layers), rel=1e-10)


def test_where_the_samples_are_is_read_off_passes_of_two_and_three() -> None:
    three = torch.randn(3, 5, 4)
    assert sample_axis(three[:2], three) == 0
    assert sample_axis(three[:2].movedim(0, 1), three.movedim(0, 1)) == 1
    # Two rows of each sample, those of one sample together or those of one place.
    assert sample_axis(three[:2].repeat_interleave(2, 0), three.repeat_interleave(2, 0)) == 0
    assert sample_axis(three[:2].repeat(2, 1, 1), three.repeat(2, 1, 1)) is None
    assert sample_axis(three[:2].flatten(1), three) is None
    assert sample_axis(three[:2], three[:2]) is None
