"""Keeping masked weights at 0 while anything trains the model.

A gradient of 0 is not enough: momentum from before moves a weight without any, and loading a state
puts values back. So three things are watched, for as long as the context lasts:

* when a gradient has been accumulated, that of masked weights is set to 0; this is before gradients
  are averaged over processes, clipped or unscaled, so that norms are those of the masked network;
* after each step of any optimiser over these weights, masked weights are set to 0;
* after a state has been loaded, so are they.

The model is not wrapped: parameters, names and the ``state_dict`` are those of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from blockprune.errors import MaskError
from blockprune.sparsity.masks import Mask, owners

__all__ = ["held", "with_prune", "without_prune"]


@contextmanager
def held(model: nn.Module, mask: Mask) -> Iterator[None]:
    """Set the masked weights of `model` to 0, and keep them there at every step of any training.

    Whatever trains inside: any optimiser of `torch.optim` (momentum, weight decay, Adam), averages
    of weights, a gradient scaler, data parallelism, accelerate. The rest of the weights train bit
    for bit as under `torch.nn.utils.prune`. On leaving, the weights stay as they are and nothing of
    this is left on the model. May be nested; then both masks hold.

    Args:
        model: changed in place.
        mask: for the model's weights.

    Raises:
        MaskError: the mask does not fit the model.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, held
        >>> layer = torch.nn.Linear(3, 1)
        >>> mask = Mask({"weight": torch.tensor([[True, False, True]])})
        >>> with held(layer, mask):
        ...     optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        ...     layer(torch.rand(4, 3)).sum().backward()
        ...     optimizer.step()
        >>> (layer.weight == 0).tolist()
        [[False, True, False]]

    Source: Frankle and Carbin, "The lottery ticket hypothesis", 2019.
    """
    parameters = mask.parameters(model)
    masked = {parameters[name]: _Zeros(~keep) for name, keep in mask.keep.items()}
    for parameter, zeros in masked.items():
        zeros.put(parameter)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Only its own weights: another thread may be in the middle of a pass over the others.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in masked:
                    masked[parameter].put(parameter)

    with ExitStack() as stack:
        # Last of all: hooks that went along with a copy of the model then do nothing.
        stack.callback(masked.clear)
        stack.callback(register_optimizer_step_post_hook(after_step).remove)
        for parameter, zeros in list(masked.items()):
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(_without_gradient(zeros))  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            for module, attribute in owners(model, parameter):
                hook = _after_load(masked, zeros, attribute)
                handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        yield


def with_prune(model: nn.Module, mask: Mask) -> nn.Module:
    """Put the mask on `model` by `torch.nn.utils.prune`, for training loops of one's own.

    In place; each weight is then computed from `weight_orig` and `weight_mask`, which are what
    parameters and ``state_dict`` hold. Weights that layers share stay shared.

    Returns:
        The same model.

    Raises:
        MaskError: the mask does not fit the model.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, with_prune, without_prune
        >>> layer = torch.nn.Linear(3, 1)
        >>> pruned = with_prune(layer, Mask({"weight": torch.tensor([[True, False, True]])}))
        >>> sorted(pruned.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
        >>> sorted(without_prune(pruned).state_dict())
        ['bias', 'weight']
    """
    for name, parameter in mask.parameters(model).items():
        keep = mask.keep[name].to(parameter.device)
        for module, attribute in owners(model, parameter):
            prune.custom_from_mask(module, attribute, keep)  # type: ignore[no-untyped-call]
    return model


def without_prune(model: nn.Module) -> nn.Module:
    """Take the masks of `torch.nn.utils.prune` off `model`; masked weights are 0 in it.

    In place; names are those of the dense model again.

    Returns:
        The same model.

    Raises:
        MaskError: there are none.

    Example:
        See `with_prune`.
    """
    found = [
        (module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    if not found:
        raise MaskError(
            f"no weight of this {type(model).__name__} is pruned by torch.nn.utils.prune; "
            "with_prune does that."
        )
    for module, attribute in found:
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]
    return model


class _Zeros:
    """Where a tensor is to be 0, on whatever device the tensor is by now."""

    def __init__(self, places: Tensor) -> None:
        self._places = places

    @torch.no_grad()
    def put(self, tensor: Tensor) -> None:
        if self._places.device != tensor.device:
            self._places = self._places.to(tensor.device)
        tensor.masked_fill_(self._places, 0)


# Functions and not methods: a copy of the model, which an average of weights is, copies its hooks,
# and a method's copy would drag a copy of the parameters along.


def _without_gradient(zeros: _Zeros) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            zeros.put(parameter.grad)

    return hook


def _after_load(
    masked: dict[nn.Parameter, _Zeros], zeros: _Zeros, attribute: str
) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, incompatible_keys: Any) -> None:
        parameter = module._parameters[attribute]
        if masked and parameter is not None:
            zeros.put(parameter)
            # Another one where the state was loaded with assign=True.
            masked[parameter] = zeros

    return hook
