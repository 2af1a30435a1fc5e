"""GraSP at initialisation takes blocks from the stages that papers/000's tables say.

Its memory column fits only these numbers of blocks removed per stage, and the candidates of the
authors' own code are not the network's first block, with two blocks staying in each stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from blockprune.blocks import find_blocks
from blockprune.models import resnet32, resnet56
from blockprune.plan import make_plan
from blockprune.scoring import score_blocks

PATTERNS = {
    resnet32: {1: (1, 0, 0), 3: (3, 0, 0), 4: (3, 1, 0)},
    resnet56: {3: (3, 0, 0), 4: (4, 0, 0), 5: (5, 0, 0), 12: (7, 5, 0)},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", PATTERNS)
def test_removals_per_stage(build: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    model = build()
    images, labels = torch.randn(100, 3, 32, 32), torch.arange(100) % 10
    analysis = find_blocks(model, images[:1])
    scores = score_blocks(model, "grasp", (images, labels), analysis=analysis, seed=seed)
    for p, expected in PATTERNS[build].items():
        plan = make_plan(analysis, scores, p=p, protect="layer1.0", min_blocks_per_stage=2)
        removed = Counter(name.partition(".")[0] for name in plan.remove)
        assert tuple(removed[f"layer{stage}"] for stage in (1, 2, 3)) == expected
