"""Narrower networks, each held against the dense one with zeros where a reader lost a channel."""

from __future__ import annotations

import builtins
import copy
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from blockprune import remove_blocks
from blockprune.costs import model_costs
from blockprune.errors import (
    CriterionError,
    DataError,
    InfeasibleBudgetError,
    MissingExtraError,
    PlanError,
    StalePlanError,
    TraceError,
    VerificationError,
)
from blockprune.filters import (
    FILTER_CRITERIA,
    FilterPlan,
    LayerCut,
    filter_layers,
    filter_refusals,
    filter_scores,
    fitted_filters,
    make_filter_plan,
    removal,
    remove_filters,
)
from blockprune.models import lenet300, resnet18, resnet20, resnet32, resnet56, vgg16

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 9])


class Branch(nn.Module):
    """``conv2(middle(conv1(x)))``, the middle to be chosen."""

    def __init__(self, width: int, *middle: nn.Module, groups: int = 1, reader: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 6, 3, padding=1, groups=groups)
        self.middle = nn.Sequential(*middle)
        self.conv2 = nn.Conv2d(6, width, 3, padding=1, groups=reader)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.middle(self.conv1(x)))


class Residual(nn.Module):
    """A network with one residual branch behind a stem, and a head."""

    def __init__(self, branch: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.branch = branch
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).mean(dim=(2, 3)))


class Untraceable(Residual):
    """Its root decides by values, so no symbolic trace exists."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(1 if float(x.detach().abs().sum()) > 0 else 2):
            x = x + self.branch(x)
        return self.head(x.mean(dim=(2, 3)))


class ByKeyword(Residual):
    """Its forward takes keywords, and the reader is called by keyword."""

    def forward(self, *, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.stem(images)
        inner = self.branch.middle(self.branch.conv1(x))
        return {"logits": self.head((x + self.branch.conv2(input=inner)).mean(dim=(2, 3)))}


def bottlenecks() -> nn.Module:
    return TorchvisionResNet(Bottleneck, [2, 1, 1, 1], num_classes=10)


def small_resnet18() -> nn.Module:
    return TorchvisionResNet(BasicBlock, [1, 2, 1, 1], num_classes=10)


def with_batch_norm() -> nn.Module:
    return Residual(Branch(4, nn.BatchNorm2d(6), nn.ReLU(inplace=True)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "basic": small_resnet18,
    "bottleneck": bottlenecks,
    "in-place": with_batch_norm,
    "no affine": lambda: Residual(Branch(4, nn.BatchNorm2d(6, affine=False), nn.ELU())),
    "no statistics": lambda: Residual(
        Branch(4, nn.BatchNorm2d(6, track_running_stats=False), nn.Sigmoid())
    ),
    "no norm": lambda: Residual(Branch(4, nn.Sigmoid())),
    "bare": lambda: Residual(Branch(4)),
    "untraceable": lambda: Untraceable(Branch(4, nn.BatchNorm2d(6), nn.ReLU())),
    "one slope": lambda: Residual(Branch(4, nn.BatchNorm2d(6), nn.PReLU(1))),
}


def built(name: str) -> nn.Module:
    """Return the model in float64, its statistics and shifts unlike those at the start."""
    torch.manual_seed(7)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for _ in range(2):
            model.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    return model


def plan_of(model: nn.Module, share: float = 0.4, seed: int = 0, **inputs: Any) -> FilterPlan:
    example = inputs.get("example_inputs", IMAGES.to(next(model.parameters()).dtype))
    layers = filter_layers(model, example)
    scores = filter_scores(model, "random", None, example_inputs=example, seed=seed)
    count = max(1, int(share * sum(layer.filters for layer in layers)))
    return make_filter_plan(layers, scores, count=count, seed=seed)


def readers_of(model: nn.Module, name: str) -> list[str]:
    """Return who reads a layer, worked out from the layout of these models alone."""
    owner, _, child = name.rpartition(".")
    return [f"{owner}.conv{int(child[-1]) + 1}"]


def with_zeros(model: nn.Module, plan: FilterPlan) -> nn.Module:
    """The oracle: the dense model whose readers' inputs are multiplied by 0 or 1 by channel."""
    reference = copy.deepcopy(model)
    for name, cut in plan.cuts.items():
        for reader in readers_of(model, name):
            consumer = reference.get_submodule(reader)
            mask = torch.ones(consumer.in_channels, dtype=consumer.weight.dtype)
            mask[list(cut.remove)] = 0

            def zero(_: nn.Module, args: tuple[Tensor], mask: Tensor = mask) -> Any:
                return (args[0] * mask[:, None, None],)

            consumer.register_forward_pre_hook(zero)
    return reference


