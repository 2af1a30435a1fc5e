from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from blockprune.blocks import ResidualBlock, find_blocks
from blockprune.criteria import CRITERIA, Criterion, Grasp, ScoringContext, Snip, ZeroScoresWarning
from blockprune.criteria.gradient import GradNorm, Taylor
from blockprune.errors import CriterionError, DataError
from tests.criteria.batched import TokenNet, assert_untouched, batched, split, tokens
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


Pairs = list[tuple[Tensor, Tensor]]


def accumulated(model: nn.Module, pairs: Pairs, *, training: bool) -> dict[str, Tensor]:
    """What `backward` leaves in `.grad` of each parameter after all batches."""
    model = copy.deepcopy(model).train(training)
    model.zero_grad()
    for inputs, labels in pairs:
        functional.cross_entropy(model(inputs), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def matrices(model: nn.Module, block: ResidualBlock) -> dict[str, Tensor]:
    """The weights of a block of any of the nets here: what has two dimensions or more."""
    own = {name: model.get_parameter(name) for name in block.parameters}
    return {name: weight.detach() for name, weight in own.items() if weight.dim() > 1}


def direct_taylor(scoring: ScoringContext, model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Sum of |w * sum g| by block, in evaluation mode."""
    gradient = accumulated(model, pairs, training=False)
    return {
        block.name: sum(
            float((weight * gradient[name]).abs().sum(dtype=torch.float64))
            for name, weight in matrices(model, block).items()
        )
        for block in scoring.blocks
    }


def direct_grad_norm(scoring: ScoringContext, model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Sum of ||sum g|| by block, in training mode."""
    gradient = accumulated(model, pairs, training=True)
    return {
        block.name: sum(
            float(gradient[name].double().square().sum().sqrt()) for name in matrices(model, block)
        )
        for block in scoring.blocks
    }


def image_net(dtype: torch.dtype) -> tuple[nn.Module, Pairs]:
    """Trained enough for its running statistics to differ from what they start at."""
    model, (images, labels) = Net().to(dtype), pair(13)
    with torch.no_grad():
        model.train()(images.to(dtype) * 2 + 1)
    return model, split((images.to(dtype), labels), 5, 6, 2)


def attention_net(dtype: torch.dtype) -> tuple[nn.Module, Pairs]:
    model = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8,
        num_classes=3,
    ).to(dtype)  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    return model, split((torch.randn(5, 3, 8, 8, dtype=dtype), torch.arange(5) % 3), 2, 3)


def token_net(dtype: torch.dtype) -> tuple[nn.Module, Pairs]:
    return TokenNet().to(dtype), split(tokens(), 4, 2)


def inplace_net(dtype: torch.dtype) -> tuple[nn.Module, Pairs]:
    """A ReLU that writes into the convolution's output, and one behind the merge."""

    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = (x + block.conv2(block.conv1(x).relu_())).relu_()
            logits: Tensor = self.fc(x.mean((2, 3)))
            return logits

    images, labels = pair(6)
    return InPlace().to(dtype), split((images.to(dtype), labels), 4, 2)


def shared_net(dtype: torch.dtype) -> tuple[nn.Module, Pairs]:
    """Two blocks, and two layers of one of them, with one weight."""
    model, pairs = image_net(dtype)
    first, second, _ = model.blocks
    second.conv1.weight = second.conv2.weight = first.conv1.weight
    return model, pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("net", [image_net, attention_net, token_net, inplace_net])
@pytest.mark.parametrize(
    ("criterion", "direct"), [(Taylor(), direct_taylor), (GradNorm(), direct_grad_norm)]
)
def test_several_batches_against_a_direct_computation(
    criterion: Criterion,
    direct: Callable[[ScoringContext, nn.Module, Pairs], dict[str, float]],
    net: Callable[[torch.dtype], tuple[nn.Module, Pairs]],
    dtype: torch.dtype,
) -> None:
    model, pairs = net(dtype)
    scoring = batched(model, pairs)
    expected = direct(scoring, model, pairs)
    assert len(expected) >= 2
    assert all(expected.values())
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert criterion(scoring) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize(
    ("criterion", "value"),
    [
        (Taylor(), lambda weight, gradient: (weight * gradient).abs().sum()),
        (GradNorm(), lambda weight, gradient: gradient.norm()),
    ],
)
def test_a_shared_weight_counts_once_in_each_block(
    criterion: Criterion, value: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, pairs = shared_net(torch.float64)
    gradient = accumulated(model, pairs, training=isinstance(criterion, GradNorm))
    names = {
        "blocks.0": ("blocks.0.conv1.weight", "blocks.0.conv2.weight"),
        "blocks.1": ("blocks.0.conv1.weight",),
        "blocks.2": ("blocks.2.conv1.weight", "blocks.2.conv2.weight"),
    }
    expected = {
        block: sum(float(value(model.get_parameter(n).detach(), gradient[n])) for n in own)
        for block, own in names.items()
    }
    assert criterion(batched(model, pairs)) == pytest.approx(expected, rel=1e-10)


def test_taylor_of_batches_of_one_size_is_that_of_one_batch() -> None:
    model, _ = image_net(torch.float64)
    whole = pair(12)
    one = Taylor()(batched(model, [whole]))
    for sizes in ((4, 4, 4), (1,) * 12):
        parts = Taylor()(batched(model, split(whole, *sizes)))
        expected = {block: score * len(sizes) for block, score in one.items()}
        assert parts == pytest.approx(expected, rel=1e-10)


def test_the_mean_of_taylor_is_its_sum_over_the_number_of_weights() -> None:
    model, pairs = image_net(torch.float64)
    expected = {b: s / (2 * 4 * 4 * 9) for b, s in Taylor()(batched(model, pairs)).items()}
    assert Taylor("mean")(batched(model, pairs)) == pytest.approx(expected, rel=1e-12)


def test_gradients_of_opposite_batches_cancel() -> None:
    images, _ = pair(4)

    def signed(outputs: Tensor, sign: Tensor) -> Tensor:
        return outputs.square().mean() * sign

    pairs = [(images, torch.tensor(1.0)), (images, torch.tensor(-1.0))]
    for criterion in (Taylor(), GradNorm()):
        assert all(criterion(batched(Net(), pairs[:1], loss_fn=signed)).values())
        with pytest.warns(ZeroScoresWarning):
            scores = criterion(batched(Net(), pairs, loss_fn=signed))
        assert set(scores.values()) == {0}


def test_a_tiny_gradient_has_a_norm() -> None:
    images, labels = pair(4)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) * 1e-25

    model = Net().float()
    plain = GradNorm()(context(model, images.float(), labels))
    tiny = GradNorm()(context(model, images.float(), labels, loss_fn=loss))
    expected = {block: score * 1e-25 for block, score in plain.items()}
    assert tiny == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("criterion", [Snip(), Grasp(), Taylor(), GradNorm()])
def test_the_model_is_untouched(criterion: Criterion) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    assert_untouched(batched(Counting(), split(pair(), 8, 4)), criterion)


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
    for criterion in (Snip(), Grasp(), Taylor(), GradNorm()):
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
    for criterion in (Snip(), Grasp(), Taylor(), GradNorm()):
        with pytest.raises(CriterionError, match=r"'blocks\.1'.*all of its weights.*frozen"):
            criterion(context(model, images, labels))


def test_grasp_needs_two_samples() -> None:
    model, (images, labels) = Net(), pair(1)
    with pytest.raises(DataError, match="at least 2 samples, not 1"):
        Grasp()(context(model, images, labels))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("flat", [True, False], ids=["one value", "a map"])
def test_a_half_of_one_is_split_off_only_where_it_can_be_normalised(size: int, flat: bool) -> None:
    torch.manual_seed(0)
    norm: list[nn.Module] = [nn.Flatten(), nn.Linear(108, 3), nn.BatchNorm1d(3)]
    if not flat:
        norm = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)]
    model = nn.Sequential(*norm).double()
    images, labels = pair(size)
    scoring = context(model, images, labels)
    weight = "1.weight" if flat else "0.weight"
    scoring.blocks = (ResidualBlock("0", "", 1, (size, 3), 0, ("0",), (), (weight,)),)
    state = copy.deepcopy(model.state_dict())
    found = Grasp("sum")(scoring)["0"]
    assert found == pytest.approx(_grasp_of(model, weight, images, labels, whole=flat and size < 4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _grasp_of(
    model: nn.Module, weight: str, images: Tensor, labels: Tensor, *, whole: bool
) -> float:
    """The sum of theta * Hg, by the Hessian-vector products of torch.autograd.functional."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    names = [f"{name}.weight" for name, m in model.named_modules() if m in layers]
    theta = tuple(model.get_parameter(name).detach() for name in names)
    parts = [slice(None)] if whole else [slice(len(images) // 2), slice(len(images) // 2, None)]

    def loss_of(part: slice) -> Callable[..., Tensor]:
        def loss(*values: Tensor) -> Tensor:
            twin = copy.deepcopy(model).train()
            given = dict(zip(names, values, strict=True))
            logits = torch.func.functional_call(twin, given, (images[part],))
            return functional.cross_entropy(logits / TEMPERATURE, labels[part])

        return loss

    calls = [loss_of(part) for part in parts]
    gradients = [torch.autograd.functional.jacobian(call, theta) for call in calls]
    g = tuple(map(sum, zip(*gradients, strict=True)))
    products = [torch.autograd.functional.hvp(call, theta, g)[1] for call in calls]
    place = names.index(weight)
    return float(sum((theta[place] * product[place]).sum() for product in products))


def test_two_samples_are_enough_for_a_network_that_ends_in_one_value_per_channel() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    torch.manual_seed(0)
    model = nn.Sequential(Tail(), Tail(), nn.Linear(6, 3))
    for size in (2, 3):
        data = torch.randn(size, 6), torch.arange(size) % 3
        assert set(blockprune.score_blocks(model, "grasp", data).scores) == {"0", "1"}


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
    for criterion in (Snip(), Taylor(), GradNorm()):
        with pytest.raises(CriterionError, match="does not depend on any weight"):
            criterion(scoring)


@pytest.mark.parametrize("criterion", [Snip(), Grasp(), Taylor(), GradNorm()])
def test_without_labels_or_a_finite_loss_there_is_no_score(criterion: Criterion) -> None:
    images, labels = pair()
    with pytest.raises(CriterionError, match="needs labels"):
        criterion(batched(Net(), [(images, None)]))
    images[0] = torch.nan
    with pytest.raises(CriterionError, match="loss is nan"):
        criterion(batched(Net(), [(images, labels)], example=torch.zeros_like(images)))


def test_no_batch_is_an_error() -> None:
    images, _ = pair(2)
    for criterion in (Snip(), Grasp(), Taylor(), GradNorm()):
        with pytest.raises(DataError, match="empty"):
            criterion(batched(Net(), [], example=images))


def test_unknown_aggregation() -> None:
    for criterion in (Snip, Grasp, Taylor):
        with pytest.raises(CriterionError, match="'mean' or 'sum', not 'max'"):
            criterion("max")  # type: ignore[arg-type]


def test_grasp_of_a_loss_that_is_linear_in_the_weights_is_zero() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.branch(x)
            return out

    inputs, targets = torch.randn(6, 4), torch.zeros(6)
    scoring = context(Linear(), inputs, targets, loss_fn=lambda out, y: out.mean())
    with pytest.warns(ZeroScoresWarning):
        assert list(Grasp()(scoring).values()) == [0.0]
