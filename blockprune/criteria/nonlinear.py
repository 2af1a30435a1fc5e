"""Which operations are activation functions: the pointwise ones with a bend at or near zero."""

from __future__ import annotations

from torch import fx, nn

from blockprune.blocks import Flow

__all__ = ["NONLINEAR_NAMES", "is_nonlinear"]

NONLINEAR_MODULES = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
)
# Of functions and of tensor methods, in place or not.
NONLINEAR_NAMES = frozenset(
    name + ending
    for ending in ("", "_")
    for name in (
        "celu",
        "elu",
        "gelu",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "silu",
        "softplus",
    )
)


def is_nonlinear(node: fx.Node, flow: Flow) -> bool:
    """Whether `node` applies an activation function, as a module, a function or a method."""
    if node.op == "call_module":
        return isinstance(flow.module(node), NONLINEAR_MODULES)
    if node.op == "call_method":
        return node.target in NONLINEAR_NAMES
    return node.op == "call_function" and getattr(node.target, "__name__", "") in NONLINEAR_NAMES
