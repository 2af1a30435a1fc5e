"""Activations that do nothing the second time, and when one has been applied already.

A clamp to [low, high] (ReLU, ReLU6, Hardtanh) is the identity on values that such a clamp to a
range within [low, high] has produced, in value and in gradient: where the inner one saturates, its
own gradient is zero already. Max-pooling keeps values in their range, so it may stand in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from blockprune.blocks.flow import Flow, input_of

__all__ = ["clamped_range", "is_already_applied"]

_RELU = (torch.relu, torch.relu_, F.relu, F.relu_)
_MAX_POOL_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_MAX_POOL_FUNCTIONS = (
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
)


def clamped_range(node: fx.Node, flow: Flow) -> tuple[float, float] | None:
    """Return the range that `node` clamps its first argument to, or None where it is no clamp."""
    module = flow.module(node)
    if type(module) is nn.ReLU:
        return (0.0, math.inf)
    if type(module) is nn.ReLU6:
        return (0.0, 6.0)
    if type(module) is nn.Hardtanh:
        return (module.min_val, module.max_val)
    if node.op == "call_function" and node.target in _RELU:
        return (0.0, math.inf)
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return (0.0, math.inf)
    if node.op == "call_function" and node.target is F.relu6:
        return (0.0, 6.0)
    if node.op == "call_function" and node.target in (F.hardtanh, F.hardtanh_):
        low = _argument(node, 1, "min_val", -1.0)
        high = _argument(node, 2, "max_val", 1.0)
        if isinstance(low, int | float) and isinstance(high, int | float):
            return (float(low), float(high))
    return None


def is_already_applied(node: fx.Node, flow: Flow, replaced: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether the clamp `node` is the identity once the nodes in `replaced` are gone."""
    wanted = clamped_range(node, flow)
    source = input_of(node)
    while wanted is not None and source is not None:
        source = flow.origin(source, replaced)
        found = clamped_range(source, flow)
        if found is not None:
            within = wanted[0] <= found[0] and found[1] <= wanted[1]
            return within and not _is_overwritten(source, node, flow, replaced)
        if not _is_max_pool(source, flow) or _is_overwritten(source, node, flow, replaced):
            return False
        source = input_of(source)
    return False


def _is_overwritten(
    value: fx.Node, reader: fx.Node, flow: Flow, replaced: Mapping[fx.Node, fx.Node]
) -> bool:
    gone = {flow.index[node] for node in replaced}
    writers = flow.writers_after(flow.storages(value), flow.index[value], flow.index[reader])
    return any(writer not in gone for writer in writers)


def _is_max_pool(node: fx.Node, flow: Flow) -> bool:
    module = flow.module(node)
    is_pool = isinstance(module, _MAX_POOL_MODULES) or (
        node.op == "call_function" and node.target in _MAX_POOL_FUNCTIONS
    )
    # With return_indices the value is a pair, and no single tensor.
    return is_pool and flow.fact(node) is not None


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
