"""Running a criterion, with nothing to show for it but the scores.

The criterion works on a private copy of the model, inside a copy of the process's random state:
weights, buffers, gradients, modes and hooks of the model, and every generator, are afterwards
bit for bit what they were.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blockprune.batches import Replay, batches_of, device_of, first_inputs
from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.criteria import (
    Criterion,
    NoDataWarning,
    ScoringContext,
    ZeroScoresWarning,
    criterion_of,
    evaluate,
)
from blockprune.criteria.base import CACHE_BYTES
from blockprune.distributed import GlobalBatches
from blockprune.errors import CriterionError, close_names
from blockprune.inputs import infer_example_inputs
from blockprune.losses import LossFunction
from blockprune.randomness import seed_rng
from blockprune.tracing import as_call, isolated, structural_copy, surroundings_kept

__all__ = [
    "NoDataWarning",
    "ScoreTable",
    "ZeroScoresWarning",
    "score_blocks",
    "score_criteria",
]


@dataclass(frozen=True)
class ScoreTable:
    """The scores of the blocks of one model under one criterion; higher is more important.

    Attributes:
        criterion: its name in `CRITERIA`, or the name of the callable.
        granularity: of the blocks, "branch", "layer" or "layer_approx".
        seed: that the criterion ran with.
        scores: block name to score, in order of execution.
        fingerprint: of the analysis that the blocks are from.
    """

    criterion: str
    granularity: str
    seed: int
    scores: dict[str, float]
    fingerprint: str


def score_blocks(
    model: nn.Module,
    criterion: str | Criterion,
    data: Any = None,
    loss_fn: LossFunction | None = None,
    example_inputs: Any = None,
    granularity: str = "branch",
    seed: int = 0,
    *,
    analysis: BlockAnalysis | None = None,
    max_batches: int | None = None,
    max_cache_bytes: int | None = None,
) -> ScoreTable:
    """Return the importance of each removable block of `model`, which stays as it is.

    Args:
        model: the dense network.
        criterion: a name of `CRITERIA`, or a callable of the `Criterion` protocol.
        data: one `(inputs, targets)` pair or an iterable of them (a DataLoader, a generator).
            Inputs are a Tensor, a tuple of arguments or a dict of keywords; they go to the
            device of the model. A batch may be inputs alone, a Tensor or a dict, where the
            criterion reads no labels or the model takes them itself. As many batches are taken as
            the criterion asks for: those at initialisation look at the first, others at all. Under
            `torchrun`, `blockprune.distributed.global_batches` joins the shares of all ranks. None:
            where the criterion asks for data, it gets standard normal inputs of the example's
            shape, at least 16, and random labels.
        loss_fn: `(outputs, targets) -> scalar`, given what the model returns. None: the `loss` of
            its output where it has one, else cross entropy of its first floating-point output with
            integer labels.
        example_inputs: to find the blocks by; None: the first two samples of the data, or, without
            data, such as the model's configuration tells.
        granularity: "branch", "layer" or "layer_approx"; an `analysis` has its own.
        seed: of all that is random in scoring: two calls with equal arguments agree bit for bit.
        analysis: of this model, where there is one already.
        max_batches: at most so many batches are read, the first ones; None: all.
        max_cache_bytes: what criteria that leave one block out may keep of the whole pass; the
            scores do not depend on it, the time does. None: 1 GiB.

    Raises:
        CriterionError: an unknown criterion; scores that are missing, unasked for or not finite;
            frozen blocks; labels needed and absent; a loss that is not finite. The block is
            named.
        DataError: data that is empty, malformed, or refused by the model.
        TraceError: the model cannot be followed, or no input shape can be inferred.

    Warns:
        NoDataWarning: the criterion asked for data and there was none.
        ZeroScoresWarning: a gradient criterion scored every block 0, as it does where branches
            are initialised to compute zero.

    Example:
        >>> import torch
        >>> from blockprune.models import resnet20
        >>> images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> table = score_blocks(resnet20(), "snip", (images, labels))
        >>> len(table.scores)
        7
    """
    tables = score_criteria(
        model,
        [criterion],
        data,
        loss_fn,
        example_inputs,
        granularity,
        seed,
        analysis=analysis,
        max_batches=max_batches,
        max_cache_bytes=max_cache_bytes,
    )
    [table] = tables.values()
    return table


def score_criteria(
    model: nn.Module,
    criteria: Iterable[str | Criterion],
    data: Any = None,
    loss_fn: LossFunction | None = None,
    example_inputs: Any = None,
    granularity: str = "branch",
    seed: int = 0,
    *,
    analysis: BlockAnalysis | None = None,
    max_batches: int | None = None,
    max_cache_bytes: int | None = None,
) -> dict[str, ScoreTable]:
    """Return the `ScoreTable` of each of several criteria, by name; equal to one at a time.

    The blocks are looked for once, and the data read once. Criteria that look at what flows through
    the blocks share one pass over it, and so do those that leave one block out.

    Arguments, errors and warnings are those of `score_blocks`.

    Example:
        >>> import torch
        >>> from blockprune.models import resnet20
        >>> batch = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
        >>> sorted(score_criteria(resnet20(), ["expectabs", "block_influence"], batch))
        ['block_influence', 'expectabs']
    """
    named = _named(criteria)
    _check_limits(max_batches, max_cache_bytes)
    ranks = data if isinstance(data, GlobalBatches) else None
    if ranks is not None:
        ranks.check_same(model)
    with isolated(), surroundings_kept(model):
        seed_rng(seed)
        if example_inputs is not None:
            example = as_call(model, example_inputs)
        elif data is not None:
            example, data = first_inputs(model, data)
        elif analysis is not None:
            example = analysis.traced.call
        else:
            example = as_call(model, infer_example_inputs(model, seed=seed))
        batches = None
        if data is not None:
            every = batches_of(model, data, device_of(model))
            batches = Replay(itertools.islice(every, max_batches))
        if analysis is None:
            analysis = find_blocks(model, example, granularity)
        if not analysis.blocks:
            scores: dict[str, dict[str, float]] = {name: {} for name in named}
        else:
            # User hooks would see the scoring passes, so the copy leaves them behind.
            hookless = structural_copy(model).eval()
            _check_analysis(analysis, hookless)
            context = ScoringContext(
                hookless,
                analysis.blocks,
                batches,
                example,
                analysis=analysis,
                loss_fn=loss_fn,
                seed=seed,
                max_cache_bytes=CACHE_BYTES if max_cache_bytes is None else max_cache_bytes,
            )
            found = evaluate(context, named)
            scores = {n: _checked(n, found[n], analysis.names) for n in named}
    if ranks is not None:
        scores = ranks.agree(scores)
    return {
        name: ScoreTable(name, analysis.granularity, seed, values, analysis.fingerprint)
        for name, values in scores.items()
    }


def _named(criteria: Iterable[str | Criterion]) -> dict[str, Criterion]:
    named: dict[str, Criterion] = {}
    for name, criterion in map(criterion_of, criteria):
        if name in named:
            raise CriterionError(f"Two criteria are called {name!r}; the tables go by name.")
        named[name] = criterion
    return named


def _check_limits(max_batches: object, max_cache_bytes: object) -> None:
    for name, value, least in (
        ("max_batches", max_batches, 1),
        ("max_cache_bytes", max_cache_bytes, 0),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise CriterionError(f"{name} is an int, {least} or more, or None; got {value!r}.")


def _check_analysis(analysis: BlockAnalysis, model: nn.Module) -> None:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for block in analysis.blocks:
        for name in block.parameters:
            if name not in known:
                raise CriterionError(
                    f"The analysis is of another model: block {block.name!r} has a parameter "
                    f"{name!r}, and {type(model).__name__} has none of that name. "
                    "Leave analysis out, or pass find_blocks(model, ...)."
                )


def _checked(criterion: str, scores: object, names: tuple[str, ...]) -> dict[str, float]:
    """Return the scores as floats in order of execution.

    Raises:
        CriterionError: they are not one finite number for each block.
    """
    if not isinstance(scores, Mapping):
        raise CriterionError(
            f"Criterion {criterion!r} returned a {type(scores).__name__}; it must return a mapping "
            "from block name to number."
        )
    for name in scores:
        if name not in names:
            raise CriterionError(
                f"Criterion {criterion!r} scored {name!r}, which is no block of this model."
                f"{close_names(str(name), names)}"
            )
    checked = {}
    for name in names:
        if name not in scores:
            raise CriterionError(f"Criterion {criterion!r} gave no score to block {name!r}.")
        value = _number(scores[name])
        if value is None or not math.isfinite(value):
            raise CriterionError(
                f"Criterion {criterion!r} scored block {name!r} {scores[name]!r}; a score must be "
                "one finite number. Look for NaN or infinite values in its weights, or in the data."
            )
        checked[name] = value
    return checked


def _number(value: object) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, numbers.Real) else None