def outcome(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(images)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output**2 + output * weights).sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sliced_by_hand(tensors: Mapping[str, Tensor], plan: FilterPlan) -> dict[str, Tensor]:
    """Slice what torchvision's and our own blocks are made of: conv, norm and the next conv."""
    result = dict(tensors)
    for name, cut in plan.cuts.items():
        kept = [index for index in range(cut.filters) if index not in cut.remove]
        owner, _, child = name.rpartition(".")
        number = int(child[-1])
        rows = (f"{name}.", f"{owner}.bn{number}.", f"{owner}.middle.0.")
        for key in list(result):
            if key.startswith(rows) and result[key].dim():
                result[key] = result[key][kept]
            if key == f"{owner}.conv{number + 1}.weight":
                result[key] = result[key][:, kept]
    return result


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_narrow_equals_dense_with_zeros_where_readers_lost_a_channel(name: str, mode: str) -> None:
    model = built(name).train(mode == "train")
    plan = plan_of(model)
    narrow = remove_filters(model, plan, IMAGES.double())
    assert narrow.training == (mode == "train")
    # Another batch size than that of the example.
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    reference = with_zeros(model, plan)
    expected, dense_gradients = outcome(reference, images)
    found, gradients = outcome(narrow, images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = sliced_by_hand(dense_gradients, plan)
    assert gradients.keys() == wanted.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-7, atol=1e-7)
    buffers = sliced_by_hand(dict(reference.named_buffers()), plan)
    for key, buffer in narrow.named_buffers():
        torch.testing.assert_close(buffer, buffers[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "bottleneck", "no affine"])
def test_state_is_the_dense_one_sliced(name: str) -> None:
    model = built(name)
    plan = plan_of(model)
    state = remove_filters(model, plan, IMAGES.double(), verify=False).state_dict()
    for expected in (
        sliced_by_hand(model.state_dict(), plan),
        fitted_filters(model.state_dict(), plan),
    ):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_velocities_of_the_optimiser_are_cut_alike_and_training_goes_on() -> None:
    model = built("resnet20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(IMAGES.double()), LABELS).backward()
        optimizer.step()
    velocities = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    plan = plan_of(model)
    narrow = remove_filters(model, plan, IMAGES.double())
    cut = fitted_filters(velocities, plan)
    by_hand = sliced_by_hand(velocities, plan)
    for name, parameter in narrow.named_parameters():
        assert cut[name].shape == parameter.shape
        assert torch.equal(cut[name], by_hand[name])


def test_batch_of_one_and_half_precision() -> None:
    torch.manual_seed(0)
    model = with_batch_norm().to(torch.bfloat16)
    image = IMAGES[:1].to(torch.bfloat16)
    plan = plan_of(model)
    narrow = remove_filters(model, plan, image)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    reference = with_zeros(model, plan).eval()
    torch.testing.assert_close(narrow.eval()(image), reference(image), rtol=2e-2, atol=2e-2)


def test_no_filter_gone_is_the_dense_model() -> None:
    model = built("resnet20").eval()
    images = IMAGES.double()
    scores = filter_scores(model, "l1", None, example_inputs=images)
    plan = make_filter_plan(filter_layers(model, images), scores, count=0)
    assert (plan.cuts, plan.params, plan.macs) == ({}, 0, 0)
    assert torch.equal(remove_filters(model, plan, images)(images), model(images))


def test_the_dense_model_is_untouched_and_shares_nothing() -> None:
    model = built("resnet20").train()
    model.layer1[0].bn1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    functional.cross_entropy(model(IMAGES.double()), LABELS).backward()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    plan = plan_of(model)
    narrow = remove_filters(model, plan, IMAGES.double())
    assert not calls
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert modes == [module.training for module in narrow.modules()]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "layer2.0.conv1.weight")
        assert parameter.requires_grad == narrow.get_parameter(name).requires_grad
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name])
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in narrow.parameters()
    }
    assert not shared


