"""Criteria that look at what flows through the blocks.

Let `x` be what enters a block (what its shortcut carries) and `y` what leaves it, behind the
activation that follows the merge, if one does. All look at every batch, in evaluation mode, so
they make sense once there are running statistics worth the name: after some training.

A *row* is the vector of features (channels) at one position of one sample: a token of a
transformer, a pixel of a feature map.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from blockprune.batches import Batch
from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import ScoringContext
from blockprune.criteria.layer_outputs import sample_axis
from blockprune.criteria.meters import ActivationCriterion, ActivationMeter, feature_axis, rows
from blockprune.errors import CriterionError, DataError

__all__ = ["AngularDistance", "BlockInfluence", "ExpectAbs", "HRank", "Pls"]

Array = NDArray[Any]

# Relative to the features and the labels: rounding in double precision, and nothing besides.
_NO_COVARIANCE = 1e-12


@dataclass(frozen=True)
class HRank(ActivationCriterion):
    """HRank: mean rank of the feature maps that leave the block.

    Over all samples and channels, for maps of size H x W::

        score = mean of  rank(map) / max(H, W)

    which is at most 1. In a sequence, (samples, positions, features), each sample is one map.

    Raises (when called):
        CriterionError: what leaves the block has fewer than two axes behind the samples.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import HRank
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), HRank(), data).scores)
        7

    Source: Lin et al., "HRank: filter pruning using high-rank feature map", 2020.
    """

    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter of ranks."""
        return _HRankMeter(context)


@dataclass(frozen=True)
class ExpectAbs(ActivationCriterion):
    """Expected absolute value of what leaves the block, over samples, positions and features.

    ::

        score = mean |y|

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import ExpectAbs
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), ExpectAbs(), data).scores)
        7

    Source: Tan and Motani, "DropNet: reducing neural network complexity via iterative pruning",
    2020.
    """

    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter of absolute values."""
        return _ExpectAbsMeter(context)


@dataclass(frozen=True)
class BlockInfluence(ActivationCriterion):
    """Block influence: how much the block turns the rows that pass through it.

    ::

        score = 1 - mean over rows of  cos(x_row, y_row)

    0 where the block changes no direction, at most 2. A row that is zero before and behind the
    block has not been turned.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import BlockInfluence
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), BlockInfluence(), data).scores)
        7

    Source: Men et al., "ShortGPT: layers in large language models are more redundant than you
    expect", 2024.
    """

    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter of cosines."""
        return _BlockInfluenceMeter(context)


