"""What a model costs, and what each block of it: parameters, MACs, activation bytes.

*MACs* are multiply-accumulate operations: convolution, linear, matrix product, einsum, recurrent
layers and attention (scaled dot product and `nn.MultiheadAttention`, both products of each
head). Normalisation, pooling, activation and element-wise arithmetic count 0. Counted by fvcore
on the evaluation forward, for the batch that is given.

*Activation bytes* are the bytes of every floating-point tensor that a torch function called from
the model's code returns, each call counted once, whether its result is new memory, a view or its
own argument overwritten. It is the papers' "sum of all layer outputs": an upper bound on what
a forward pass with gradients keeps, not the peak of an allocator (see `blockprune.profiling`).

A block's costs are those of the operations that vanish with it, each counted alone on zeros of
the traced shapes, so that over a whole graph they add up to the costs of the model.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from blockprune.blocks import BlockAnalysis
from blockprune.errors import TraceError, raise_if_out_of_memory
from blockprune.tracing import (
    Call,
    Region,
    TensorFact,
    as_call,
    copy_of_state,
    isolated,
    map_tensors,
    structural_copy,
    tensors_in,
)

with warnings.catch_warnings():
    # Importing fvcore.nn compiles its focal loss, which nobody here uses.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_jit, get_shape

__all__ = [
    "Costs",
    "UncountedWarning",
    "block_costs",
    "model_costs",
    "node_costs",
    "paper_memory_bytes",
]

Shape = tuple[int, ...]


class UncountedWarning(UserWarning):
    """An operation could not be run alone, so its costs are counted as 0."""


@dataclass(frozen=True)
class Costs:
    """What a model, a block or an operation costs.

    Attributes:
        params: parameters (elements); each shared one once, buffers not counted.
        macs: multiply-accumulate operations of one forward pass.
        activation_bytes: sum of the sizes of all layer outputs of one forward pass, in bytes.
    """

    params: int
    macs: int
    activation_bytes: int


def model_costs(model: nn.Module, example_inputs: Any) -> Costs:
    """Return the costs of one evaluation forward of `model` on `example_inputs`.

    Args:
        model: any module; a copy of it is run, and nothing of it changes.
        example_inputs: a Tensor, a tuple of arguments or a dict of keywords. Costs are those of
            this batch: for the papers' figures, give a batch of 1.

    Raises:
        TraceError: the model does not run on the inputs, or torch.jit cannot follow it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model_costs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 4, 4))
        Costs(params=224, macs=3456, activation_bytes=512)
    """
    call = as_call(model, example_inputs)
    params = sum(parameter.numel() for parameter in model.parameters())
    with isolated():
        try:
            # A forward may write into its input.
            own = call.map(lambda tensor: tensor.detach().clone())
            used = _measure(structural_copy(model), own)
        except TraceError:
            raise
        except Exception as error:
            raise_if_out_of_memory(error)
            shapes = [tuple(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
            raise TraceError(
                f"the operations of {type(model).__name__} cannot be counted on inputs of shape "
                f"{', '.join(map(str, shapes)) or '(none)'}: {type(error).__name__}: {error}. "
                "Pass example_inputs that the model's own forward accepts."
            ) from error
    return Costs(params, used.macs, used.activation_bytes)


def block_costs(analysis: BlockAnalysis) -> dict[str, Costs]:
    """Return, for each block in order of execution, what vanishes when it alone goes.

    `params` is `block.params`; MACs and activation bytes are those of
    `analysis.removed_nodes([name])`, for the batch that was analysed. A block in a module that
    is traced by itself and called many times (an iterative decoder) is counted for one call.

    Raises:
        BlockpruneError: what the analysis raises.

    Example:
        >>> import torch
        >>> from blockprune.blocks import find_blocks
        >>> from blockprune.models import resnet20
        >>> analysis = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
        >>> {costs.macs for costs in block_costs(analysis).values()}
        {4718592}
    """
    counters = {region.path: NodeCounter(region) for region in analysis.traced.regions}
    table = {}
    with isolated():
        for block in analysis.blocks:
            macs = activation_bytes = 0
            for path, nodes in analysis.removed_nodes([block.name]).items():
                for node in nodes:
                    used = counters[path].count(node)
                    macs += used.macs
                    activation_bytes += used.activation_bytes
            table[block.name] = Costs(block.params, macs, activation_bytes)
    return table


def node_costs(region: Region) -> dict[fx.Node, Costs]:
    """Return the costs of each operation of a traced region, its parameters not counted.

    Over the one region of a model whose root traces, they sum to `model_costs`.

    Warns:
        UncountedWarning: an operation that refuses zeros; it is counted as 0.
    """
    counter = NodeCounter(region)
    with isolated():
        counted = {node: counter.count(node) for node in region.graph.nodes}
    return {node: Costs(0, used.macs, used.activation_bytes) for node, used in counted.items()}


def paper_memory_bytes(model: nn.Module, example_inputs: Any) -> int:
    """Return the memory figure of the papers' tables for a float32 model and a batch of 1.

    4 bytes x (all layer outputs + all parameters), as Keras summaries count them: statistics of
    batch normalisation are parameters, and the input layer is one value.

    Example:
        >>> import torch
        >>> from blockprune.models import resnet32
        >>> paper_memory_bytes(resnet32(), torch.zeros(1, 3, 32, 32))
        6141268
    """
    state = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    held = sum(tensor.numel() * tensor.element_size() for tensor in state)
    return model_costs(model, example_inputs).activation_bytes + held + 4


@dataclass(frozen=True)
class Used:
    macs: int = 0
    activation_bytes: int = 0


class _OutputBytes(TorchFunctionMode):
    """Adds up the bytes that torch functions return; what they call in turn is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if tensor.is_floating_point() or tensor.is_complex():
                # Under torch.jit's tracing a size is a tensor; int() takes it out of the trace.
                self.total += math.prod(int(n) for n in tensor.shape) * tensor.element_size()
        return result