def test_cut_again_and_all_of_the_narrow_models_gradients_flow() -> None:
    model = built("bottleneck")
    once = remove_filters(model, plan_of(model, 0.3), IMAGES.double())
    twice = remove_filters(once, plan_of(once, 0.3, seed=1), IMAGES.double())
    _, gradients = outcome(twice.train(), IMAGES.double())
    assert gradients.keys() == {name for name, _ in twice.named_parameters()}


def test_a_block_ticket_loses_filters_too_and_no_autograd_is_needed() -> None:
    dense = built("resnet20")
    ticket = remove_blocks(dense, ["layer1.1"], IMAGES.double()).eval()
    with torch.inference_mode():
        plan = plan_of(ticket)
        narrow = remove_filters(ticket, plan, IMAGES.double())
        found, expected = narrow(IMAGES.double()), with_zeros(ticket, plan)(IMAGES.double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not any(name.startswith("layer1.1.") for name in plan.cuts)
    outcome(narrow.train(), IMAGES.double())


def test_dropout_still_follows_the_mode() -> None:
    model = Residual(Branch(4, nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))).double().eval()
    plan = plan_of(model)
    narrow = remove_filters(model, plan, IMAGES.double())
    images = IMAGES.double()
    torch.testing.assert_close(narrow(images), with_zeros(model, plan)(images))
    assert not torch.equal(narrow.train()(images), narrow(images))


def test_keywords_in_and_a_dict_out() -> None:
    model = ByKeyword(Branch(4, nn.BatchNorm2d(6), nn.ReLU())).double()
    inputs = {"images": IMAGES.double()}
    plan = plan_of(model, example_inputs=inputs)
    assert list(remove_filters(model, plan, inputs)(**inputs)) == ["logits"]
    assert plan.count == 2


def test_a_wrong_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("resnet20")
    plan = plan_of(model)

    def others(state: Mapping[str, Tensor], plan: FilterPlan) -> dict[str, Tensor]:
        cuts = {
            name: LayerCut(
                filters=cut.filters,
                remove=tuple(sorted((i + 1) % cut.filters for i in cut.remove)),
                axes={k: a for k, a in cut.axes.items() if not a},
            )
            for name, cut in plan.cuts.items()
        }
        readers = fitted_filters(state, plan)
        rows = fitted_filters(state, plan.model_copy(update={"cuts": cuts}))
        return {k: rows[k] if rows[k].shape == readers[k].shape else readers[k] for k in readers}

    monkeypatch.setattr(removal, "fitted_filters", others)
    with pytest.raises(VerificationError, match="in eval mode"):
        remove_filters(model, plan, IMAGES.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.003, 1.03])
def test_a_cut_that_is_wrong_by_little_is_found_in_any_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    model = Residual(Branch(4, nn.BatchNorm2d(6), nn.ReLU())).to(dtype).eval()
    plan = plan_of(model, example_inputs=IMAGES.to(dtype))
    remove_filters(model, plan, IMAGES.to(dtype))

    def scaled(state: Mapping[str, Tensor], plan: FilterPlan) -> dict[str, Tensor]:
        return {
            name: tensor * factor if name == "branch.conv2.weight" else tensor
            for name, tensor in fitted_filters(state, plan).items()
        }

    monkeypatch.setattr(removal, "fitted_filters", scaled)
    with pytest.raises(VerificationError, match="removed filters read as zero"):
        remove_filters(model, plan, IMAGES.to(dtype))


def test_a_cut_that_is_of_another_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual(Branch(4, nn.BatchNorm2d(6), nn.ReLU())).eval()
    plan = plan_of(model, example_inputs=IMAGES)

    def wide(state: Mapping[str, Tensor], plan: FilterPlan) -> dict[str, Tensor]:
        return {name: t.double() for name, t in fitted_filters(state, plan).items()}

    monkeypatch.setattr(removal, "fitted_filters", wide)
    with pytest.raises(VerificationError, match=r"fails where the dense one .* runs"):
        remove_filters(model, plan, IMAGES)


def test_an_operation_that_mixes_channels_is_found() -> None:
    # An operation without parameters, which a graph of layers takes for one by channel.
    model = Residual(Branch(4, nn.Softmax(dim=1))).double()
    with pytest.raises(VerificationError, match="removed filters read as zero, in eval mode"):
        remove_filters(model, plan_of(model), IMAGES.double())


# --- which layers ---------------------------------------------------------------------------------


