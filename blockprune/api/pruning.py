"""`prune`: analysis, scoring, plan and surgery in one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from blockprune.api.planning import Planner
from blockprune.batches import Replay, first_inputs
from blockprune.blocks import BlockAnalysis, Reason, find_blocks
from blockprune.criteria import Criterion
from blockprune.criteria.base import LossFunction
from blockprune.errors import InfeasibleBudgetError, RecoveryError
from blockprune.inputs import infer_example_inputs
from blockprune.plan import Budget, budget_asked_for
from blockprune.recovery import check_method
from blockprune.recovery import recover as recovered
from blockprune.surgery import cut_blocks, record_of
from blockprune.tracing import LeafModules, TensorFact

__all__ = ["prune"]


def prune(
    model: nn.Module,
    criterion: str | Criterion = "grasp",
    p: int | float | None = None,
    *,
    keep_macs: int | float | None = None,
    keep_params: int | float | None = None,
    max_latency_ms: float | None = None,
    by: str = "score",
    schedule: str = "one-shot",
    beam_width: int | None = None,
    data: Any = None,
    example_inputs: Any = None,
    loss_fn: LossFunction | None = None,
    granularity: str = "branch",
    protect: str | Iterable[str] = (),
    min_blocks_per_stage: int = 0,
    max_batches: int | None = None,
    max_cache_bytes: int | None = None,
    seed: int = 0,
    verify: bool = True,
    preserve_root: bool = False,
    leaf_modules: LeafModules = (),
    recover: str | None = None,
) -> nn.Module:
    """Return a copy of `model` without its least important residual blocks.

    The ticket equals the dense model with the outputs of the removed branches multiplied by zero;
    see `remove_blocks`. The dense model is left untouched.

    Args:
        model: the dense model, or a ticket to cut further.
        criterion: a name in `blockprune.criteria.CRITERIA`, or a callable of that protocol.
        p: how many blocks go: an int is a count, a float a share of the removable ones, rounded
            down. One of the four budgets is given.
        keep_macs: the MACs that may be left: a float is a share of the dense model's, an int a
            number.
        keep_params: the parameters that may be left, likewise.
        max_latency_ms: milliseconds that a forward pass of the example inputs may take.
        by: "score" or "score_per_cost"; see `make_plan`, also for the budgets.
        schedule: "one-shot": all blocks are scored once, on the dense model. "iterative": the
            least important goes, those left are scored again on that ticket, with the same data and
            seed, and so on. The plan of the ticket has for each block the score it went with, for
            each that stays the latest. "beam": the same from the best `beam_width` sets of each
            step in place of the best one; a set is as good as the scores that its blocks went with
            add up to. It takes `beam_width` times as many scorings.
        beam_width: for "beam"; None: 3. With 1 it is "iterative".
        data: one `(inputs, targets)` or an iterable of them, for criteria that look at data; None:
            random inputs and labels, with a warning that says so.
        example_inputs: what the forward takes (a Tensor, a tuple of arguments, a dict of keywords).
            None: the first two samples of `data`, else a shape inferred from the model's
            configuration. Budgets in numbers of MACs and in milliseconds are for these inputs.
        loss_fn: `(outputs, targets) -> scalar`; None: cross entropy.
        granularity: "branch", "layer" or "layer_approx"; see `find_blocks`.
        protect: `fnmatch` patterns of blocks that stay.
        min_blocks_per_stage: residual blocks that stay in each stage at the least.
        max_batches: at most so many batches of the data are read; None: all.
        max_cache_bytes: what scoring may keep of a pass; see `score_blocks`.
        seed: of all that is random.
        verify: prove the equality before returning.
        preserve_root: keep the root module's class and methods; see `remove_blocks`.
        leaf_modules: modules that are called and not looked into: classes, names of classes, or
            `fnmatch` patterns of qualified names.
        recover: a method of `blockprune.recover` ("refit", "map", "scale", "moments", "norms" or
            "distill", with its default recipe), which makes up for what has gone with the same data
            and `max_batches`. None: the ticket is exactly the dense model without these branches.

    Returns:
        A `torch.fx.GraphModule` where the model traces as a whole, else a copy of the model whose
        traced parts are `GraphModule`s.

    Raises:
        InfeasibleBudgetError: the budget cannot be met; says what can be reached, and why.
        PlanError, CriterionError, DataError: an argument makes no sense.
        TraceError: the model does not run on the inputs, or no shape can be inferred.
        VerificationError: the ticket is not equal to its reference; nothing is returned.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> images, labels = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
        >>> ticket = blockprune.prune(resnet20(), "grasp", p=2, data=(images, labels))
        >>> len(blockprune.plan_of(ticket).remove)
        2

    Source:
        "When Layers Play the Lottery, all Tickets Win at Initialization", Algorithm 2.
    """
    asked = budget_asked_for(
        p, keep_macs=keep_macs, keep_params=keep_params, max_latency_ms=max_latency_ms
    )
    if recover is not None:
        data = _data_to_recover(recover, data)
    if example_inputs is None and data is not None:
        example_inputs, data = first_inputs(model, data)
    if example_inputs is None:
        example_inputs = _example_of(model, seed)
    analysis = find_blocks(
        model,
        example_inputs,
        granularity,
        preserve_root=preserve_root,
        leaf_modules=leaf_modules,
    )
    planner = Planner(
        model,
        analysis,
        criterion,
        data,
        loss_fn,
        seed,
        by,
        schedule,
        protect if isinstance(protect, str) else tuple(protect),
        min_blocks_per_stage,
        max_batches,
        max_cache_bytes,
        beam_width,
    )
    _refuse_if_hopeless(model, analysis, asked)
    planner.check(asked)
    ticket = cut_blocks(model, analysis, planner.plan(asked), verify=verify)
    if recover is None:
        return ticket
    return recovered(ticket, model, data, recover, max_batches=max_batches, in_place=True)


def _data_to_recover(method: str, data: Any) -> Any:
    """Return data that can be read several times.

    Raises:
        RecoveryError: there is no such method, or there are no data.
    """
    check_method(method)
    if data is None:
        raise RecoveryError(
            f"recover={method!r} needs data: a few hundred samples such as the network will see."
        )
    return Replay(data) if isinstance(data, Iterator) else data


def _example_of(model: nn.Module, seed: int) -> Any:
    """Return the inputs that a ticket was cut with, or such as the model's configuration tells."""
    record = record_of(model)
    if record is None:
        return infer_example_inputs(model, seed=seed)
    device = next((parameter.device for parameter in model.parameters()), None)
    return record.call.map(lambda fact: fact.example().to(device), TensorFact)


def _refuse_if_hopeless(
    model: nn.Module, analysis: BlockAnalysis, asked: int | float | Budget
) -> None:
    """Say why a number of blocks cannot go where the model has none; costs may be met as is."""
    if analysis.blocks or isinstance(asked, Budget) or asked == 0:
        return
    stopped = [r for r in analysis.rejections if r.reason is Reason.OPAQUE]
    if stopped and len(stopped) == len(analysis.rejections):
        raise InfeasibleBudgetError(
            f"{type(model).__name__} has no removable residual block that could be found: "
            f"{stopped[0].name} cannot be looked into, since {stopped[0].detail}. Try "
            "example_inputs that take another way through it, leaf_modules= for the module inside "
            "that stops it, or preserve_root=True, which looks into its children one by one."
        )
    reasons = Counter(str(rejection.reason) for rejection in analysis.rejections)
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    raise InfeasibleBudgetError(
        f"{type(model).__name__} has no removable residual block, so p={asked!r} cannot be met: "
        + (f"its merges were refused ({found})." if found else "its forward adds no two tensors.")
        + " blockprune.find_blocks(model, example_inputs).rejections lists each with its reason."
    )