class _Runner(nn.Module):
    """Calls a module with tensors as flat positional arguments, and returns its tensors flat.

    torch.jit's tracing passes nothing else, and drops operations whose results are not returned.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((call.args, call.kwargs))
        self.seen = _OutputBytes()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return each tensor once: a forward may ask whether its key *is* its value."""
        return tuple({id(leaf): leaf for leaf in self.leaves if isinstance(leaf, Tensor)}.values())

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = {id(leaf): t for leaf, t in zip(self.tensors(), tensors, strict=True)}
        leaves = [given.get(id(leaf), leaf) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with self.seen:
            outputs = self.module(*args, **kwargs)
        return list(tensors_in(outputs))


class _Function(nn.Module):
    """A module around a function, so that fvcore can count it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _measure(module: nn.Module, call: Call) -> Used:
    """Count one evaluation forward of a module that is ours to run and hook."""
    runner = _Runner(module.eval(), call)
    counter = FlopCountAnalysis(runner, runner.tensors())
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # While torch.jit traces, sizes are tensors, and a forward that builds on them gets warned.
    counter.tracer_warnings("none")
    counter.clear_op_handles().set_op_handle(**_HANDLERS)
    with torch.no_grad():
        macs = counter.total()
    return Used(int(macs), runner.seen.total)


class NodeCounter:
    """Counts the nodes of one region; equal operations on equal shapes are run once."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._known: dict[Any, Used] = {}
        self._modules: dict[str, Any] = {}

    def count(self, node: fx.Node) -> Used:
        if node.op not in ("call_module", "call_function", "call_method"):
            return Used()
        if not any(True for _ in tensors_in(self.region.values[node], TensorFact)):
            return Used()
        values, position = self.region.values, {n: i for i, n in enumerate(node.all_input_nodes)}
        facts = fx.map_arg((node.args, node.kwargs), lambda n: (position[n], values[n]))
        key = (node.op, self._target_key(node), repr(facts))
        if key not in self._known:
            self._known[key] = self._run(node)
        return self._known[key]

    def _run(self, node: fx.Node) -> Used:
        values = self.region.values
        zeros = {
            n: map_tensors(values[n], _zeros, TensorFact, copy_of_state)
            for n in node.all_input_nodes
        }
        args, kwargs = fx.map_arg((node.args, node.kwargs), zeros.__getitem__)
        try:
            # map() also thaws the graph's immutable lists, which a function may write into.
            return _measure(self._callable(node), Call(args, kwargs).map(lambda tensor: tensor))
        except Exception as error:
            raise_if_out_of_memory(error)
            warnings.warn(
                f"operation {node.name!r} ({node.format_node()}) does not run on zeros "
                f"({type(error).__name__}: {error}); its costs are counted as 0.",
                UncountedWarning,
                stacklevel=2,
            )
            return Used()

    def _callable(self, node: fx.Node) -> nn.Module:
        if node.op == "call_module":
            return structural_copy(self.region.module.get_submodule(str(node.target)))
        if node.op == "call_function":
            assert callable(node.target)
            return _Function(node.target)
        method = str(node.target)
        return _Function(lambda owner, *args, **kwargs: getattr(owner, method)(*args, **kwargs))

    def _target_key(self, node: fx.Node) -> Any:
        if node.op != "call_module":
            return node.target
        name = str(node.target)
        if name not in self._modules:
            self._modules[name] = _configuration(self.region.module.get_submodule(name))
        return self._modules[name]


def _zeros(fact: TensorFact) -> Tensor:
    return torch.zeros(fact.shape, dtype=fact.dtype, device=fact.device)


def _configuration(module: nn.Module) -> tuple[Any, ...]:
    """Describe a module so that equal descriptions mean equal costs on equal inputs.

    Plain attributes count by value, tensors by shape, and anything else by identity: a needless
    second count is cheap, a wrong shared one is not.
    """
    described: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        described.append((name, type(child)))
        for attribute, value in vars(child).items():
            if attribute not in ("_modules", "training"):
                described.append((attribute, _described(value)))
    return tuple(described)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict):
        return tuple((str(key), _described(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_described(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(map(str, value))
    if isinstance(value, int | float | str | bytes | None):
        return (type(value), value)
    return id(value)


# --- one handler for each kind of operation, on the values of a torch.jit graph ---------------


def _shape(value: Any) -> Shape:
    return tuple(get_shape(value) or ())


def _product_over(operand: int) -> Callable[[list[Any], list[Any]], int]:
    """Count a matrix product whose first matrix is input `operand`: its last axis is summed."""

    def handler(inputs: list[Any], outputs: list[Any]) -> int:
        return math.prod(_shape(outputs[0])) * _shape(inputs[operand])[-1]

    return handler


def _summed_product(inputs: list[Any], outputs: list[Any]) -> int:
    """Count addbmm: (B, N, K) by (B, K, M), summed over B too."""
    return math.prod(_shape(inputs[1])) * _shape(inputs[2])[-1]


def _tensordot(inputs: list[Any], outputs: list[Any]) -> int:
    """Count A*K by K*B elements giving A*B: A*B*K is the root of the three sizes' product."""
    sizes = [math.prod(_shape(value)) for value in (inputs[0], inputs[1], outputs[0])]
    return math.isqrt(math.prod(sizes))


def _bilinear(inputs: list[Any], outputs: list[Any]) -> int:
    """Count `sum_ij x_i w_oij y_j`, computed as `(x w) y`."""
    out, left, right = _shape(inputs[2])
    rows = math.prod(_shape(outputs[0])) // max(out, 1)
    return rows * out * right * (left + 1)


def _convolution_by_name(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a convolution that is never transposed (padding as a word, deformable)."""
    return math.prod(_shape(outputs[0])) * math.prod(_shape(inputs[1])[1:])


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count (..., L, E) x (..., S, E) and (..., L, S) x (..., S, V) for every query head."""
    query, key, value = (_shape(operand) for operand in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(inputs: list[Any], outputs: list[Any]) -> int:
    """Count one product with each weight matrix a time step; the matrices come in a list."""
    steps = math.prod(_shape(inputs[0])[:-1])
    lists = [value.node().inputs() for value in inputs if value.type().kind() == "ListType"]
    weights = [_shape(item) for items in lists for item in items]
    return steps * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the pairwise products from left to right, as torch forms them."""
    equation = inputs[0].toIValue().replace(" ", "")
    left, arrow, right = equation.partition("->")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    operands = [
        _axes(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)
    ]
    sizes: dict[str, int] = {}
    for axes, shape in zip(operands, shapes, strict=True):
        for axis, size in zip(axes, shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    if arrow:
        result = set(_axes(right, len(_shape(outputs[0]))))
    else:
        times = Counter(axis for axes in operands for axis in axes)
        result = {axis for axis, n in times.items() if n == 1 or axis.isdigit()}
    macs = 0
    joined = set(operands[0])
    for position, axes in enumerate(operands[1:], start=1):
        needed = result.union(*operands[position + 1 :])
        # An axis of one operand alone that nothing needs is summed away before the product.
        kept = (joined & set(axes)) | ((joined | set(axes)) & needed)
        macs += math.prod(sizes[axis] for axis in kept)
        joined = kept & needed
    return macs


def _axes(term: str, rank: int) -> list[str]:
    """Name the axes of one einsum term; those under the ellipsis are numbered from the right."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(str(n) for n in range(hidden, 0, -1)), *after]


_HANDLERS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "aten::_convolution": conv_flop_jit,
    "aten::_convolution_mode": _convolution_by_name,
    "torchvision::deform_conv2d": _convolution_by_name,
    "aten::linear": _product_over(0),
    "aten::matmul": _product_over(0),
    "aten::mm": _product_over(0),
    "aten::bmm": _product_over(0),
    "aten::mv": _product_over(0),
    "aten::dot": _product_over(0),
    "aten::inner": _product_over(0),
    "aten::addmm": _product_over(1),
    "aten::addmm_": _product_over(1),
    "aten::addmv": _product_over(1),
    "aten::baddbmm": _product_over(1),
    "aten::baddbmm_": _product_over(1),
    "aten::addbmm": _summed_product,
    "aten::tensordot": _tensordot,
    "aten::bilinear": _bilinear,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
    "aten::rnn_tanh": _recurrent,
    "aten::rnn_relu": _recurrent,
}