def test_inner_convolutions_of_the_paper_networks() -> None:
    layers = filter_layers(resnet32(), IMAGES)
    assert [layer.name for layer in layers] == [
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(5)
    ]
    assert [layer.filters for layer in layers] == [16] * 5 + [32] * 5 + [64] * 5
    refusals = filter_refusals(resnet32(), IMAGES)
    assert {refusal.reason for refusal in refusals} == {"merged"}
    assert len(layers) + len(refusals) == sum(
        isinstance(m, nn.Conv2d) for m in resnet32().modules()
    )


def test_inner_convolutions_of_bottlenecks() -> None:
    layers = filter_layers(bottlenecks(), IMAGES)
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"conv1", "conv2"}
    assert len(layers) == 10


def test_our_own_resnet18() -> None:
    assert len(filter_layers(resnet18(), IMAGES)) == 8


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "grouped": (lambda: Residual(Branch(4, groups=2)), "branch.conv1", "grouped"),
    "grouped reader": (lambda: Residual(Branch(4, reader=2)), "branch.conv1", "grouped"),
    "depthwise between": (
        lambda: Residual(Branch(4, nn.Conv2d(6, 6, 3, padding=1, groups=6))),
        "branch.conv1",
        "grouped",
    ),
    "group norm": (lambda: Residual(Branch(4, nn.GroupNorm(2, 6))), "branch.conv1", "custom"),
    "slopes": (lambda: Residual(Branch(4, nn.PReLU(6))), "branch.conv1", "custom"),
    "transposed": (
        lambda: Residual(
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 6, 1), nn.Conv2d(6, 4, 1))
        ),
        "branch.0",
        "custom",
    ),
    "plain": (lambda: vgg16(image_size=8), "features.0", "outside"),
    "stem": (resnet20, "conv1", "merged"),
    "projection": (resnet20, "layer2.0.downsample", "merged"),
    "last of a branch": (resnet20, "layer1.0.conv2", "merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    factory, name, reason = REFUSED[case]
    found = {refusal.name: refusal for refusal in filter_refusals(factory(), IMAGES)}
    assert found[name].reason == reason
    assert found[name].detail.endswith(".")
    assert name not in {layer.name for layer in filter_layers(factory(), IMAGES)}


def test_what_runs_twice_or_is_shared_keeps_its_filters() -> None:
    twice = nn.Sequential((branch := Branch(4, nn.ReLU())), branch)
    tied = Branch(6, nn.ReLU())
    tied.conv2.weight = tied.conv1.weight
    for model in (Residual(twice), Residual(tied, width=6)):
        assert filter_layers(model, IMAGES) == ()
        assert "shared" in {refusal.reason for refusal in filter_refusals(model, IMAGES)}


def test_what_is_returned_joined_or_computed_keeps_its_filters() -> None:
    class Returning(Residual):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            inner = self.branch.conv1(x)
            return x + self.branch.conv2(inner), inner

    class Joining(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            inner = self.branch.conv1(x)
            return x + self.branch.conv2(torch.cat([inner[:, 3:], inner[:, :3]], dim=1))

    normed = Branch(4, nn.ReLU())
    nn.utils.parametrizations.weight_norm(normed.conv2)
    models = {"returned": Returning(Branch(4)), "merged": Joining(Branch(4))}
    for reason, model in {**models, "custom": Residual(normed)}.items():
        found = {refusal.name: refusal.reason for refusal in filter_refusals(model, IMAGES)}
        assert found["branch.conv1"] == reason


def test_frozen_layers_are_found_like_any_other() -> None:
    frozen = resnet20().requires_grad_(False)
    assert len(filter_layers(frozen, IMAGES)) == 9
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_branch_of_the_input_itself() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch(3, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    assert [layer.name for layer in filter_layers(Bare(), IMAGES)] == ["branch.conv1"]


# --- costs and plans ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "bottleneck"])
@pytest.mark.parametrize("seed", range(3))
def test_costs_of_a_plan_are_what_the_narrow_model_lacks(name: str, seed: int) -> None:
    model = MODELS[name]()
    plan = plan_of(model, random.Random(seed).uniform(0.05, 0.9), seed)
    narrow = remove_filters(model, plan, IMAGES, verify=False)
    before, after = model_costs(model, IMAGES), model_costs(narrow, IMAGES)
    assert (before.params - after.params, before.macs - after.macs) == (plan.params, plan.macs)


def test_32_filters_of_resnet32_are_one_block_of_stage_1() -> None:
    model = resnet32()
    plan = make_plan(model, count=32)
    narrow = remove_filters(model, plan, IMAGES, verify=False)

    def filters(network: nn.Module) -> int:
        return sum(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d))

    assert (filters(model), filters(narrow)) == (1232, 1200)
    # The largest even share below 32: none of 16, one of 32 and three of 64; twelve are drawn.
    least = {16: 0, 32: 1, 64: 3}
    assert all(
        len(plan.cuts[layer.name].remove) >= least[layer.filters]
        for layer in filter_layers(model, IMAGES)
        if least[layer.filters]
    )


def make_plan(model: nn.Module, **target: Any) -> FilterPlan:
    images = torch.zeros(1, 3, 32, 32)
    scores = filter_scores(model, "l1", None, example_inputs=images)
    return make_filter_plan(filter_layers(model, images), scores, **target)


@pytest.mark.parametrize("target", [{"params": 4704}, {"macs": 4_718_592}, {"params": 41_000}])
def test_a_match_in_size_is_below_by_less_than_the_smallest_filter(target: dict[str, int]) -> None:
    ((kind, asked),) = target.items()
    plan = make_plan(resnet20(), **target)
    costs = [getattr(layer, kind) for layer in filter_layers(resnet20(), torch.zeros(1, 3, 32, 32))]
    assert asked - min(costs) < plan.reached <= asked
    assert (plan.target, plan.asked) == (kind, asked)


def test_lowest_scores_go_and_ties_by_index() -> None:
    model = Residual(Branch(4))
    layers = filter_layers(model, IMAGES)
    scores = {"branch.conv1": torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 3.0])}
    assert make_filter_plan(layers, scores, count=3).cuts["branch.conv1"].remove == (1, 2, 3)


