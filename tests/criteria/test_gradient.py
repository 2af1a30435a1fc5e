from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from blockprune.blocks import ResidualBlock, find_blocks
from blockprune.criteria import CRITERIA, Grasp, Snip, ZeroScoresWarning
from blockprune.errors import CriterionError, DataError
from tests.criteria.nets import Net, context, pair

TEMPERATURE = 200.0


def is_scored(name: str) -> bool:
    """Convolution and linear weights of `Net`, by name."""
    return name.endswith(("conv1.weight", "conv2.weight", "stem.weight", "fc.weight"))


def direct_snip(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """|theta * dL/dtheta| of each weight, written with `backward`."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    return {
        name: (p.detach() * p.grad).abs()
        for name, p in model.named_parameters()
        if is_scored(name) and p.grad is not None
    }


def direct_grasp(
    model: nn.Module, images: Tensor, labels: Tensor, temperature: float = TEMPERATURE
) -> dict[str, Tensor]:
    """theta * Hg of each weight; both halves' z are differentiated by `backward`, into `.grad`."""
    model = copy.deepcopy(model).train()
    weights = {name: p for name, p in model.named_parameters() if is_scored(name)}
    middle = len(images) // 2
    halves = [(images[:middle], labels[:middle]), (images[middle:], labels[middle:])]
    first = [torch.zeros_like(p) for p in weights.values()]
    for x, y in halves:
        loss = functional.cross_entropy(model(x) / temperature, y)
        for total, gradient in zip(
            first, torch.autograd.grad(loss, [*weights.values()]), strict=True
        ):
            total += gradient
    for x, y in halves:
        loss = functional.cross_entropy(model(x) / temperature, y)
        second = torch.autograd.grad(loss, [*weights.values()], create_graph=True)
        z = torch.zeros((), dtype=images.dtype)
        for total, gradient in zip(first, second, strict=True):
            z = z + (total * gradient).sum()
        z.backward()
    return {name: p.detach() * p.grad for name, p in weights.items() if p.grad is not None}


def gradient_at(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sum of the two halves' gradients, nothing else."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    middle = len(images) // 2
    for x, y in ((images[:middle], labels[:middle]), (images[middle:], labels[middle:])):
        functional.cross_entropy(model(x) / TEMPERATURE, y).backward()
    return {n: p.grad for n, p in model.named_parameters() if is_scored(n) and p.grad is not None}


def by_block(values: dict[str, Tensor], aggregate: Callable[[Tensor], Tensor]) -> dict[str, float]:
    names = [f"blocks.{i}" for i in range(3)]
    return {
        block: float(
            aggregate(torch.cat([v.flatten() for n, v in values.items() if n.startswith(block)]))
        )
        for block in names
    }


@pytest.mark.parametrize(
    ("name", "direct", "aggregate"),
    [
        ("snip", direct_snip, torch.mean),
        ("snip_sum", direct_snip, torch.sum),
        ("grasp", direct_grasp, torch.mean),
        ("grasp_sum", direct_grasp, torch.sum),
    ],
)
def test_against_a_direct_computation(
    name: str,
    direct: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]],
    aggregate: Callable[[Tensor], Tensor],
) -> None:
    model, (images, labels) = Net(), pair(13)
    scores = CRITERIA[name](context(model, images, labels))
    expected = by_block(direct(model, images, labels), aggregate)
    assert scores == pytest.approx(expected, rel=1e-10)


def test_grasp_against_finite_differences_of_the_gradient() -> None:
    model, (images, labels) = Net(), pair()
    gradient = gradient_at(model, images, labels)
    step = 1e-6 / torch.cat([g.flatten() for g in gradient.values()]).norm()
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in gradient:
                    parameter += sign * step * gradient[name]
        sides.append(gradient_at(moved, images, labels))
    weights = dict(model.named_parameters())
    product = {n: weights[n].detach() * (sides[0][n] - sides[1][n]) / (2 * step) for n in gradient}
    scores = CRITERIA["grasp"](context(model, images, labels))
    assert scores == pytest.approx(by_block(product, torch.mean), rel=1e-5)


def test_identities_of_filters_before_a_normalisation() -> None:
    """sum theta g = 0 and sum theta Hg = -||g||^2 over each filter, and so over each block."""
    model, (images, labels) = Net(), pair()
    gradient = gradient_at(model, images, labels)
    product = direct_grasp(model, images, labels)
    for name, parameter in model.named_parameters():
        if name in gradient and "conv" in name:
            theta_g = (parameter * gradient[name]).flatten(1)
            squared = gradient[name].flatten(1).square().sum(1)
            assert theta_g.sum(1).abs().max() <= 1e-9 * theta_g.abs().max()
            torch.testing.assert_close(-product[name].flatten(1).sum(1), squared, rtol=1e-7, atol=0)
    squares = {name: -value.square() for name, value in gradient.items()}
    scores = CRITERIA["grasp_sum"](context(model, images, labels))
    assert scores == pytest.approx(by_block(squares, torch.sum), rel=1e-8)


def test_temperature_is_that_of_the_logits() -> None:
    model, (images, labels) = Net(), pair()
    scores = Grasp("sum", temperature=1.0)(context(model, images, labels))
    expected = by_block(direct_grasp(model, images, labels, temperature=1.0), torch.sum)
    assert scores == pytest.approx(expected, rel=1e-10)


