"""Running statistics of batch normalisation, taken anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.batches import batches_of
from blockprune.errors import DataError
from blockprune.modes import in_mode
from blockprune.randomness import preserved_rng

__all__ = ["recalibrate_norms"]


def recalibrate_norms(model: nn.Module, batches: Any) -> None:
    """Take the running statistics of batch normalisation anew, as the means over some batches.

    Everything else of the model, and every random generator, stays as it is.

    Args:
        model: run in training mode, without gradients.
        batches: of training data, as for `score_blocks`; labels are not looked at. All count
            alike, so let them be of one size.

    Raises:
        DataError: there is no batch, and the model has statistics to take.

    Example:
        >>> import torch
        >>> from blockprune.recovery import recalibrate_norms
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> labels = torch.tensor([0, 1])
        >>> first, second = torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])
        >>> recalibrate_norms(norm, [(first, labels), (second, labels)])
        >>> norm.running_mean
        tensor([4.])
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    found: list[dict[str, Tensor]] = []
    with _put_back(model, norms), in_mode(True, model), preserved_rng(), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            # A cumulative mean, which does not depend on the order.
            norm.momentum = None
        seen = 0
        for batch in batches_of(model, batches, next(model.buffers()).device):
            model(*batch.call.args, **batch.call.kwargs)
            seen += 1
        if not seen:
            raise DataError("there is no batch to take the statistics of batch normalisation from.")
        found = [{name: b.detach().clone() for name, b in norm.named_buffers()} for norm in norms]
    with torch.no_grad():
        for norm, values in zip(norms, found, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(values[name])


@contextmanager
def _put_back(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Undo what a training forward does to buffers, and changes of momenta."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    momenta = [norm.momentum for norm in norms]
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