def test_remainder_follows_the_seed_and_plans_survive_json() -> None:
    model = resnet20()
    plans = [make_plan(model, count=20, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0].count == plans[2].count == 20
    assert FilterPlan.from_json(plans[0].to_json()) == plans[0]


def test_a_minimum_stays() -> None:
    model = Residual(Branch(4))
    layers = filter_layers(model, IMAGES)
    scores = {"branch.conv1": torch.arange(6.0)}
    assert len(make_filter_plan(layers, scores, count=5).cuts["branch.conv1"].kept) == 1
    with pytest.raises(InfeasibleBudgetError, match="min_filters=3 at most 3 of the 1 layers"):
        make_filter_plan(layers, scores, count=4, min_filters=3)
    with pytest.raises(InfeasibleBudgetError, match=r"count=6 cannot go.* at most 5"):
        make_filter_plan(layers, scores, count=6)
    with pytest.raises(InfeasibleBudgetError, match="the smallest has 73"):
        make_filter_plan(layers, scores, params=10)


def test_bad_requests_are_refused() -> None:
    model = Residual(Branch(4))
    layers, scores = filter_layers(model, IMAGES), {"branch.conv1": torch.arange(6.0)}
    for wrong, match in (
        ({}, "give one of count, params, macs.*got none"),
        ({"count": 1, "macs": 2}, "count=1 and macs=2"),
        ({"count": -1}, "not -1"),
        ({"params": 1.5}, "not 1.5"),
        ({"count": True}, "not True"),
        ({"count": 1, "min_filters": 0}, "min_filters is a count of at least 1, not 0"),
    ):
        with pytest.raises(PlanError, match=match):
            make_filter_plan(layers, scores, **wrong)
    for bad, match in (
        ({"branch.conv2": torch.arange(4.0)}, r"no scores of layer .* Did you mean branch.conv2"),
        (
            {"branch.conv1": torch.arange(5.0)},
            r"has 6 filters and its scores have the shape \(5,\)",
        ),
        ({"branch.conv1": torch.full((6,), float("nan"))}, "not a finite number"),
    ):
        with pytest.raises(PlanError, match=match):
            make_filter_plan(layers, bad, count=1)
    with pytest.raises(PlanError, match="no layer of this model may lose filters"):
        make_filter_plan((), {}, count=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"remove": [0, 0]}, "ascend"),
        ({"remove": [9]}, "no filter 9 among 6"),
        ({"remove": [0, 1, 2, 3, 4, 5]}, "at least one filter stays"),
        ({"remove": [-1]}, "greater than or equal to 0"),
        ({"code": "import os"}, "Extra inputs"),
    ],
)
def test_damaged_plans_are_refused(change: dict[str, Any], match: str) -> None:
    model = Residual(Branch(4))
    plan = plan_of(model).model_dump(mode="json")
    plan["cuts"]["branch.conv1"].update(change)
    with pytest.raises(PlanError, match=match):
        FilterPlan.from_json(json.dumps(plan))
    with pytest.raises(PlanError, match="no plan of filters"):
        FilterPlan.from_json("{")


