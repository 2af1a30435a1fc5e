"""Which layers share the channels of a convolution. The only user of torch-pruning.

torch-pruning follows the graph that autograd records, so a model need not trace. It tells, for
the filters of one convolution, every module and operation that their channels run through.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from blockprune.errors import MissingExtraError, TraceError, raise_if_out_of_memory
from blockprune.tracing import Call, aliased_copy, isolated, refused, tensors_in

__all__ = ["Channels", "Execution", "Network", "follow"]


@dataclass
class Execution:
    """How a module ran: the size of its last output, and how often it was called."""

    shape: tuple[int, ...] = ()
    calls: int = 0


@dataclass(frozen=True)
class Channels:
    """What the channels of one convolution run through.

    Attributes:
        modules: qualified names, the convolution included.
        readers: those of them that take the channels in.
        is_plain: each channel goes on as one channel of the same index, all of them together.
        is_merged: they meet others, in an addition or a product.
        is_returned: the model returns them.
    """

    modules: tuple[str, ...]
    readers: tuple[str, ...]
    is_plain: bool
    is_merged: bool
    is_returned: bool


@dataclass
class Network:
    """A model that was followed once.

    Attributes:
        model: the copy of it that was run.
        executions: by name of module, in order of execution.
        graph: torch-pruning's own.
    """

    model: nn.Module
    executions: dict[str, Execution] = field(default_factory=dict)
    graph: Any = None

    def convolution(self, name: str) -> nn.modules.conv._ConvNd:
        """Return the convolution of that name."""
        return cast(nn.modules.conv._ConvNd, self.model.get_submodule(name))

    def is_followed(self, name: str) -> bool:
        """Whether the graph knows the module of that name: autograd has to record it."""
        return self.model.get_submodule(name) in self.graph.module2node

    def channels_of(self, name: str) -> Channels:
        """Return what the filters of the convolution of that name run through."""
        convolution = self.convolution(name)
        count = convolution.out_channels
        function = self.graph.get_pruner_of_module(convolution).prune_out_channels
        group = self.graph.get_pruning_group(convolution, function, list(range(count)))
        names = {module: path for path, module in self.model.named_modules()}
        modules, readers = [], []
        is_plain, is_merged, is_returned = True, False, False
        for dependency, indices in group:
            node = dependency.target
            is_plain &= list(indices) == list(range(count))
            if node.module not in names:
                is_merged |= len(node.inputs) > 1
                is_returned |= "_OutputOp" in str(node.module)
                # A parameter that no known layer owns.
                is_plain &= not isinstance(node.module, Tensor)
                continue
            modules.append(names[node.module])
            takes_in = self.graph.is_in_channel_pruning_fn(dependency.handler)
            if takes_in and not self.graph.is_out_channel_pruning_fn(dependency.handler):
                readers.append(names[node.module])
        return Channels(tuple(modules), tuple(readers), is_plain, is_merged, is_returned)

    def inside_branches(self) -> set[str]:
        """Return the modules that one of two summands comes from, where both have one source."""
        names = {module: path for path, module in self.model.named_modules()}
        inside: set[str] = set()
        for node in self.graph.module2node.values():
            if len(node.inputs) == 2 and "AddBackward" in str(node.module):
                one, other = (_ancestors(side) for side in node.inputs)
                # A position table, say, comes from nowhere else.
                if one & other:
                    apart = [found.module for found in one ^ other]
                    inside |= {names[module] for module in apart if module in names}
        return inside


def follow(model: nn.Module, call: Call) -> Network:
    """Run a copy of `model` once, in evaluation mode, and record what is connected with what.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        TraceError: the model does not run on the call, or torch-pruning cannot follow it.
    """
    pruning = _torch_pruning()
    with isolated(), torch.enable_grad(), warnings.catch_warnings():
        # Autograd records nothing of frozen layers.
        network = Network(aliased_copy(model).eval().requires_grad_(True))
        # It tells how it would cut bare parameters, which here nobody cuts.
        warnings.simplefilter("ignore")
        # Its own error would not say whether the model or the graph is to blame.
        try:
            with torch.no_grad(), _recorded(network):
                given = call.map(lambda tensor: tensor.detach().clone())
                network.model(*given.args, **given.kwargs)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise refused(model, call, error) from error
        try:
            network.graph = pruning.DependencyGraph().build_dependency(
                network.model,
                call.map(_recordable),
                forward_fn=lambda module, given: module(*given.args, **given.kwargs),
                output_transform=_differentiable,
                verbose=False,
            )
        except Exception as error:
            raise_if_out_of_memory(error)
            raise TraceError(
                f"torch-pruning cannot follow {type(model).__name__}: {type(error).__name__}: "
                f"{error}. Filters can be removed from models whose graph it finds; blocks "
                "(remove_blocks) need no such graph."
            ) from error
    return network


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError(
            "Removing filters needs torch-pruning, which is not installed: "
            "pip install 'blockprune[filters]'"
        ) from error
    return torch_pruning


class _recorded:
    """While it is entered, every call of a module of the network is noted."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._network.model.named_modules():
            self._handles.append(module.register_forward_hook(self._noting(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _noting(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            execution = self._network.executions.setdefault(name, Execution())
            execution.calls += 1
            execution.shape = tuple(output.shape) if isinstance(output, Tensor) else ()

        return note


def _recordable(tensor: Tensor) -> Tensor:
    """Return a copy that autograd follows: a branch may start at the input itself."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    # A leaf would not be seen as an operand.
    return tensor.detach().clone().requires_grad_() * 1


def _differentiable(output: Any) -> list[Tensor]:
    found = [leaf for leaf in tensors_in(output) if leaf.grad_fn is not None]
    # An operation of its own, so that an output is told from the layer that computes it.
    return [leaf * 1 for leaf in found]


def _ancestors(node: Any) -> set[Any]:
    found, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().inputs:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found
