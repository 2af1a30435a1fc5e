"""Every residual merge of a network in order: the blocks, and those that cannot be removed."""

from __future__ import annotations

from blockprune.blocks import BlockAnalysis, Reason
from blockprune.costs import block_costs
from blockprune.lottery.record import BlockRecord

__all__ = ["residual_merges"]


def residual_merges(analysis: BlockAnalysis) -> tuple[BlockRecord, ...]:
    """Return a record of each residual merge, in order of execution, with what goes with it.

    A merge that was refused is residual where others of its shape are, such as that of a
    projection shortcut.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> analysis = blockprune.find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> [merge.name for merge in residual_merges(analysis) if not merge.removable]
        ['layer2.0', 'layer3.0']
    """
    places = _places(analysis)
    costs = block_costs(analysis)
    stages = {stage.shape: index for index, stage in enumerate(analysis.stages)}
    found = [
        (
            places[block.name],
            BlockRecord(
                name=block.name,
                stage=block.stage,
                shape=block.shape[1:],
                params=costs[block.name].params,
                macs=costs[block.name].macs,
            ),
        )
        for block in analysis.blocks
    ]
    found += [
        (
            places[refused.name],
            BlockRecord(
                name=refused.name,
                stage=stages[refused.shape],
                shape=refused.shape[1:],
                removable=False,
                reason=str(refused.reason),
            ),
        )
        for refused in analysis.rejections
        if refused.reason is not Reason.OPAQUE and refused.shape in stages
    ]
    return tuple(record for _, record in sorted(found, key=lambda pair: pair[0]))


def _places(analysis: BlockAnalysis) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return where each merge is executed: the order of its region, and its place therein."""
    cuts = analysis.cuts
    last = {b.name: cuts.of_blocks([b.name], analysis.granularity)[-1] for b in analysis.blocks}
    places = {
        name: (cut.flow.region.order, cut.flow.index[cut.branch.joins])
        for name, cut in last.items()
    }
    refused = {
        name: (flow.region.order, flow.index[merge]) for name, (flow, merge) in cuts.refused.items()
    }
    return refused | places
