"""Settings of a module that are changed after the cut act in the ticket as in the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth, stochastic_depth

import blockprune
from blockprune.errors import TraceError
from tests.recording.law import Trial, assert_alike, reference
from tests.recording.nets import WIDTH, features


class DropPath(nn.Module):
    """A module of stochastic depth, as timm and others write it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class Scale(nn.Module):
    """Multiplies by a plain number."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p


class Noise(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * self.p if self.training else x


class Regularised(nn.Module):
    """A block whose branch holds a layer with settings."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.linear, self.middle, self.f = (
            nn.Linear(WIDTH, WIDTH),
            middle,
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.middle(self.linear(x)))


def net(make: Callable[[], nn.Module]) -> nn.Module:
    blocks = [Regularised(make()) for _ in range(3)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, 2))


def setting(name: str, value: Any) -> Callable[[nn.Module], None]:
    """Return what sets an attribute wherever a module has it, as a schedule does."""

    def set_all(model: nn.Module) -> None:
        for module in model.modules():
            if name in vars(module):
                setattr(module, name, value)

    return set_all


SETTINGS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "stochastic_depth": (lambda: StochasticDepth(0.2, "row"), "p", 0.7),
    "stochastic_depth_off": (lambda: StochasticDepth(0.9, "row"), "p", 0.0),
    "stochastic_depth_on": (lambda: StochasticDepth(0.0, "row"), "p", 0.8),
    "stochastic_depth_mode": (lambda: StochasticDepth(0.5, "row"), "mode", "batch"),
    "dropout": (lambda: nn.Dropout(0.1), "p", 0.6),
    "dropout_off": (lambda: nn.Dropout(0.6), "p", 0.0),
    "dropout_on": (lambda: nn.Dropout(0.0), "p", 0.5),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.1), "p", 0.5),
    "drop_path": (lambda: DropPath(0.2), "p", 0.7),
    "drop_path_off": (lambda: DropPath(0.7), "p", 0.0),
    "drop_path_on": (lambda: DropPath(0.0), "p", 0.7),
    "scale": (lambda: Scale(0.5), "p", 2.0),
    "noise": (lambda: Noise(0.1), "p", 1.0),
    "eps": (lambda: nn.LayerNorm(WIDTH), "eps", 1.0),
    "slope": (lambda: nn.LeakyReLU(0.1), "negative_slope", 0.9),
    "softmax_dim": (lambda: nn.Softmax(-1), "dim", 1),
    "identity_of_a_gelu": (lambda: nn.GELU("none"), "approximate", "tanh"),
}


@pytest.mark.parametrize(("make", "name", "value"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_setting_acts(
    make: Callable[[], nn.Module], name: str, value: Any, preserve_root: bool
) -> None:
    model = net(make)
    expected = reference(model, "2.f")
    ticket = blockprune.remove_blocks(model, "2", features(), preserve_root=preserve_root)
    kind = type(make())
    if kind in (Scale, Noise) and not count(ticket, kind):
        return  # There is nothing left that could be set without effect.
    assert count(ticket, kind) == count(model, kind) - 1
    for train in (True, False):
        trial = Trial(features(4), train, prepare=setting(name, value))
        assert_alike(ticket, expected, trial)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", 0.9), ("momentum", None), ("eps", 1.0), ("track_running_stats", False)],
)
def test_a_setting_of_a_batch_norm_acts(name: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Normed(), Normed(), Normed())
    x = torch.randn(6, WIDTH)
    ticket = blockprune.remove_blocks(model, "2", x)
    expected = reference(model, "2.f")
    for train, calls in ((True, 3), (False, 1)):
        trial = Trial(torch.randn(5, WIDTH), train, prepare=setting(name, value), calls=calls)
        assert_alike(ticket, expected, trial)


def test_the_drop_rates_of_a_network_of_torchvision() -> None:
    """A schedule of drop rates finds all modules that stay, and sets them."""
    model = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 8, [2], [2], [2, 2], stochastic_depth_prob=0.5, num_classes=3
    )
    x = torch.rand(2, 3, 16, 16)
    analysis = blockprune.find_blocks(model, x)
    assert len(analysis.names) == 4
    ticket = blockprune.remove_blocks(model, analysis.names[-1], x)
    # The two branches of a layer share one module.
    assert count(ticket, StochasticDepth) == 2
    for module in ticket.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ticket.train()
    with torch.no_grad():
        assert torch.equal(ticket(x), ticket(x)), "silent difference: rates of zero still drop"


