"""The composed call: analysis, scoring, plan and surgery in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from blockprune.blocks import BlockAnalysis, Reason, find_blocks
from blockprune.criteria import Criterion
from blockprune.criteria.base import LossFunction
from blockprune.errors import InfeasibleBudgetError
from blockprune.inputs import infer_example_inputs
from blockprune.plan import make_plan
from blockprune.scoring import first_inputs, score_blocks
from blockprune.surgery import cut_blocks, record_of
from blockprune.tracing import LeafModules, TensorFact

__all__ = ["prune"]


def prune(
    model: nn.Module,
    criterion: str | Criterion = "grasp",
    p: int | float = 1,
    *,
    data: Any = None,
    example_inputs: Any = None,
    loss_fn: LossFunction | None = None,
    granularity: str = "branch",
    protect: str | Iterable[str] = (),
    min_blocks_per_stage: int = 0,
    seed: int = 0,
    verify: bool = True,
    preserve_root: bool = False,
    leaf_modules: LeafModules = (),
) -> nn.Module:
    """Return a copy of `model` without its `p` least important residual blocks.

    The ticket equals the dense model with the outputs of the removed branches multiplied by zero;
    see `remove_blocks`. The dense model is left untouched.

    Args:
        model: the dense model, or a ticket to cut further.
        criterion: a name in `blockprune.criteria.CRITERIA`, or a callable of that protocol.
        p: an int is a count of blocks, a float a share of the removable ones, rounded down.
        data: one `(inputs, targets)` or an iterable of them, for criteria that look at data; None:
            random inputs and labels, with a warning that says so.
        example_inputs: what the forward takes (a Tensor, a tuple of arguments, a dict of keywords).
            None: the first inputs of `data`, else a shape inferred from the model's configuration.
        loss_fn: `(outputs, targets) -> scalar`; None: cross entropy.
        granularity: "branch", "layer" or "layer_approx"; see `find_blocks`.
        protect: `fnmatch` patterns of blocks that stay.
        min_blocks_per_stage: residual blocks that stay in each stage at the least.
        seed: of all that is random.
        verify: prove the equality before returning.
        preserve_root: keep the root module's class and methods; see `remove_blocks`.
        leaf_modules: modules that are called and not looked into: classes, names of classes, or
            `fnmatch` patterns of qualified names.

    Returns:
        A `torch.fx.GraphModule` where the model traces as a whole, else a copy of the model whose
        traced parts are `GraphModule`s.

    Raises:
        InfeasibleBudgetError: fewer blocks can go than asked for; says how many, and why.
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
    limits: dict[str, Any] = {"protect": protect, "min_blocks_per_stage": min_blocks_per_stage}
    _refuse_if_hopeless(model, analysis, p)
    # An impossible budget is told before the scoring, which may take long.
    make_plan(analysis, None, p, **limits)
    scores = score_blocks(
        model, criterion, data, loss_fn, example_inputs, seed=seed, analysis=analysis
    )
    plan = make_plan(analysis, scores, p, **limits)
    return cut_blocks(model, analysis, plan, verify=verify, preserve_root=preserve_root)


def _example_of(model: nn.Module, seed: int) -> Any:
    """Return the inputs that a ticket was cut with, or such as the model's configuration tells."""
    record = record_of(model)
    if record is None:
        return infer_example_inputs(model, seed=seed)
    device = next((parameter.device for parameter in model.parameters()), None)
    return record.call.map(lambda fact: fact.example().to(device), TensorFact)


def _refuse_if_hopeless(model: nn.Module, analysis: BlockAnalysis, p: object) -> None:
    if analysis.blocks or p == 0:
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
        f"{type(model).__name__} has no removable residual block, so p={p!r} cannot be met: "
        + (f"its merges were refused ({found})." if found else "its forward adds no two tensors.")
        + " blockprune.find_blocks(model, example_inputs).rejections lists each with its reason."
    )