def test_a_plan_of_another_model_is_refused() -> None:
    plan = plan_of(resnet20(), 0.9)
    with pytest.raises(StalePlanError, match="has none of that name"):
        remove_filters(Residual(Branch(4)), plan, IMAGES)
    once = remove_filters(resnet20(), plan, IMAGES)
    with pytest.raises(StalePlanError, match=r"has 16 filters.* it has \d+, held by"):
        remove_filters(once, plan, IMAGES)
    with pytest.raises(StalePlanError, match="Give the state of the dense model"):
        fitted_filters(once.state_dict(), plan)
    with pytest.raises(StalePlanError):
        remove_filters(lenet300(in_features=192), plan, IMAGES)


# --- scores ---------------------------------------------------------------------------------------


def gradients_by_hand(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], train: bool, divisor: float = 1.0
) -> dict[str, Tensor]:
    twin = copy.deepcopy(model).train(train)
    for images, labels in batches:
        functional.cross_entropy(twin(images) / divisor, labels).backward()
    return {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("criterion", ["l1", "l2", "snip", "taylor"])
def test_scores_are_the_mean_over_the_weights_of_each_filter(criterion: str) -> None:
    model = built("resnet20").eval()
    batches = [(IMAGES.double(), LABELS), (IMAGES.double().flip(0), LABELS)]
    scores = filter_scores(model, criterion, batches, example_inputs=IMAGES.double())
    used = batches if criterion == "taylor" else batches[:1]
    gradients = gradients_by_hand(model, used, train=criterion == "snip")
    for name, found in scores.items():
        weight = model.get_submodule(name).weight.detach()
        gradient = gradients[f"{name}.weight"]
        for index, score in enumerate(found):
            w, g = weight[index], gradient[index]
            terms = {"l1": w.abs(), "l2": w * w}.get(criterion, (w * g).abs())
            assert float(score) == pytest.approx(float(terms.mean()), rel=1e-9)


def test_grasp_before_batch_normalisation_is_minus_the_squared_gradient() -> None:
    model = built("resnet20")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8)
    scores = filter_scores(model, "grasp", (images, labels), example_inputs=images)
    halves = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    gradients = gradients_by_hand(model, halves, train=True, divisor=200.0)
    for name, found in scores.items():
        squares = (gradients[f"{name}.weight"] ** 2).flatten(1).mean(dim=1)
        torch.testing.assert_close(found, -squares, rtol=1e-4, atol=1e-16)


