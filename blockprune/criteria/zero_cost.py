"""Zero-cost proxies: scores of a whole untrained network, from one batch.

They were made to rank networks, so a block's score is the proxy of the whole model minus that of
the model without the block. Both are taken with batch normalisation in training mode, as at
initialisation running statistics describe nothing yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blockprune.batches import Batch
from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import ScoringContext
from blockprune.criteria.layer_outputs import sample_axis
from blockprune.criteria.nonlinear import NONLINEAR_NAMES
from blockprune.errors import CriterionError, DataError
from blockprune.losses import main_output

__all__ = ["JacobCov", "Naswot"]


@dataclass(frozen=True)
class Naswot:
    """NASWOT: how differently the samples switch the activation functions, with and without.

    With the code `x = 1[input > 0]` of each sample at each activation function (ReLU and its
    like)::

        K = sum over activation functions of  x x' + (1 - x)(1 - x)'      (samples x samples)
        proxy = log |det K|

    and the score is the proxy of the model minus that without the block. The axis of the samples
    is found by short passes of two and of three samples; where there is none, as in a table of
    weights, the activation is left out. A batch of two has the samples in the first axis.

    Raises (when called):
        CriterionError: there is no such function; or two samples have the same codes, so that K
            is singular.
        DataError: no data, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import Naswot
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), Naswot(), data).scores)
        7

    Source: Mellor et al., "Neural architecture search without training", 2021.
    """

    needs: ClassVar[str] = "inputs"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        batch = context.first_batch()
        layouts = {
            block and block.name: _layout(context, batch, block)
            for block in (None, *context.blocks)
        }

        def proxy(context: ScoringContext, batch: Batch, without: ResidualBlock | None) -> float:
            return _naswot(context, batch, without, layouts[without and without.name])

        return _differences(context, proxy)


@dataclass(frozen=True)
class JacobCov:
    """Jacobian covariance: how differently the outputs of the samples depend on their inputs.

    With J the gradient of the sum of all outputs with respect to the input, a row for each sample,
    and v the eigenvalues of the correlation of its rows::

        proxy = - sum over v of  log(v + k) + 1 / (v + k)

    and the score is the proxy of the model minus that without the block. Where no input is a
    floating-point tensor (token ids), J is with respect to what the first embedding returns.

    Args:
        k: keeps the logarithm finite.

    Raises (when called):
        CriterionError: the gradient of a sample is constant, or not finite.
        DataError: no data, fewer than two samples, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.criteria import JacobCov
        >>> from blockprune.models import resnet20
        >>> data = torch.rand(8, 3, 32, 32)
        >>> len(score_blocks(resnet20(), JacobCov(), data).scores)
        7

    Source: Mellor et al., "Neural architecture search without training" (first version), 2020;
    Abdelfattah et al., "Zero-cost proxies for lightweight NAS", 2021.
    """

    needs: ClassVar[str] = "inputs"
    reads_only: ClassVar[bool] = True

    k: float = 1e-5

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from the first batch."""
        return _differences(context, self._proxy)

    def _proxy(self, context: ScoringContext, batch: Batch, without: ResidualBlock | None) -> float:
        rows = _input_gradients(context, batch, without)
        spread = rows.std(1) > 0
        if not (bool(rows.isfinite().all()) and bool(spread.all())):
            raise CriterionError(
                f"jacob_cov correlates the gradients of the samples{_left_out(without)}, and that "
                f"of sample {int((~spread).nonzero()[0]) if not bool(spread.all()) else 0} is "
                "constant or not finite. Use other samples, or 'snip'."
            )
        values = torch.linalg.eigvalsh(torch.corrcoef(rows)) + self.k
        return -float((values.log() + 1 / values).sum())


Proxy = Callable[[ScoringContext, Batch, ResidualBlock | None], float]


def _differences(context: ScoringContext, proxy: Proxy) -> dict[str, float]:
    batch = context.first_batch()
    if len(batch) < 2:
        raise DataError(
            f"A zero-cost proxy compares samples, so it needs at least 2, not {len(batch)}."
        )
    with context.batch_statistics(context.passes.model):
        full = proxy(context, batch, None)
        return {block.name: full - proxy(context, batch, block) for block in context.blocks}