@dataclass(frozen=True)
class AngularDistance(ActivationCriterion):
    """Angular distance over runs of `n` consecutive blocks.

    From what enters the first block of a run to what leaves the last::

        d = mean over rows of  arccos(cos(x_row, y_row)) / pi        in [0, 1]

    A block scores the least `d` of all runs that it is part of, so that the `n` lowest are the run
    that changes its input least: remove `p = n` of them. Consecutive are blocks of one stage that
    follow one another; one that no run of `n` contains scores 1.

    Args:
        n: blocks in a run.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import AngularDistance
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), AngularDistance(n=2), data).scores)
        7

    Source: Gromov et al., "The unreasonable ineffectiveness of the deeper layers", 2024.
    """

    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise CriterionError(f"n is the number of blocks in a run, 1 or more, not {self.n!r}.")

    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter of angles."""
        return _AngularDistanceMeter(context, self.n)


@dataclass(frozen=True)
class Pls(ActivationCriterion):
    """PLS: how much the block's pooled features tell of the labels, together with all others.

    What leaves each block is averaged over positions; the features of all blocks, side by side, are
    the predictors of *one* partial least squares model of the one-hot labels. With weights `w_h`,
    scores `t_h` and loadings `q_h` of its components, and P features::

        s_h = (t_h't_h) (q_h'q_h)
        VIP_j = sqrt( P * sum_h s_h (w_jh / ||w_h||)^2 / sum_h s_h )
        score = mean of VIP_j over the block's features

    Models fitted block by block would not compare: the VIP^2 of each add up to its own P.

    Args:
        components: of the model; fewer where there are fewer samples or features.

    Raises (when called):
        CriterionError: there are no integer labels, or those of one class only.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import Pls
        >>> from blockprune.models import resnet20
        >>> data = (torch.rand(20, 3, 32, 32), torch.arange(20) % 10)
        >>> len(score_blocks(resnet20(), Pls(), data).scores)
        7

    Source: Jordao et al., "Discriminative layer pruning for convolutional neural networks", 2020.
    """

    needs: ClassVar[str] = "labels"

    components: int = 2

    def __post_init__(self) -> None:
        if self.components < 1:
            raise CriterionError(f"components is 1 or more, not {self.components!r}.")

    def meter(self, context: ScoringContext) -> ActivationMeter:
        """Return a meter that pools features."""
        return _PlsMeter(context, self.components)


class _Mean(ActivationMeter):
    """A weighted mean for each block."""

    def __init__(self, context: ScoringContext) -> None:
        self.context = context
        self.axes = {block.name: feature_axis(context, block) for block in context.blocks}
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] += float(values.sum(dtype=torch.float64))
        self.counts[name] += values.numel()

    def mean(self, name: str) -> float:
        if not self.counts[name]:
            raise CriterionError(f"Block {name!r} was not run by any batch, so it has no score.")
        return self.sums[name] / self.counts[name]

    def scores(self) -> dict[str, float]:
        return {block.name: self.mean(block.name) for block in self.context.blocks}


class _HRankMeter(_Mean):
    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        maps = leaving if leaving.dtype == torch.float64 else leaving.float()
        if maps.dim() < 3:
            raise CriterionError(
                f"'hrank' needs feature maps, and what leaves block {block.name!r} has shape "
                f"{tuple(maps.shape)}. Use 'expectabs' or 'block_influence'."
            )
        if not bool(maps.isfinite().all()):
            raise CriterionError(f"What leaves block {block.name!r} is not finite: it has no rank.")
        if maps.dim() > 3:
            maps = maps.movedim(self.axes[block.name], 1)
        self.add(block.name, torch.linalg.matrix_rank(maps) / max(maps.shape[-2:]))


class _ExpectAbsMeter(_Mean):
    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        self.add(block.name, leaving.abs())


class _BlockInfluenceMeter(_Mean):
    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        axis = self.axes[block.name]
        before, after = rows(entering, axis), rows(leaving, axis)
        both_zero = ~(before.any(-1) | after.any(-1))
        cosines = functional.cosine_similarity(before, after, dim=-1)
        self.add(block.name, 1 - torch.where(both_zero, 1.0, cosines))


class _AngularDistanceMeter(_Mean):
    def __init__(self, context: ScoringContext, n: int) -> None:
        super().__init__(context)
        self.runs = _runs(context.blocks, n)
        self.entered: dict[str, Tensor] = {}

    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        axis = self.axes[block.name]
        if block.name in {run[0] for run in self.runs}:
            # Behind the block its input may be written into.
            self.entered[block.name] = rows(entering, axis).clone()
        for run in self.runs:
            if run[-1] == block.name and run[0] in self.entered:
                self.add(run[0], _angles(self.entered.pop(run[0]), rows(leaving, axis)) / math.pi)

    def scores(self) -> dict[str, float]:
        distances = {run: self.mean(run[0]) for run in self.runs}
        return {
            block.name: min((d for run, d in distances.items() if block.name in run), default=1.0)
            for block in self.context.blocks
        }


def _runs(blocks: tuple[ResidualBlock, ...], n: int) -> list[tuple[str, ...]]:
    """Return the runs of `n` blocks of one stage that follow one another, by name."""
    runs = []
    for start in range(len(blocks) - n + 1):
        run = blocks[start : start + n]
        is_nested = any(block.contains for block in run) and n > 1
        if len({block.stage for block in run}) == 1 and not is_nested:
            runs.append(tuple(block.name for block in run))
    return runs


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle of each pair of rows; 0 of two zero rows.

    As 2 atan(|u - v| / |u + v|) of the unit vectors: arccos has no digits left near 0.
    """
    u, v = functional.normalize(a, dim=-1), functional.normalize(b, dim=-1)
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


