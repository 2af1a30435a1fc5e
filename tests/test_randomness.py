from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune import randomness
from blockprune.randomness import (
    LayoutFreeDraws,
    preserved_rng,
    rng_state,
    seed_rng,
    set_rng_state,
)

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.5),
    "in_place": lambda x: functional.dropout(x, 0.5, inplace=True),
    "module": nn.Dropout(0.5),
    "channels": nn.Dropout2d(0.5),
    "alpha": nn.AlphaDropout(0.5),
    "method": lambda x: x.bernoulli_(0.5),
    "like": torch.rand_like,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_do_not_depend_on_the_layout(name: str) -> None:
    plain = torch.rand(2, 6, 4, 4) + 1
    last = plain.clone(memory_format=torch.channels_last)
    found = []
    for images in (plain.clone(), last.clone(memory_format=torch.preserve_format)):
        torch.manual_seed(3)
        with LayoutFreeDraws():
            drawn = DRAWS[name](images)
        if name in ("in_place", "method"):
            assert drawn is images
        found.append(drawn.clone(memory_format=torch.contiguous_format))
    assert torch.equal(*found)
    torch.manual_seed(3)
    assert torch.equal(DRAWS[name](plain.clone()), found[0])


def test_the_state_of_the_generators_is_a_value() -> None:
    state = rng_state()
    first = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("in_use", [True, False])
def test_generators_of_cuda_are_touched_only_where_cuda_is_in_use(
    in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeding CUDA before it has started would leave an order that nothing can take back."""
    states, seeds = [torch.arange(3)], []
    monkeypatch.setattr(randomness, "_cuda_in_use", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", states.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with preserved_rng():
        seed_rng(5)
        first = torch.rand(2)
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(5)))
    assert seeds == [5] * in_use
    assert len(states) == 1 + in_use
    if in_use:
        assert torch.equal(states[1][0], states[0])