def test_random_scores_follow_the_seed_alone() -> None:
    first, again, other = (
        filter_scores(resnet20(), "random", None, example_inputs=IMAGES, seed=seed)
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("criterion", FILTER_CRITERIA)
def test_scoring_leaves_the_model_and_the_generators_alone(criterion: str) -> None:
    model = resnet20().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scores = filter_scores(model, criterion, (IMAGES, LABELS), example_inputs=IMAGES)
    assert {len(values) for values in scores.values()} == {16, 32, 64}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_scoring_requests_are_refused() -> None:
    model = resnet20()
    with pytest.raises(CriterionError, match=r"no filter criterion 'snap'.*Did you mean snip"):
        filter_scores(model, "snap", None, example_inputs=IMAGES)
    with pytest.raises(CriterionError, match="'snip' reads data with labels, and data is None"):
        filter_scores(model, "snip", None, example_inputs=IMAGES)
    with pytest.raises(DataError, match="at least 2 samples, not 1"):
        filter_scores(model, "grasp", (IMAGES[:1], LABELS[:1]), example_inputs=IMAGES)
    model.layer1[0].conv1.weight.requires_grad_(False)
    with pytest.raises(CriterionError, match=r"'layer1.0.conv1' cannot be scored by 'taylor'"):
        filter_scores(model, "taylor", (IMAGES, LABELS), example_inputs=IMAGES)
    with torch.no_grad():
        model.layer1[1].conv1.weight[0] = float("inf")
    with pytest.raises(CriterionError, match=r"gives layer 'layer1.1.conv1' a score"):
        filter_scores(model, "l1", None, example_inputs=IMAGES)
    assert filter_scores(vgg16(image_size=8), "l1", None, example_inputs=IMAGES) == {}


def test_inputs_that_the_model_refuses() -> None:
    with pytest.raises(TraceError, match="ResNet does not run on inputs of shape"):
        filter_layers(resnet20(), torch.zeros(1, 4, 8, 8))


def test_without_torch_pruning_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def absent(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch_pruning":
            raise ModuleNotFoundError(name)
        return whole(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'blockprune\[filters\]'"):
        filter_layers(resnet20(), IMAGES)


def test_resnet56_at_the_filters_of_one_block() -> None:
    plan = make_plan(resnet56(), count=32)
    assert remove_filters(resnet56(), plan, IMAGES).layer1[0].conv1.out_channels <= 16


# --- what torch-pruning, or the check, has to say -------------------------------------------------


def test_what_autograd_does_not_record_keeps_its_filters() -> None:
    class Unrecorded(Residual):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    class Detached(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    for model in (Unrecorded(Branch(4)), Detached(Branch(4))):
        assert filter_layers(model, IMAGES) == ()
        found = {refusal.name: refusal for refusal in filter_refusals(model, IMAGES)}
        assert found.keys() == {"stem", "branch.conv1", "branch.conv2"}
        assert found["branch.conv1"].reason == "outside"
        assert "no_grad" in found["branch.conv1"].detail


def test_channels_that_are_split_before_they_are_read_stay() -> None:
    class Split(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            inner = self.branch.conv1(x)[:, :3]
            return self.head((x + self.branch.conv2(inner)).mean(dim=(2, 3)))

    branch = Branch(4)
    branch.conv2 = nn.Conv2d(3, 4, 1)
    found = {refusal.name: refusal.reason for refusal in filter_refusals(Split(branch), IMAGES)}
    assert found["branch.conv1"] == "reshaped"


def test_an_error_of_torch_pruning_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_pruning

    def failing(*_: Any, **__: Any) -> Any:
        raise KeyError("no such node")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", failing)
    with pytest.raises(TraceError, match=r"torch-pruning cannot follow ResNet: KeyError: 'no such"):
        filter_layers(resnet20(), IMAGES)


class OfIds(nn.Module):
    """Convolutions over embedded token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)
        self.branch = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        return self.head((x + self.branch(x)).mean(2))


def test_a_model_of_token_ids_loses_filters() -> None:
    torch.manual_seed(0)
    model, ids = OfIds().eval(), torch.tensor([[1, 5, 0, 10], [3, 3, 2, 7]])
    plan = plan_of(model, example_inputs=ids)
    [(name, cut)] = plan.cuts.items()
    assert (name, len(cut.remove)) == ("branch.0", 2)
    narrow = remove_filters(model, plan, ids)
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        zeros.branch[2].weight[:, list(cut.remove)] = 0
    torch.testing.assert_close(narrow(ids), zeros(ids))
    assert narrow.branch[0].out_channels == 4


def test_a_model_for_inference_only_is_narrowed() -> None:
    class InferenceOnly(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("inference only")
            return super().forward(x)

    model = InferenceOnly(Branch(4)).eval()
    plan = plan_of(model)
    narrow = remove_filters(model, plan, IMAGES)
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        zeros.branch.conv2.weight[:, list(plan.cuts["branch.conv1"].remove)] = 0
    torch.testing.assert_close(narrow(IMAGES), zeros(IMAGES))


def test_a_forward_that_counts_on_its_width_is_found() -> None:
    class Fixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            inner = self.branch.conv1(x).view(len(x), 6, 8, 8)
            return self.head((x + self.branch.conv2(inner)).mean(dim=(2, 3)))

    model = Fixed(Branch(4))
    with pytest.raises(VerificationError, match=r"fails where the dense one .* runs, in eval mode"):
        remove_filters(model, plan_of(model), IMAGES)


class SharedGradient(torch.autograd.Function):
    """The identity, whose gradient is shared among the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.shape[1]


def test_a_gradient_that_depends_on_the_width_is_found() -> None:
    class Sharing(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            inner = SharedGradient.apply(self.branch.conv1(x))
            return self.head((x + self.branch.conv2(inner)).mean(dim=(2, 3)))

    model = Sharing(Branch(4)).double()
    with pytest.raises(VerificationError, match=r"in eval mode: the gradient of '.*' differs"):
        remove_filters(model, plan_of(model), IMAGES.double())
