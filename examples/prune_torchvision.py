"""Cut a torchvision model, look at what went, and see that it is exact.

python examples/prune_torchvision.py
"""

from __future__ import annotations

import torch
import torchvision

import blockprune


def main() -> None:
    """Cut a quarter of the blocks of a MobileNetV2."""
    torch.manual_seed(0)
    dense = torchvision.models.mobilenet_v2(num_classes=10)
    images, labels = torch.randn(20, 3, 64, 64), torch.arange(20) % 10

    analysis = blockprune.find_blocks(dense, images[:1])
    print(f"{len(analysis.blocks)} removable blocks, {len(analysis.rejections)} merges refused")

    scores = blockprune.score_blocks(dense, "snip", (images, labels), analysis=analysis)
    plan = blockprune.make_plan(analysis, scores, p=0.25)
    for name in plan.remove:
        block = analysis.block(name)
        print(f"  {name}: score {scores.scores[name]:.3g}, {block.params:,} parameters")

    # remove_blocks verifies the ticket against the dense model in both modes, or raises.
    ticket = blockprune.remove_blocks(dense, plan, images[:1])
    before = sum(parameter.numel() for parameter in dense.parameters())
    after = sum(parameter.numel() for parameter in ticket.parameters())
    print(f"parameters {before:,} -> {after:,}")


if __name__ == "__main__":
    main()
