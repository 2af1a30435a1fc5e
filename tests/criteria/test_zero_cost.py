from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from blockprune.criteria import JacobCov, Naswot, Pls
from blockprune.errors import CriterionError, DataError
from tests.criteria.nets import Net, context, pair
from tests.criteria.test_activation import Mixing

NAMES = ["blocks.0", "blocks.1", "blocks.2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return out


class Modules(Net):
    """`Net` with its activation functions as modules, so that hooks can watch them."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def without(model: nn.Module, name: str | None) -> nn.Module:
    shallower = copy.deepcopy(model).train()
    if name:
        shallower.blocks[int(name[-1])] = nn.Identity()
    return shallower


def direct_naswot(model: nn.Module, images: Tensor) -> float:
    """The authors' way: a hook on each ReLU, and numpy's slogdet."""
    kernel = np.zeros((len(images), len(images)))

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        x = (args[0].detach().flatten(1) > 0).double().numpy()
        kernel.__iadd__(x @ x.T + (1 - x) @ (1 - x).T)

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(count)
    model(images)
    return float(np.linalg.slogdet(kernel)[1])


def direct_jacob_cov(model: nn.Module, images: Tensor) -> float:
    """The authors' way: numpy's correlation and eigenvalues."""
    images = images.clone().requires_grad_()
    outputs = model(images)
    outputs.backward(torch.ones_like(outputs))
    assert images.grad is not None
    values = np.linalg.eigvals(np.corrcoef(images.grad.flatten(1).numpy())).real
    return float(-np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5)))


@pytest.mark.parametrize(
    ("criterion", "direct"), [(Naswot(), direct_naswot), (JacobCov(), direct_jacob_cov)]
)
def test_full_minus_without_against_a_direct_computation(criterion, direct) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(2)
    model, (images, labels) = Modules(), pair(6)
    full = direct(without(model, None), images)
    expected = {name: full - direct(without(model, name), images) for name in NAMES}
    assert all(expected.values())
    scoring = context(model, images, labels)
    state = {name: value.clone() for name, value in scoring.model.state_dict().items()}
    assert criterion(scoring) == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(v, state[n]) for n, v in scoring.model.state_dict().items())
    # The passes' own running statistics are back as well.
    assert criterion(scoring) == pytest.approx(expected, rel=1e-6)


def test_token_ids_are_differentiated_at_their_embedding() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=8, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))

    def proxy(zeroed: nn.Module | None) -> float:
        embedded = model.transformer.wte(ids).detach().requires_grad_()
        handle = None
        if zeroed:
            handle = zeroed.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        model(inputs_embeds=embedded).logits.sum().backward()
        if handle:
            handle.remove()
        assert embedded.grad is not None
        rows = embedded.grad.flatten(1).double().numpy()
        values = np.linalg.eigvalsh(np.corrcoef(rows)) + 1e-5
        return float(-np.sum(np.log(values) + 1 / values))

    scores = JacobCov()(context(model, {"input_ids": ids}, ids))
    first = next(iter(scores))
    expected = proxy(None) - proxy(model.transformer.h[0].attn.c_proj)
    assert scores[first] == pytest.approx(expected, rel=1e-2)


class Turned(nn.Module):
    """Blocks whose activations have the samples elsewhere, and one of a table of weights."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.table = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.branch(layer, x)
        return x.mean(1) + self.table.relu().sum()

    def branch(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.layout == "positions first":
            return functional.relu(layer(x.transpose(0, 1))).transpose(0, 1)
        if self.layout == "windows":
            return functional.relu(layer(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return functional.relu(layer(x))


@pytest.mark.parametrize("layout", ["plain", "positions first", "windows"])
@pytest.mark.parametrize("positions", [4, 8, 5])
def test_codes_are_those_of_samples_in_any_layout(layout: str, positions: int) -> None:
    """Four samples, so that four or eight positions could be taken for them, and the table."""
    torch.manual_seed(4)
    model, x = Turned(layout).double().eval(), torch.randn(4, positions, 6).double()

    def proxy(left_out: int | None) -> float:
        kernel, now = np.zeros((4, 4)), x
        for number, layer in enumerate(model.layers):
            if number != left_out:
                entering = layer(now)
                on = (entering.detach().flatten(1) > 0).double().numpy()
                kernel += on @ on.T + (1 - on) @ (1 - on).T
                now = now + entering.relu()
        return float(np.linalg.slogdet(kernel)[1])

    expected = [proxy(None) - proxy(number) for number in range(3)]
    scores = Naswot()(context(model, x, torch.zeros(4)))
    assert [scores[f"layers.{number}"] for number in range(3)] == pytest.approx(expected, rel=1e-9)


class OfFour(Turned):
    """A model that takes four samples, no fewer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 5, 6))


@pytest.mark.parametrize("criterion", [Naswot(), Pls()])
def test_a_model_of_one_size_of_batch(criterion: Naswot | Pls) -> None:
    torch.manual_seed(4)
    model, x = OfFour("plain").double().eval(), torch.randn(4, 5, 6).double()
    any_size = Turned("plain").double().eval()
    any_size.load_state_dict(model.state_dict())
    model.table.requires_grad_(False).fill_(-1)
    any_size.table.requires_grad_(False).fill_(-1)
    labels = torch.tensor([0, 1, 0, 1])
    found = criterion(context(model, x, labels))
    if isinstance(criterion, Pls):
        assert found == pytest.approx(criterion(context(any_size, x, labels)))
    assert all(np.isfinite(list(found.values())))


def test_no_activation_function() -> None:
    with pytest.raises(CriterionError, match="calls none"):
        Naswot()(context(Mixing(), torch.randn(3, 5, 6), torch.zeros(3)))


def test_samples_with_equal_codes() -> None:
    images = pair()[0][:1].repeat(3, 1, 1, 1)
    with pytest.raises(CriterionError, match=r"two of the 3 samples.*singular"):
        Naswot()(context(Net(), images, torch.zeros(3)))


def test_samples_whose_gradient_is_constant() -> None:
    class Flat(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    with pytest.raises(CriterionError, match="that of sample 0 is constant"):
        JacobCov()(context(Flat(), torch.randn(3, 5, 6), torch.zeros(3)))


def test_one_sample_is_not_compared() -> None:
    for criterion in (Naswot(), JacobCov()):
        with pytest.raises(DataError, match="at least 2, not 1"):
            criterion(context(Net(), *pair(1)))


def test_other_activation_functions_count_too() -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + functional.gelu(block(x))
            return x

    torch.manual_seed(0)
    model, inputs = Smooth(), torch.randn(3, 8)
    codes, x = [], inputs
    with torch.no_grad():
        for block in model.blocks:
            codes.append((block(x) > 0).double())
            x = x + functional.gelu(block(x))
        only = [(model.blocks[1](inputs) > 0).double()]

    def proxy(codes: list[Tensor]) -> float:
        kernel = sum(c @ c.T + (1 - c) @ (1 - c).T for c in codes)
        return float(torch.linalg.slogdet(kernel)[1])

    scores = Naswot()(context(model, inputs, torch.zeros(3)))
    first, second = scores.values()
    assert first == pytest.approx(proxy(codes) - proxy(only))
    assert second == pytest.approx(proxy(codes) - proxy(codes[:1]))


def test_only_activations_that_samples_go_through_are_compared() -> None:
    class Scaled(nn.Module):
        """Also calls ReLU on a vector of its own, and on a table of more rows than samples."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.table = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(5, 8))
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                own = functional.relu(self.scale) * functional.relu(self.table).mean(0)
                x = x + functional.relu(block(x)) * own
            return x

    torch.manual_seed(0)
    model, inputs = Scaled(), torch.randn(3, 8)

    def proxy(*names: int) -> float:
        x, kernel = inputs, torch.zeros(3, 3, dtype=torch.float64)
        for name in names:
            entering = model.blocks[name](x)
            c = (entering > 0).double()
            kernel += c @ c.T + (1 - c) @ (1 - c).T
            x = x + functional.relu(entering)
        return float(torch.linalg.slogdet(kernel)[1])

    scores = list(Naswot()(context(model, inputs, torch.zeros(3))).values())
    assert scores == pytest.approx([proxy(0, 1) - proxy(1), proxy(0, 1) - proxy(0)])


def test_an_input_that_cannot_be_differentiated() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.one_hot(x, 8).float()
            for block in self.blocks:
                x = x + functional.relu(block(x))
            return x

    with pytest.raises(CriterionError, match=r"no floating-point input.*Use 'naswot' or 'snip'"):
        JacobCov()(context(OneHot(), torch.tensor([0, 3, 5]), torch.zeros(3)))