def test_running_statistics_do_not_matter_and_stay() -> None:
    model, (images, labels) = Net(), pair()
    before = CRITERIA["grasp"](context(model, images, labels))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 5.0)
            nn.init.constant_(module.running_var, 9.0)
    scoring = context(model, images, labels)
    state = {name: value.clone() for name, value in scoring.model.state_dict().items()}
    for name in ("snip", "grasp"):
        CRITERIA[name](scoring)
    assert CRITERIA["grasp"](scoring) == before
    after = scoring.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert not any(module.training for module in scoring.model.modules())
    assert all(parameter.grad is None for parameter in scoring.model.parameters())


def test_dropout_and_drop_path_are_off() -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.dropout(x, 0.5, self.training))

    model, (images, labels) = Dropping(), pair()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert Snip()(context(model, images, labels)) == Snip()(context(plain, images, labels))


def test_attention_differentiates_twice() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8,
        num_classes=3,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    scores = Grasp()(context(model, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])))
    assert len(scores) == 2
    assert all(scores.values())


def test_a_weight_shared_by_two_blocks_counts_in_both_and_once_in_the_hessian() -> None:
    model, (images, labels) = Net(), pair()
    model.blocks[1].conv1.weight = model.blocks[0].conv1.weight
    scores = Grasp("sum")(context(model, images, labels))
    expected = direct_grasp(model, images, labels)
    expected["blocks.1.conv1.weight"] = expected["blocks.0.conv1.weight"]
    assert scores == pytest.approx(by_block(expected, torch.sum), rel=1e-10)


def test_a_block_that_the_loss_does_not_reach_scores_zero() -> None:
    class Unread(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[:2](torch.relu(self.norm(self.stem(x))))
            self.blocks[2](x)
            logits: Tensor = self.fc(x.mean((2, 3)))
            return logits

    model, (images, labels) = Unread(), pair()
    blocks = find_blocks(Net(), images).blocks
    scoring = context(model, images, labels)
    scoring.blocks = blocks
    for criterion in (Snip(), Grasp()):
        scores = criterion(scoring)
        assert scores["blocks.2"] == 0
        assert scores["blocks.0"] != 0


def test_branches_initialised_to_zero_are_reported() -> None:
    model, (images, labels) = Net(), pair()
    for block in model.blocks:
        nn.init.zeros_(block.bn2.weight)
    for criterion in (Snip(), Grasp()):
        with pytest.warns(ZeroScoresWarning, match=r"Every one of the 3 blocks scores 0"):
            scores = criterion(context(model, images, labels))
        assert set(scores.values()) == {0}


def test_frozen_weights_are_left_out_and_a_frozen_block_is_named() -> None:
    model, (images, labels) = Net(), pair()
    model.blocks[1].conv1.weight.requires_grad_(False)
    scores = Snip("sum")(context(model, images, labels))
    expected = direct_snip(model, images, labels)
    assert scores == pytest.approx(by_block(expected, torch.sum), rel=1e-10)
    model.blocks[1].conv2.weight.requires_grad_(False)
    for criterion in (Snip(), Grasp()):
        with pytest.raises(CriterionError, match=r"'blocks\.1'.*all of its weights.*frozen"):
            criterion(context(model, images, labels))


def test_grasp_needs_two_samples() -> None:
    model, (images, labels) = Net(), pair(1)
    with pytest.raises(DataError, match="at least 2 samples, not 1"):
        Grasp()(context(model, images, labels))


def test_halves_too_small_for_batch_statistics_quote_the_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3), nn.BatchNorm1d(3)).double()
    images, labels = pair(2)
    scoring = context(model, images, labels)
    scoring.blocks = (ResidualBlock("1", "", 1, (2, 3), 0, ("1",), (), ("1.weight",)),)
    with pytest.raises(DataError, match="more than 1 value per channel"):
        Grasp()(scoring)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_an_operation_that_differentiates_once_is_reported() -> None:
    images, labels = pair()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(OnceDifferentiable.apply(outputs), targets)

    scoring = context(Net(), images, labels, loss_fn=loss)
    assert set(Snip()(scoring)) == {f"blocks.{i}" for i in range(3)}
    with pytest.raises(CriterionError, match="differentiable once"):
        Grasp()(scoring)


def test_an_error_of_autograd_is_quoted() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
            raise RuntimeError("no derivative of this one")

    images, labels = pair()
    scoring = context(
        Net(), images, labels, loss_fn=lambda out, y: Failing.apply(out).square().mean()
    )
    with pytest.raises(CriterionError, match=r"snip cannot differentiate.*no derivative of this"):
        Snip()(scoring)


def test_a_detached_output_is_reported() -> None:
    images, labels = pair()
    scoring = context(Net(), images, labels, loss_fn=lambda out, y: out.detach().sum())
    with pytest.raises(CriterionError, match="does not depend on any weight"):
        Snip()(scoring)


def test_unknown_aggregation() -> None:
    for criterion in (Snip, Grasp):
        with pytest.raises(CriterionError, match="'mean' or 'sum', not 'max'"):
            criterion("max")  # type: ignore[arg-type]
