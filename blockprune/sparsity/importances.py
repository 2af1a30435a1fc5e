"""The table of importances of single weights, and how one is taken without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from blockprune.batches import Replay, batches_of, first_inputs
from blockprune.criteria import ScoringContext
from blockprune.errors import CriterionError, DataError, close_names, raise_if_out_of_memory
from blockprune.inputs import infer_example_inputs
from blockprune.losses import LossFunction
from blockprune.randomness import seed_rng
from blockprune.sparsity.layerwise import (
    LayerImportance,
    l1,
    l2,
    lamp,
    magnitude,
    minmax,
    softmax,
)
from blockprune.sparsity.masks import Mask
from blockprune.sparsity.networkwise import (
    MaskedNetwork,
    NetworkImportance,
    grasp,
    random,
    snip,
    synflow,
)
from blockprune.tracing import Call, as_call, copy_model, isolated, structural_copy

__all__ = ["IMPORTANCES", "NEEDS_DATA", "importance_of"]

OF_LAYERS: Final[dict[str, LayerImportance]] = {
    "magnitude": magnitude,
    "l1": l1,
    "l2": l2,
    "softmax": softmax,
    "minmax": minmax,
    "lamp": lamp,
}
OF_NETWORKS: Final[dict[str, NetworkImportance]] = {
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "random": random,
}

IMPORTANCES: Final[dict[str, LayerImportance | NetworkImportance]] = {**OF_LAYERS, **OF_NETWORKS}

NEEDS_DATA: Final = frozenset({"snip", "grasp"})
"""Those that read `(inputs, labels)`; "synflow" reads the shape of the inputs, if it is given."""


def importance_of(
    name: str | LayerImportance,
    model: nn.Module,
    mask: Mask,
    *,
    data: Any = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the importance of each weight of `mask`; higher = kept, and 0 for what is pruned.

    The model, its gradients, modes and hooks, and all random generators stay as they are.

    Args:
        name: of `IMPORTANCES`, or a function ``f(weight_abs, keep)`` of a layer's absolute
            weights, float64, and of which of them survive; it returns one number for each.
        model: the network; what it holds for masked weights is taken to be 0.
        mask: what survives.
        data: as in `score_blocks`; its first batch is read by those in `NEEDS_DATA`.
        loss_fn: as in `score_blocks`.
        seed: of all that is random.

    Returns:
        By the mask's names and of its shapes, float64, on the CPU. In what unit depends on the
        importance; those of one call compare across layers.

    Raises:
        CriterionError: an unknown name; a function that fails or returns another shape; NaN; a
            network that cannot be differentiated.
        DataError: data needed and absent, empty, or refused by the model.
        MaskError: the mask does not fit the model.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask, importance_of
        >>> layer = torch.nn.Linear(3, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
        >>> importance_of("l1", layer, Mask.full(layer))["weight"]
        tensor([[0.1667, 0.3333, 0.5000]], dtype=torch.float64)
    """
    called, compute = _named(name)
    parameters = mask.parameters(model)
    if called in OF_NETWORKS and compute is OF_NETWORKS[called]:
        with isolated():
            seed_rng(seed)
            found = OF_NETWORKS[called](_network(called, model, mask, data, loss_fn, seed))
    else:
        found = {
            layer: _of_layer(called, compute, layer, parameters[layer], keep)
            for layer, keep in mask.keep.items()
        }
    return {layer: _checked(called, layer, found[layer], keep) for layer, keep in mask.keep.items()}


def _named(name: str | LayerImportance) -> tuple[str, Any]:
    if isinstance(name, str):
        if name not in IMPORTANCES:
            raise CriterionError(
                f"There is no importance {name!r}.{close_names(name, IMPORTANCES)} "
                f"Known: {', '.join(IMPORTANCES)}; or pass a function f(weight_abs, keep)."
            )
        return name, IMPORTANCES[name]
    if not callable(name):
        raise CriterionError(
            f"An importance is a name or a function f(weight_abs, keep), not "
            f"{type(name).__name__}. Known names: {', '.join(IMPORTANCES)}."
        )
    return str(getattr(name, "__name__", type(name).__name__)), name


def _of_layer(
    called: str, compute: LayerImportance, layer: str, weight: Tensor, keep: Tensor
) -> Tensor:
    # Filled and not multiplied: a pruned weight is no longer there, be it finite or not. A copy,
    # since a function may write into what it is given.
    given = weight.detach().cpu().abs().to(torch.float64).masked_fill(~keep, 0)
    odd = int((~given.isfinite()).sum())
    if odd:
        raise CriterionError(f"{layer} is not finite in {odd} of the weights that survive.")
    try:
        found = compute(given, keep.clone())
    except Exception as error:
        raise_if_out_of_memory(error)
        raise CriterionError(
            f"Importance {called!r} failed on {layer}: {type(error).__name__}: {error}. It is "
            "called as f(weight_abs, keep), with two tensors of the shape of the weight."
        ) from error
    if not isinstance(found, Tensor) or found.shape != keep.shape:
        kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CriterionError(
            f"Importance {called!r} returned {kind} for {layer}; one number for each weight, a "
            f"tensor of {tuple(keep.shape)}, is needed."
        )
    return found


def _checked(called: str, layer: str, found: Tensor, keep: Tensor) -> Tensor:
    values = found.detach().cpu().to(torch.float64).masked_fill(~keep, 0)
    if bool(values.isnan().any()):
        raise CriterionError(
            f"Importance {called!r} is NaN for {int(values.isnan().sum())} weights of {layer}. "
            "Look for NaN or infinite values in its weights, or in the data."
        )
    return values


def _network(
    called: str,
    model: nn.Module,
    mask: Mask,
    data: Any,
    loss_fn: LossFunction | None,
    seed: int,
) -> MaskedNetwork:
    """Return a private copy of the masked network, and a context to run it in."""
    if data is None and called in NEEDS_DATA:
        raise DataError(
            f"Importance {called!r} needs data=(inputs, labels), or a DataLoader of them. Those "
            f"that need none: {', '.join(n for n in IMPORTANCES if n not in NEEDS_DATA)}."
        )
    example, batches = Call((), {}), None
    if data is not None and called != "random":
        example, data = first_inputs(model, data)
        batches = Replay(batches_of(model, data, next(model.parameters()).device))
    elif called == "synflow":
        example = as_call(model, infer_example_inputs(model, seed=seed))
    # User hooks would see the passes, so the copy leaves them behind.
    copy = copy_model(structural_copy(model)).eval()
    _silence(copy, mask)
    return MaskedNetwork(
        ScoringContext(copy, (), batches, example, loss_fn=loss_fn, seed=seed), mask
    )


def _silence(copy: nn.Module, mask: Mask) -> None:
    """Set the masked weights to 0, and let every weight have a gradient, frozen or not."""
    weights: Mapping[str, nn.Parameter] = mask.parameters(copy)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~mask.keep[name].to(weight.device), 0)
            weight.requires_grad_(True)