class OwnRate(nn.Module):
    """A block that hands a rate of its own to a function."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.how, self.p = how, 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.how == "dropout":
            return x + functional.dropout(y, self.p, self.training)
        if self.how == "depth":
            return x + stochastic_depth(y, self.p, "row", self.training)
        return x + y * self.p


@pytest.mark.parametrize("how", ["dropout", "depth", "factor"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_rate_of_a_block_acts(how: str, preserve_root: bool) -> None:
    """Also where the function computes with it before torch sees it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[OwnRate(how) for _ in range(3)])
    expected = reference(model, "2.f")
    ticket = blockprune.remove_blocks(model, "2", features(), preserve_root=preserve_root)
    for prepare in (setting("p", 0.1), setting("p", 0.8)):
        assert_alike(ticket, expected, Trial(features(4), True, prepare=prepare))


class Own(nn.Module):
    """A block with settings of many kinds, of which it uses one."""

    def __init__(self, act: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.act = act
        self.rate, self.limit, self.off, self.quarter = 0.3, 0.05, 0.0, 0.25
        self.shift, self.whole_rate, self.is_on, self.how = 1, 0, True, "a"
        self.maybe: float | None = None
        self.weights, self.function = [0.5, 2.0], torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.act(self, x))


USED: dict[str, tuple[Callable[[Own, Tensor], Tensor], str, Any]] = {
    "as_it_is": (lambda m, x: x * m.rate, "rate", 2.0),
    "computed_with": (lambda m, x: x * (1 - m.rate), "rate", 2.0),
    "both": (lambda m, x: x.clamp(-m.limit, m.limit), "limit", 2.0),
    "what_a_probe_would_miss": (lambda m, x: x * m.quarter, "quarter", 0.5),
    "compared": (lambda m, x: x * 2 if m.rate > 0 else x, "rate", 0.0),
    "compared_with_nothing": (lambda m, x: x * (m.off or 1.0), "off", 3.0),
    "whole": (lambda m, x: x.roll(m.shift, 1), "shift", 2),
    "whole_rate": (lambda m, x: functional.dropout(x, m.whole_rate), "whole_rate", 0.9),
    "flag": (lambda m, x: x * 2 if m.is_on else x, "is_on", False),
    "text": (lambda m, x: x * 2 if m.how == "a" else x, "how", "b"),
    "none": (lambda m, x: x if m.maybe is None else x * m.maybe, "maybe", 3.0),
    "list": (lambda m, x: x * m.weights[0], "weights", [2.0, 2.0]),
    "function": (lambda m, x: m.function(x), "function", torch.sigmoid),
}


@pytest.mark.parametrize("how", USED)
def test_any_setting_acts_or_is_refused(how: str) -> None:
    act, name, value = USED[how]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Own(act) for _ in range(3)])
    ticket, expected = blockprune.remove_blocks(model, "2", features()), reference(model, "2.f")
    before = getattr(model[1], name)
    assert_alike(ticket, expected, Trial(features(4), prepare=setting(name, before)))
    later = Trial(features(4), prepare=setting(name, value))
    if type(before) is float and "compared" not in how:
        assert_alike(ticket, expected, later)
        return
    with pytest.raises(TraceError, match=rf"\.{name}\b"):
        assert_alike(ticket, expected, later)


def test_a_weight_that_is_changed_or_replaced_acts() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Regularised(nn.ReLU()) for _ in range(3)])
    ticket = blockprune.remove_blocks(model, "2", features())
    expected = reference(model, "2.f")

    def change(module: nn.Module) -> None:
        layer = module.get_submodule("1.linear")
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(torch.eye(WIDTH))
        layer.bias.data.fill_(0.5)

    assert_alike(ticket, expected, Trial(features(3), prepare=change))
    assert_alike(ticket, expected, Trial(features(3), prepare=setting("bias", None)))


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "before_backward": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before_forward": lambda module, hook: module.register_forward_pre_hook(hook),
    "of_a_weight": lambda module, hook: module.get_submodule("f").weight.register_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("where", ["1", "1.f", ""], ids=["block", "layer", "root"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_hooks_act_in_the_ticket_or_a_warning_says_that_they_are_lost(
    register: Callable[..., Any], where: str, preserve_root: bool
) -> None:
    """A block that stays may dissolve in a graph, and its hooks with it."""
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Regularised(nn.ReLU()) for _ in range(3)])
    module = model.get_submodule(where)
    if "weight" in register.__code__.co_names:
        module = model[1]
    register(module, lambda *_: calls.append(where))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ticket = blockprune.remove_blocks(model, "2", features(), preserve_root=preserve_root)
    assert calls == [], "a hook ran while the model was cut"
    ticket(features().requires_grad_()).sum().backward()
    told = [str(warning.message) for warning in caught]
    assert len(calls) == 1 or any("hook" in message for message in told)
