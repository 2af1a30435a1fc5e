"""Criteria that leave one block out and look at what the model returns.

Each block costs a forward pass from where it would have been to the end; see
`blockprune.criteria.passes`. Every batch is looked at, in evaluation mode, so these criteria make
sense after some training, and they see what none of the others can: what the rest of the network
makes of the loss of a block.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from blockprune.batches import Batch
from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import ScoringContext
from blockprune.criteria.meters import OutputCriterion, OutputMeter, Result, rows
from blockprune.errors import CriterionError
from blockprune.losses import class_axis, main_output
from blockprune.similarity import linear_cka

__all__ = ["Cka", "Kl", "LossIncrease"]


@dataclass(frozen=True)
class Kl(OutputCriterion):
    """KL divergence from the full model's class distribution to that without the block.

    With `p` the softmax of the model's output and `q` that without the block::

        score = mean over samples of  sum over classes of  q log(q / p)

    in nats; every position of a sequence or a map is a sample.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import Kl
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), Kl(), data).scores)
        7

    Source: Luo and Wu, "Neural network pruning with residual-connections and limited-data", 2020.
    """

    def meter(self, context: ScoringContext) -> OutputMeter:
        """Return a meter of divergences."""
        return _KlMeter(context)


@dataclass(frozen=True)
class LossIncrease(OutputCriterion):
    """Loss increase: the loss without the block minus that of the full model.

    ::

        score = mean over samples of  L(without) - L(full)

    negative where the model is better off without the block. Of a language model, exp of it is
    the factor by which its perplexity grows.

    Raises (when called):
        CriterionError: there are no labels for the loss, or it is not finite.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import LossIncrease
        >>> from blockprune.models import resnet20
        >>> data = (torch.rand(20, 3, 32, 32), torch.arange(20) % 10)
        >>> len(score_blocks(resnet20(), LossIncrease(), data).scores)
        7

    Source: Kim et al., "Shortened LLaMA: depth pruning for large language models", 2024.
    """

    needs: ClassVar[str] = "labels"

    def meter(self, context: ScoringContext) -> OutputMeter:
        """Return a meter of losses."""
        return _LossMeter(context)


@dataclass(frozen=True)
class Cka(OutputCriterion):
    """CKA: how much the last features change when the block is left out.

    ::

        score = 1 - linear CKA(features of the full model, features without the block)

    in [0, 1], over the rows of all batches (samples, and positions where the last layer has any).
    The features are what enters the last linear or convolution layer behind all blocks, else the
    model's output.

    Raises (when called):
        CriterionError: the features are the same for all samples.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import Cka
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), Cka(), data).scores)
        7

    Source: Pons et al., "Effective layer pruning through similarity metric perspective", 2024.
    """

    reads_features: ClassVar[bool] = True

    def meter(self, context: ScoringContext) -> OutputMeter:
        """Return a meter that gathers features."""
        return _CkaMeter(context)


class _KlMeter(OutputMeter):
    def __init__(self, context: ScoringContext) -> None:
        self.sums = {block.name: 0.0 for block in context.blocks}
        self.count: dict[str, int] = defaultdict(int)

    def see(self, batch: Batch, block: ResidualBlock, dense: Result, without: Result) -> None:
        log_p, log_q = _log_probabilities(dense), _log_probabilities(without)
        divergences = functional.kl_div(log_p, log_q, reduction="none", log_target=True)
        self.sums[block.name] += float(divergences.sum(dtype=torch.float64))
        self.count[block.name] += len(log_p)

    def scores(self) -> dict[str, float]:
        return {name: total / max(self.count[name], 1) for name, total in self.sums.items()}


def _log_probabilities(result: Result) -> Tensor:
    logits = main_output(result.outputs)
    return rows(logits, class_axis(logits)).log_softmax(-1)


class _LossMeter(OutputMeter):
    def __init__(self, context: ScoringContext) -> None:
        self.context = context
        self.terms: dict[str, list[float]] = {block.name: [] for block in context.blocks}
        self.samples: dict[str, list[int]] = {block.name: [] for block in context.blocks}
        self.dense: tuple[Result, float] | None = None

    def see(self, batch: Batch, block: ResidualBlock, dense: Result, without: Result) -> None:
        if self.dense is None or self.dense[0] is not dense:
            self.dense = dense, float(self.context.loss(dense.outputs, batch.targets))
        loss = float(self.context.loss(without.outputs, batch.targets))
        self.terms[block.name].append(len(batch) * (loss - self.dense[1]))
        self.samples[block.name].append(len(batch))

    def scores(self) -> dict[str, float]:
        return {
            name: math.fsum(terms) / max(sum(self.samples[name]), 1)
            for name, terms in self.terms.items()
        }


class _CkaMeter(OutputMeter):
    def __init__(self, context: ScoringContext) -> None:
        self.without: dict[str, list[Tensor]] = {block.name: [] for block in context.blocks}
        self.dense: list[Tensor] = []
        self.latest: Result | None = None

    def see(self, batch: Batch, block: ResidualBlock, dense: Result, without: Result) -> None:
        assert dense.features is not None
        assert without.features is not None
        if self.latest is not dense:
            self.latest = dense
            self.dense.append(dense.features.clone())
        self.without[block.name].append(without.features.clone())

    def scores(self) -> dict[str, float]:
        full = torch.cat(self.dense)
        if not linear_cka(full, full) > 0:
            raise CriterionError(
                f"'cka' compares how {len(full)} rows of features differ from one another, and "
                "they are all the same. Pass more samples, or use 'kl'."
            )
        scores = {}
        for name, parts in self.without.items():
            alike = linear_cka(full, torch.cat(parts))
            # Features that no longer depend on the input are like no other.
            scores[name] = 1.0 if math.isnan(alike) else max(0.0, 1 - alike)
        return scores
