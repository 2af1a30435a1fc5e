"""A criterion that leaves one block out, repairs what that breaks, and looks at the loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from blockprune.batches import Batch, example_of
from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import ScoringContext
from blockprune.errors import CriterionError, RecoveryError, VerificationError
from blockprune.recovery.data import Batches
from blockprune.recovery.refits import Refits

__all__ = ["RecoveredLoss"]


@dataclass(frozen=True)
class RecoveredLoss:
    """Recovered loss: the loss without the block and after a refit, minus that with the block.

    With `f` the model, `G` the blocks that are gone already and `R` what `recover(..., "refit")`
    makes of the model without some blocks, on the same batches, ridge included::

        score = mean over samples of  L(R(f without G and the block)) - L(R(f without G))

    negative where the model is better off. A gap that no linear operation reaches counts as it is,
    unrepaired. The scores that blocks have when they go, one after another, add up to the loss of
    the whole set after its recovery minus the loss of the full model.

    A dense pass gives what all blocks are fitted to, as long as that fits into `max_cache_bytes`;
    each block then costs a solve and a pass, which is about N + 2 passes for N blocks, where
    nothing is gone. With k blocks gone, each costs up to 2k + 3 passes.

    Args:
        gone: blocks that are gone already; they score 0.

    Raises (when called):
        CriterionError: there are no labels for the loss, or it is not finite; what is left cannot
            be recovered, since a block lies in a module that is called several times.
        BlockNotFoundError: a block that is gone is none of the model.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import RecoveredLoss
        >>> from blockprune.models import resnet20
        >>> data = (torch.rand(20, 3, 32, 32), torch.arange(20) % 10)
        >>> scores = score_blocks(resnet20(), RecoveredLoss(gone=("layer1.1",)), data).scores
        >>> len(scores), scores["layer1.1"]
        (7, 0.0)

    Source: the loss of Kim et al., "Shortened LLaMA: depth pruning for large language models",
    2024, after the closed form of `recover`.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True

    gone: tuple[str, ...] = ()

    def beside(self, gone: Collection[str]) -> RecoveredLoss:
        """Return the criterion that scores what is left of the dense model beside `gone`."""
        return replace(self, gone=(*self.gone, *gone))

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, over all batches."""
        batches = context.all_batches()
        gone = self._gone_in(context)
        refits = Refits(
            context.model,
            context.analysis,
            Batches(context.model, [(batch.call, batch.targets) for batch in batches]),
            example_of(context.model, batches[0]),
            context.max_cache_bytes,
        )
        beside = {
            block.name: self._gone_in(context, block)
            for block in context.blocks
            if block.name not in gone
        }
        losses = {}
        try:
            for name, model in refits.of(beside):
                losses[name] = _loss(context, model, batches)
            before = context.model
            if gone:
                [(_, before)] = refits.of({"before": gone})
        except (RecoveryError, VerificationError) as error:
            raise CriterionError(
                f"'recovered_loss' refits what is left, and here it cannot: {error} "
                "'loss_increase' looks at the loss without a refit."
            ) from error
        full = _loss(context, before, batches)
        return {block.name: losses.get(block.name, full) - full for block in context.blocks}

    def _gone_in(self, context: ScoringContext, *more: ResidualBlock) -> list[str]:
        """Return what is gone with some blocks more, nested ones included, in one order."""
        taken = {*self.gone, *(block.name for block in more)}
        gone = [context.analysis.block(name) for name in taken]
        names = taken.union(*(block.contains for block in gone))
        return [name for name in context.analysis.names if name in names]


def _loss(context: ScoringContext, model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss over the samples of all batches."""
    with torch.no_grad():
        terms = [
            len(batch) * float(context.loss(context.outputs(batch, model), batch.targets))
            for batch in batches
        ]
    return math.fsum(terms) / max(sum(map(len, batches)), 1)
