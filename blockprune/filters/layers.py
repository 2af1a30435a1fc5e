"""The layers that may lose filters, what a filter of each costs, and the layers that may not.

A filter of a convolution may go where nothing but layers of the same residual branch sees its
channel: *inner* convolutions. What the last convolution of a branch writes is added to the
residual stream, and so is what a stem or a projection writes, so these keep all filters. That is
read off the graph: a layer qualifies if

* one operand of an addition comes from it and the other does not (it is inside a branch), and
* its channels meet no others, go through nothing but normalisation by channel and operations
  without parameters, and end in ordinary convolutions, index by index.

Cost of the filters removed, with ``n`` filters gone of layer ``l``, ``c`` the cost of one, and
``o`` the cost of one weight position that connects two such layers and would be counted twice::

    cost = sum over l of  n_l c_l  -  sum over l read by m of  n_l n_m o_lm
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockprune.filters.dependencies import Channels, Network, follow
from blockprune.tracing import as_call

__all__ = ["FilterLayer", "FilterRefusal", "filter_layers", "filter_refusals"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class FilterLayer:
    """A convolution that may lose filters.

    Attributes:
        name: qualified name of the convolution.
        filters: how many it has.
        params: parameters that vanish with one filter: its own, those of the normalisation of its
            channel, and those that read the channel.
        macs: multiply-accumulate operations that vanish with one filter, for the batch followed.
        axes: name of each tensor of the state that holds a slice of every filter, to its axis.
        norms: names of the normalisations that its channels run through.
        readers: names of the convolutions that read its channels.
        shared: name of a reader that may lose filters as well, to the parameters and the MACs that
            a filter here and one there have in common.
    """

    name: str
    filters: int
    params: int
    macs: int
    axes: Mapping[str, int]
    norms: tuple[str, ...]
    readers: tuple[str, ...]
    shared: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class FilterRefusal:
    """A convolution that keeps all of its filters.

    Attributes:
        name: qualified name.
        reason: "outside" any residual branch, "merged", "returned", "grouped", "reshaped",
            "unread", "shared" or "custom".
        detail: one sentence.
    """

    name: str
    reason: str
    detail: str


def filter_layers(model: nn.Module, example_inputs: Any) -> tuple[FilterLayer, ...]:
    """Return the layers that may lose filters without any residual stream changing its shape.

    Args:
        model: any module; a copy of it is run once, in evaluation mode.
        example_inputs: a Tensor, a tuple of arguments or a dict of keywords; MACs are those of
            this batch.

    Returns:
        The inner convolutions of residual branches, in order of execution; none where the model
        has no residual branch. `filter_refusals` tells of the others.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        TraceError: the model does not run on the inputs, or cannot be followed.

    Example:
        >>> import torch
        >>> from blockprune.filters import filter_layers
        >>> from blockprune.models import resnet20
        >>> layers = filter_layers(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> len(layers), layers[0].name, layers[0].filters, layers[0].params
        (9, 'layer1.0.conv1', 16, 291)

    Source: Fang et al., "DepGraph: towards any structural pruning", 2023 (dependency groups).
    """
    return _analysed(model, example_inputs)[0]


def filter_refusals(model: nn.Module, example_inputs: Any) -> tuple[FilterRefusal, ...]:
    """Return the convolutions that `filter_layers` leaves out, each with the reason.

    Raises:
        MissingExtraError, TraceError: as `filter_layers` does.

    Example:
        >>> import torch
        >>> from blockprune.filters import filter_refusals
        >>> from blockprune.models import resnet20
        >>> refusals = filter_refusals(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> refusals[0].name, refusals[0].reason
        ('conv1', 'merged')
    """
    return _analysed(model, example_inputs)[1]


def _analysed(
    model: nn.Module, example_inputs: Any
) -> tuple[tuple[FilterLayer, ...], tuple[FilterRefusal, ...]]:
    network = follow(model, as_call(model, example_inputs))
    inside = network.inside_branches()
    shared = _shared_modules(network)
    found: dict[str, Channels] = {}
    refusals = []
    for name in network.executions:
        if isinstance(network.model.get_submodule(name), nn.modules.conv._ConvNd):
            verdict = _verdict(network, name, inside, shared)
            if isinstance(verdict, Channels):
                found[name] = verdict
            else:
                refusals.append(verdict)
    layers = tuple(_layer(network, name, channels, found) for name, channels in found.items())
    return layers, tuple(refusals)


def _verdict(
    network: Network, name: str, inside: set[str], shared: set[str]
) -> Channels | FilterRefusal:
    convolution = network.model.get_submodule(name)
    if not _is_ordinary(convolution):
        groups = getattr(convolution, "groups", 1)
        if isinstance(convolution, CONVOLUTIONS) and groups > 1:
            return FilterRefusal(name, "grouped", f"its filters stand in {groups} groups.")
        kind = type(convolution).__name__
        return FilterRefusal(name, "custom", f"a {kind} does not use its weight as it is.")
    if not network.is_followed(name):
        detail = "no way from it to an output is recorded: it runs under no_grad, or is detached."
        return FilterRefusal(name, "outside", detail)
    channels = network.channels_of(name)
    if channels.is_merged:
        return FilterRefusal(
            name, "merged", "its channels are added to others, multiplied or joined."
        )
    if channels.is_returned:
        return FilterRefusal(name, "returned", "its channels are an output of the model.")
    if name not in inside:
        return FilterRefusal(name, "outside", "it is in no branch of an addition.")
    if not channels.readers:
        return FilterRefusal(name, "unread", "no layer reads its channels.")
    if not channels.is_plain:
        detail = "its channels are joined, split or moved before they are read."
        return FilterRefusal(name, "reshaped", detail)
    twice = [other for other in channels.modules if other in shared]
    if twice:
        detail = f"{twice[0]} runs more than once, or shares its parameters."
        return FilterRefusal(name, "shared", detail)
    return _foreign(network, name, channels) or channels


def _foreign(network: Network, name: str, channels: Channels) -> FilterRefusal | None:
    """Return the refusal for the first module that would mix channels, or cannot be cut."""
    filters = network.convolution(name).out_channels
    for other in channels.modules:
        module = network.model.get_submodule(other)
        if other in channels.readers:
            fits = _is_ordinary(module) and module.in_channels == filters
        else:
            fits = other == name or isinstance(module, nn.modules.batchnorm._BatchNorm)
            # One slope for all channels.
            fits = fits or all(p.numel() == 1 for p in module.parameters())
        if not fits:
            detail = f"its channels run through {other}, a {type(module).__name__}."
            reason = "grouped" if getattr(module, "groups", 1) not in (1, None) else "custom"
            return FilterRefusal(name, reason, detail)
    return None


def _is_ordinary(module: nn.Module) -> bool:
    """Whether a module is torch's own convolution of one group, its weight a plain parameter."""
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == 1
        and any(type(module).forward is kind.forward for kind in CONVOLUTIONS)
        and "weight" in module._parameters
        and not module._forward_pre_hooks
    )


def _shared_modules(network: Network) -> set[str]:
    """Return the modules that run more than once, or one of whose parameters another one has."""
    model = network.model
    # Not each module once: one under two names has two names in the state as well.
    every = [module for _, module in model.named_modules(remove_duplicate=False)]
    owners = Counter(id(p) for module in every for p in module._parameters.values())
    return {
        name
        for name, module in model.named_modules()
        if (name in network.executions and network.executions[name].calls > 1)
        or any(p is not None and owners[id(p)] > 1 for p in module._parameters.values())
    }


def _layer(
    network: Network, name: str, channels: Channels, found: Mapping[str, Channels]
) -> FilterLayer:
    modules = {other: network.model.get_submodule(other) for other in channels.modules}
    norms = [n for n, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    axes = {f"{name}.{key}": 0 for key in modules[name].state_dict()}
    for norm in norms:
        axes.update({f"{norm}.{k}": 0 for k, t in modules[norm].state_dict().items() if t.dim()})
    axes.update({f"{reader}.weight": 1 for reader in channels.readers})
    tensors = network.model.state_dict()
    parameters = {key for key, _ in network.model.named_parameters()}
    filters = network.convolution(name).out_channels
    params = sum(tensors[key].numel() // filters for key in axes if key in parameters)
    macs = network.convolution(name).in_channels * math.prod(_taps_and_positions(network, name))
    for reader in channels.readers:
        macs += network.convolution(reader).out_channels * math.prod(
            _taps_and_positions(network, reader)
        )
    shared = {}
    for reader in channels.readers:
        if reader in found:
            taps, positions = _taps_and_positions(network, reader)
            shared[reader] = (taps, taps * positions)
    return FilterLayer(name, filters, params, macs, axes, tuple(norms), channels.readers, shared)


def _taps_and_positions(network: Network, name: str) -> tuple[int, int]:
    """Return the size of a convolution's kernel and how often it is applied, over the batch."""
    convolution = network.convolution(name)
    outputs = math.prod(network.executions[name].shape)
    return math.prod(convolution.kernel_size), outputs // convolution.out_channels