def _left_out(block: ResidualBlock | None) -> str:
    return f" without block {block.name!r}" if block else ""


# --- codes ----------------------------------------------------------------------------------------


def _naswot(
    context: ScoringContext, batch: Batch, without: ResidualBlock | None, layout: _Layout
) -> float:
    codes = _Codes(len(batch), layout)
    _watch(context, batch, without, codes.add)
    if codes.kernel is None:
        raise CriterionError(
            "naswot reads the inputs of activation functions (ReLU and its like), and the model"
            f"{_left_out(without)} calls none. Use 'jacob_cov' or 'snip'."
        )
    _, value = torch.linalg.slogdet(codes.kernel)
    if not bool(value.isfinite()):
        raise CriterionError(
            f"naswot: two of the {len(batch)} samples switch every activation function of the model"
            f"{_left_out(without)} alike, so K is singular. Use fewer or other samples."
        )
    return float(value)


_Layout = Sequence[int | None] | None
"""The axis of the samples at each activation function that is called; None: not known of any."""


def _layout(context: ScoringContext, batch: Batch, without: ResidualBlock | None) -> _Layout:
    if len(batch) < 3:
        return None
    try:
        two, three = (_copies(context, batch.part(0, size), without) for size in (2, 3))
    except DataError:
        # A model of one size of batch.
        return None
    if len(two) != len(three):
        return None
    return [sample_axis(few, more) for few, more in zip(two, three, strict=True)]


def _copies(context: ScoringContext, batch: Batch, without: ResidualBlock | None) -> list[Tensor]:
    """Return what enters each activation function, in memory that none of them writes into."""
    seen: list[Tensor] = []
    _watch(context, batch, without, lambda entering: seen.append(entering.clone()))
    return seen


class _Codes:
    """Adds up the kernel over every activation function that is called."""

    def __init__(self, samples: int, layout: _Layout) -> None:
        self.samples = samples
        self.axes: Iterator[int | None] = itertools.repeat(0) if layout is None else iter(layout)
        self.kernel: Tensor | None = None

    def add(self, entering: Tensor) -> None:
        axis = next(self.axes, None)
        if axis is None or entering.dim() < 2 or entering.shape[axis] % self.samples:
            return
        # Windows of one sample lie side by side.
        on = (entering > 0).movedim(axis, 0).reshape(self.samples, -1).double()
        kernel = on @ on.T + (1 - on) @ (1 - on).T
        self.kernel = kernel if self.kernel is None else self.kernel + kernel


def _watch(
    context: ScoringContext,
    batch: Batch,
    without: ResidualBlock | None,
    read: Callable[[Tensor], None],
) -> None:
    """Let `read` see what enters each activation function."""
    with context.running(batch), torch.no_grad(), _Entering(read):
        context.passes.run(batch.call, without)


class _Entering(TorchFunctionMode):
    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in NONLINEAR_NAMES and args:
            self.read(args[0])
        return func(*args, **(kwargs or {}))


# --- input gradients ------------------------------------------------------------------------------


def _input_gradients(
    context: ScoringContext, batch: Batch, without: ResidualBlock | None
) -> Tensor:
    """Return d(sum of outputs)/d(input), (samples, elements), in double precision."""
    leaves: list[Tensor] = []

    def watched(tensor: Tensor) -> Tensor:
        if leaves or not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[0]

    call = batch.call.map(watched)
    with context.running(batch), torch.enable_grad(), _FirstEmbedding(watched):
        total = main_output(context.passes.run(call, without)).sum()
    if not leaves or not total.requires_grad:
        raise CriterionError(
            "jacob_cov differentiates the outputs with respect to the input, and the model's "
            "output depends on no floating-point input and no embedding. Use 'naswot' or 'snip'."
        )
    (gradient,) = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return gradient.detach().reshape(len(batch), -1).double()


class _FirstEmbedding(TorchFunctionMode):
    """Lets a function see, and replace, what an embedding returns."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "embedding":
            # A leaf may not be written into.
            return self.replace(value).clone()
        return value