class _PlsMeter(ActivationMeter):
    def __init__(self, context: ScoringContext, components: int) -> None:
        self.context = context
        self.components = components
        samples = _sample_axes(context)
        self.axes = {
            block.name: (samples.get(block.name, 0), feature_axis(context, block))
            for block in context.blocks
        }
        self.calls: dict[str, list[Tensor]] = defaultdict(list)
        self.pooled: dict[str, list[Array]] = {block.name: [] for block in context.blocks}
        self.labels: list[Array] = []

    def see(self, block: ResidualBlock, entering: Tensor, leaving: Tensor) -> None:
        features_second = leaving.double().movedim(self.axes[block.name], (0, 1))
        pooled = features_second.flatten(2).mean(2) if leaving.dim() > 2 else features_second
        self.calls[block.name].append(pooled)

    def end(self, batch: Batch) -> None:
        labels = _class_labels(batch.targets)
        for name, parts in self.pooled.items():
            calls = self.calls[name]
            if not calls or len(calls[0]) != len(labels):
                found = f"{len(calls[0])} samples" if calls else "nothing"
                raise CriterionError(
                    f"{found} left block {name!r}, for {len(labels)} labels; 'pls' pairs them up."
                )
            parts.append(torch.stack(calls).mean(0).cpu().numpy())
        self.labels.append(labels.cpu().numpy())
        self.calls.clear()

    def scores(self) -> dict[str, float]:
        labels = np.concatenate(self.labels)
        one_hot = (labels[:, None] == np.unique(labels)).astype(np.float64)
        if one_hot.shape[1] < 2:
            raise CriterionError("'pls' needs samples of at least two classes, and found one.")
        features = [np.concatenate(parts) for parts in self.pooled.values()]
        vip = _vip(np.concatenate(features, axis=1), one_hot, self.components)
        parts = np.split(vip, np.cumsum([part.shape[1] for part in features])[:-1])
        return {name: float(p.mean()) for name, p in zip(self.pooled, parts, strict=True)}


def _sample_axes(context: ScoringContext) -> dict[str, int]:
    """Return the axis of the samples in what leaves each block, where two short passes show it."""
    batch = context.first_batch()
    if len(batch) < 3:
        return {}
    passes: list[dict[str, Tensor]] = []
    for size in (2, 3):
        part, seen = batch.part(0, size), dict[str, Tensor]()

        def see(
            block: ResidualBlock,
            entering: Tensor,
            leaving: Tensor,
            seen: dict[str, Tensor] = seen,
        ) -> None:
            seen[block.name] = leaving.clone()

        try:
            with context.running(part):
                context.passes.observe(part.call, see)
        except DataError:
            # A model of one size of batch.
            return {}
        passes.append(seen)
    two, three = passes
    found = {name: sample_axis(two[name], three[name]) for name in two.keys() & three.keys()}
    return {
        block.name: axis
        for block in context.blocks
        if (axis := found.get(block.name)) is not None and axis != feature_axis(context, block)
    }


def _class_labels(targets: Any) -> Tensor:
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        return targets
    found = "none" if targets is None else type(targets).__name__
    if isinstance(targets, Tensor):
        found = f"targets of shape {tuple(targets.shape)} and type {targets.dtype}"
    raise CriterionError(
        f"'pls' needs one integer class label a sample, and found {found}. Pass data of "
        "(inputs, labels) pairs, or use a criterion that reads no labels."
    )


def _vip(features: Array, one_hot: Array, components: int) -> Array:
    """Return the variable importance in projection of each column of `features`."""
    # It takes a second to import, and nothing else needs it.
    from sklearn.cross_decomposition import PLSRegression

    samples, size = features.shape
    shared = np.abs(features.T @ (one_hot - one_hot.mean(0))).max()
    if shared <= _NO_COVARIANCE * np.linalg.norm(features) * np.linalg.norm(one_hot):
        raise CriterionError("What leaves the blocks does not vary with the labels: no PLS of it.")
    model = PLSRegression(min(components, samples - 1, size), max_iter=5000, tol=1e-12)
    with warnings.catch_warnings():
        # Fewer components than asked for explain all: those that are left weigh nothing.
        warnings.filterwarnings("ignore", message="[Yy] residual (is )?constant")
        model.fit(features, one_hot)
    weights, scores, loadings = model.x_weights_, model.x_scores_, model.y_loadings_
    explained = np.diag(scores.T @ scores @ loadings.T @ loadings)
    norms = np.linalg.norm(weights, axis=0)
    shares = (weights / np.where(norms > 0, norms, 1.0)) ** 2
    importance: Array = np.sqrt(size * (shares @ explained) / explained.sum())
    return importance
