"""Copies: of a model, a whole one to cut and a structural one to try out; and of a graph.

Nothing in this package runs the user's own model object: a forward may write attributes,
count calls or fire hooks. It runs copies, and the dense model stays as it was.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.errors import TraceError
from blockprune.randomness import preserved_rng

__all__ = [
    "aliased_copy",
    "copy_graph",
    "copy_model",
    "isolated",
    "mark_as_writing",
    "structural_copy",
    "writes_weights",
]

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_WRITING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules whose forward was seen to write into weights: their copies have weights of their own."""


def mark_as_writing(model: nn.Module) -> None:
    """Remember that the forward of `model`, or of a module inside, writes into its weights."""
    for module in model.modules():
        _WRITING.add(module)


def writes_weights(model: nn.Module) -> bool:
    """Whether the forward of `model` was seen to write into its weights."""
    return model in _WRITING


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model` with tensors of its own; modes and hooks are kept."""
    return _adopt_plain_tensors(_deepcopy(model, _detached_attributes(model)))


def structural_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its parameters and owns its buffers.

    It costs next to no memory. Where the forward was seen to write into weights, the copy has its
    own. User hooks are left behind, so that running the copy is seen by
    nobody; hooks that torch itself defines (weight norm, spectral norm, pruning masks) compute
    weights, and stay.
    """
    memo = _detached_attributes(model)
    if not writes_weights(model):
        for parameter in model.parameters():
            memo[id(parameter)] = parameter
    for module in model.modules():
        for kind in _FORWARD_HOOKS:
            hooks = getattr(module, kind)
            if hooks:
                memo[id(hooks)] = OrderedDict(
                    (key, copy.deepcopy(hook))
                    for key, hook in hooks.items()
                    if type(hook).__module__.startswith("torch.")
                )
    copied = _adopt_plain_tensors(_deepcopy(model, memo))
    if writes_weights(model):
        mark_as_writing(copied)
    return copied


def aliased_copy(model: nn.Module) -> nn.Module:
    """Return a structural copy with parameters of its own that lie in the memory of `model`'s.

    For those who differentiate and do not write: hooks on the parameters stay behind.
    """
    memo: dict[int, Any] = {}
    for parameter in () if writes_weights(model) else model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    return copy.deepcopy(structural_copy(model), memo)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of `graph` with the same node names, and the map from old nodes to new."""
    copy, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, twins))
    return copy, twins


_ONE_AT_A_TIME = threading.RLock()
"""What a block in `isolated` changes, and gives back afterwards, is the whole process's."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Run a block with every random generator put back afterwards, and as plain eager code.

    The fused "fast path" of `nn.MultiheadAttention` exists only outside autograd, so it would make
    two computations of one function differ; compiled modules cannot be traced; and inference mode
    hides who writes into what. All three are switched off in here. Other threads wait.
    """
    with _ONE_AT_A_TIME:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        # It logs a traceback for an operation that is then run on real tensors.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, log.disabled = log.disabled, True
        try:
            with (
                preserved_rng(),
                torch.inference_mode(False),
                torch.compiler.set_stance("force_eager"),
            ):
                yield
        finally:
            log.disabled = was_disabled
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _detached_attributes(model: nn.Module) -> dict[int, Any]:
    """Return a deepcopy memo for computed tensors kept as attributes, which deepcopy refuses."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module.__dict__.values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def _adopt_plain_tensors(model: nn.Module) -> nn.Module:
    """Turn tensors kept as plain attributes into buffers that are not part of the state.

    A graph can fetch a buffer, and `.to()` moves it; a plain attribute is known to Python only.
    """
    for module in model.modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, value in list(module.__dict__.items()):
            # A class's attribute of that name would hide a buffer.
            if isinstance(value, Tensor) and not hasattr(type(module), name):
                del module.__dict__[name]
                module.register_buffer(name, value, persistent=False)
    return model


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    remembering: list[tuple[nn.Module, str, FunctionType]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            # A module has a dozen registries that are empty as a rule, which deepcopy is slow at.
            if type(value) in (dict, OrderedDict, set) and not value:
                memo.setdefault(id(value), type(value)())
            elif type(value) is FunctionType and value.__closure__:
                remembering.append((module, name, value))
    try:
        copied: nn.Module = copy.deepcopy(model, memo)
        for module, name, function in remembering:
            attributes = vars(memo[id(module)])
            if attributes.get(name) is function:
                attributes[name] = _rebound(function, memo)
        return copied
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). "
            "blockprune never works on your own object, so the model must support "
            "copy.deepcopy: move locks, files, generators and the like out of its modules."
        ) from error


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function whose variables from around it are the copies of what they were.

    `copy.deepcopy` hands on a lambda as it is, which then runs modules of the model itself.
    """
    before = function.__closure__ or ()
    cells = tuple(CellType() for _ in before)
    named = function.__globals__, function.__name__, function.__defaults__
    memo[id(function)] = bound = FunctionType(function.__code__, *named, cells)
    bound.__kwdefaults__, bound.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(bound).update(vars(function))
    for cell, old in zip(cells, before, strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            value = old.cell_contents
            if isinstance(value, FunctionType) and value.__closure__:
                value = memo.get(id(value)) or _rebound(value, memo)
            elif isinstance(value, MethodType) and id(value.__self__) in memo:
                value = MethodType(value.__func__, memo[id(value.__self__)])
            elif isinstance(value, nn.Module | Tensor):
                value = memo.get(id(value), value)
            cell.cell_contents = value
    return bound
