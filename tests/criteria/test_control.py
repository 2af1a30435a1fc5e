from __future__ import annotations

import random

import torch

from blockprune.criteria import CRITERIA
from tests.criteria.nets import Net, context, pair


def test_random_depends_on_the_seed_alone() -> None:
    images, _ = pair(2)
    first = CRITERIA["random"](context(Net(), images, seed=3))
    random.seed(99)
    torch.manual_seed(99)
    state = random.getstate()
    assert CRITERIA["random"](context(Net(), images, seed=3)) == first
    assert random.getstate() == state
    assert CRITERIA["random"](context(Net(), images, seed=4)) != first
    assert all(0 <= score < 1 for score in first.values())


def test_random_orders_all_blocks_about_equally_often() -> None:
    images, _ = pair(2)
    scoring = context(Net(), images)
    lowest = []
    for seed in range(600):
        scoring.seed = seed
        scores = CRITERIA["random"](scoring)
        lowest.append(min(scores, key=scores.__getitem__))
    assert all(150 < lowest.count(f"blocks.{i}") < 250 for i in range(3))
