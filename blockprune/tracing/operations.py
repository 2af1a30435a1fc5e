"""What functions of torch do, as far as a recording asks, and which modules are one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from blockprune.tracing.recorded import Invocation, Known, Step, knowns

__all__ = [
    "ADDS",
    "ARGUMENTS_OF_TORCH",
    "CHANGES",
    "DATA",
    "GRAD",
    "LAYOUTS",
    "LISTS",
    "RANK",
    "STATE_READERS",
    "is_counted",
    "is_operation",
    "is_product",
    "operands_of",
]

ADDS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
GRAD = frozenset({"grad_fn", "is_leaf", "requires_grad"})
DATA = frozenset(
    {
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__format__",
        "__index__",
        "__int__",
        "__repr__",
        "__str__",
        "allclose",
        "data_ptr",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "storage",
        "tolist",
        "untyped_storage",
    }
)
"""Functions that hand numbers of a tensor, or its memory, to Python."""
_COUNTING = frozenset(
    {
        "argwhere",
        "bincount",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique",
        "unique_consecutive",
    }
)
"""Functions that return as many numbers as meet a condition."""
CHANGES = frozenset(
    {
        "__delete__",
        "__set__",
        "backward",
        "detach_",
        "register_hook",
        "requires_grad_",
        "resize_",
        "retain_grad",
        "set_",
    }
)
"""Methods that change more of a tensor than its numbers."""
ARGUMENTS_OF_TORCH = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(Ellipsis),
)
LAYOUTS = frozenset({"is_mkldnn", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr"})
LISTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"})
"""Functions that return as many tensors as a size says."""
RANK = frozenset({"dim", "ndim", "ndimension"})
STATE_READERS = {
    "is_grad_enabled": "grad",
    "is_inference_mode_enabled": "inference",
    "is_autocast_enabled": "autocast",
    "is_autocast_cpu_enabled": "autocast",
    "_is_any_autocast_enabled": "autocast",
    "get_autocast_dtype": "autocast",
    "get_autocast_gpu_dtype": "autocast",
    "get_autocast_cpu_dtype": "autocast",
}


def is_operation(module: nn.Module) -> bool:
    """Whether a module is one operation: called, and never looked into."""
    if isinstance(module, fx.GraphModule | torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
        return True
    # A parametrized module has a class made for it, by torch.
    kind = parametrize.type_before_parametrizations(module)
    if not kind.__module__.startswith(("torch.nn", "torch.ao")):
        return False
    if isinstance(module, nn.Sequential):
        # An empty one is a way of writing the identity.
        return False
    # A torch.nn class that only arranges others (Sequential, TransformerEncoderLayer) is looked
    # into; one with weights of its own (Conv2d, MultiheadAttention) is one operation.
    return not module._modules or bool(module._parameters)


def is_counted(event: Step | Invocation) -> bool:
    """Whether the shape of a result may depend on the numbers in a tensor."""
    if isinstance(event, Step) and event.kind == "call":
        name = getattr(event.func, "__name__", "")
        if name in _COUNTING or (name == "where" and len(event.args) == 1):
            return True
        if name == "__getitem__" and any(
            known.is_tensor and known.fact.dtype in (torch.bool, torch.uint8)
            for known in knowns(event.args[1:])
        ):
            return True
    return any(known.counted for known in knowns((event.args, event.kwargs)))


def is_product(known: Known) -> bool:
    origin = known.origins[-1][0] if known.origins else None
    return isinstance(origin, Step) and getattr(origin.func, "__name__", "") in ("mul", "div")


def operands_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:2]
