"""`remove_filters`: from a plan to a verified, physically narrower network."""

from __future__ import annotations

from typing import Any

from torch import nn

from blockprune.errors import StalePlanError, close_names, memory_errors
from blockprune.filters.layers import FilterLayer, filter_layers
from blockprune.filters.plans import FilterPlan
from blockprune.filters.slicing import fitted_filters
from blockprune.filters.verifying import proof_of_filters
from blockprune.tracing import as_call, copy_model, isolated

__all__ = ["remove_filters"]


def remove_filters(
    model: nn.Module, plan: FilterPlan, example_inputs: Any, *, verify: bool = True
) -> nn.Module:
    """Return a narrower copy of `model`, in which the filters of `plan` are gone.

    It equals the dense model in which every layer that read the channel of a removed filter reads
    zeros there: in outputs, in gradients of the kept parameters and in running statistics, in eval
    and in train mode. Zero is what the *reader* sees: a filter of zeros would still leave the shift
    of the normalisation behind it. Dropout between the two draws anew, for fewer channels.

    The copy is of the model's own class, and has its names, modes, device, dtype and
    `requires_grad`. The dense model is left untouched.

    Args:
        model: that the plan was made for.
        plan: from `make_filter_plan`.
        example_inputs: a Tensor, a tuple of arguments or a dict of keywords.
        verify: prove the equality on `example_inputs` before returning.

    Raises:
        StalePlanError: the plan was made for a model of another structure.
        VerificationError: the result is not equal to its reference; nothing is returned.
        MissingExtraError: torch-pruning is not installed.
        TraceError: the model does not run on the inputs, or cannot be followed.

    Example:
        >>> import torch
        >>> from blockprune.filters import (
        ...     filter_layers, filter_scores, make_filter_plan, remove_filters
        ... )
        >>> from blockprune.models import resnet20
        >>> model, images = resnet20(), torch.rand(2, 3, 8, 8)
        >>> scores = filter_scores(model, "l1", None, example_inputs=images)
        >>> plan = make_filter_plan(filter_layers(model, images), scores, count=9, seed=1)
        >>> narrow = remove_filters(model, plan, images)
        >>> sum(p.numel() for p in model.parameters()) - plan.params == sum(
        ...     p.numel() for p in narrow.parameters()
        ... )
        True
    """
    layers = _layers_of(plan, model, example_inputs)
    # Tensors made in inference mode could never be trained.
    with isolated(), memory_errors():
        narrow = copy_model(model)
        _cut(narrow, plan, layers)
    if verify:
        proof_of_filters(model, plan, layers, as_call(model, example_inputs)).of(narrow)
    return narrow


def _layers_of(plan: FilterPlan, model: nn.Module, example_inputs: Any) -> list[FilterLayer]:
    """Return the layers that the plan cuts.

    Raises:
        StalePlanError: the model has them not, or others.
    """
    known = {layer.name: layer for layer in filter_layers(model, example_inputs)}
    for name, cut in plan.cuts.items():
        if name not in known:
            raise StalePlanError(
                f"the plan cuts layer {name!r}, and this {type(model).__name__} has none of that "
                f"name that may lose filters.{close_names(name, known)} Make a plan for this model."
            )
        found = known[name]
        if found.filters != cut.filters or dict(found.axes) != cut.axes:
            raise StalePlanError(
                f"the plan was made for a model whose layer {name!r} has {cut.filters} filters, "
                f"held by {', '.join(cut.axes)}; in this {type(model).__name__} it has "
                f"{found.filters}, held by {', '.join(found.axes)}. Make a plan for this model."
            )
    return [known[name] for name in plan.cuts]


def _cut(model: nn.Module, plan: FilterPlan, layers: list[FilterLayer]) -> None:
    """Take the filters out of a model that is ours."""
    keys = {key for cut in plan.cuts.values() for key in cut.axes}
    state = fitted_filters({k: t for k, t in model.state_dict().items() if k in keys}, plan)
    for key, tensor in state.items():
        path, _, attribute = key.rpartition(".")
        owner = model.get_submodule(path)
        whole = owner._parameters.get(attribute)
        if whole is None:
            owner._buffers[attribute] = tensor
        else:
            owner._parameters[attribute] = nn.Parameter(tensor, whole.requires_grad)
    modules: dict[str, Any] = dict(model.named_modules())
    for layer in layers:
        kept = len(plan.cuts[layer.name].kept)
        modules[layer.name].out_channels = kept
        for norm in layer.norms:
            modules[norm].num_features = kept
        for reader in layer.readers:
            modules[reader].in_channels = kept
