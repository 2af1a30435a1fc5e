"""Contexts of several batches, networks of tokens, and what must not change while one scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.blocks import find_blocks
from blockprune.criteria import Batch, Criterion, ScoringContext
from blockprune.tracing import as_call, copy_model

WORDS, WIDTH, CLASSES = 7, 4, 3


class Layer(nn.Module):
    """`x + second(gelu(first(norm(x))))` on (samples, tokens, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(functional.gelu(self.first(self.norm(x))))
        return out


class TokenNet(nn.Module):
    """Integer token ids in, logits of each sample out, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.table(ids)).mean(1))
        return logits


def tokens(size: int = 6) -> tuple[Tensor, Tensor]:
    """Ids of `TokenNet`, and labels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(WORDS, (size, 5), generator=generator), torch.arange(size) % CLASSES


def batched(
    model: nn.Module, pairs: Sequence[tuple[Any, Any]], example: Any = None, **options: Any
) -> ScoringContext:
    """A context over a copy of `model` that holds these (inputs, targets) pairs."""
    call = as_call(model, pairs[0][0] if example is None else example)
    batches = [Batch(as_call(model, inputs), targets) for inputs, targets in pairs]
    blocks = find_blocks(model, call).blocks
    return ScoringContext(copy_model(model).eval(), blocks, batches, call, **options)


def split(pair: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """One pair as several of these sizes."""
    images, labels = pair
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def assert_untouched(scoring: ScoringContext, criterion: Criterion) -> None:
    """Score twice: the same, and the context's model is bit for bit what it was."""
    model = scoring.model
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    generator = torch.get_rng_state()
    assert criterion(scoring) == criterion(scoring)
    assert torch.equal(generator, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == tensors
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert all(value.dtype == after[name].dtype for name, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
