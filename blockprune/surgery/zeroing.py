"""Running a model as it is, but for zeros in the place of the branches that go.

What a ticket must equal is the dense model with these branches multiplied by zero. A graph of the
model can be rewritten so, but that graph may itself be wrong. Here the model's own forward runs,
and the adds that it makes are counted: each that merges a branch to be cut is given zeros. Which
these are is seen when the recorded graphs are followed once, for they make the same adds in the
same order. Where they do not, this way is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from blockprune.blocks import Cut
from blockprune.errors import VerificationError
from blockprune.surgery.comparing import fresh
from blockprune.tracing import Call, CallInterpreter

__all__ = ["follow", "zero_branches"]

Interpreter = Callable[..., CallInterpreter]


def follow(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    interpreter: Callable[[str], Interpreter] = lambda path: CallInterpreter,
) -> nn.Module:
    """Return `model`, which is changed: the module at each path follows its graph node by node.

    Names of modules and of parameters stay. `interpreter` is given the path.
    """
    for path, graph in graphs.items():
        module = model.get_submodule(path)
        module.forward = partial(_run, interpreter(path), module, graph)
    return model


def _run(
    interpreter: Interpreter, module: nn.Module, graph: fx.Graph, /, *args: Any, **kw: Any
) -> Any:
    return interpreter(module, graph=graph).run_call(Call(args, kw))


def zero_branches(
    model: nn.Module, twin: nn.Module, graphs: Mapping[str, fx.Graph], cuts: Sequence[Cut]
) -> nn.Module:
    """Return `model`, which is changed: it runs as before, with zeros in the place of branches.

    Args:
        model: a copy of the dense model.
        twin: another one, which is changed as well.
        graphs: region path to the recorded graph.
        cuts: the branches.

    Its forward raises `VerificationError` where it makes other adds than its graphs.
    """
    adds = _Adds()
    merges = {cut.branch.merge: _place(cut) for cut in cuts}
    followed = follow(twin, graphs, lambda path: partial(_Marking, adds=adds, merges=merges))
    forward = model.forward

    def zeroed(*args: Any, **kwargs: Any) -> Any:
        if not adds.made:
            given = fresh(Call(args, kwargs))
            with torch.no_grad(), adds:
                followed.train(model.training)(*given.args, **given.kwargs)
        made = _Adds(adds.marked)
        with made:
            outputs = forward(*args, **kwargs)
        if made.made != adds.made:
            raise VerificationError("the model makes other additions than its graphs")
        return outputs

    model.forward = zeroed
    return model


def _place(cut: Cut) -> int:
    """Return at which place among the arguments of its merge a branch stands."""
    merge = cut.branch.merge
    return [*merge.args, *merge.kwargs.values()].index(cut.branch.branch)


class _Adds(TorchFunctionMode):
    """Count the additions of two tensors.

    Attributes:
        zeroed: number of an addition to the place of the argument that is taken to be zero.
        made: of each addition, the dimensions of its operands.
        place: while a merge is computed, the place of its branch; else None.
        marked: numbers of the additions that were computed meanwhile, to that place.
    """

    def __init__(self, zeroed: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.zeroed = zeroed or {}
        self.made: list[tuple[int, int]] = []
        self.place: int | None = None
        self.marked: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [*args, *kwargs.values()]
        if name.strip("_") not in ("add", "iadd", "radd") or not all(
            isinstance(value, Tensor) for value in given[:2]
        ):
            return func(*args, **kwargs)
        if self.place is not None:
            self.marked[len(self.made)] = self.place
        place = self.zeroed.get(len(self.made))
        self.made.append((given[0].dim(), given[1].dim()))
        if place is not None:
            given[place] = _zeros(given[place], is_written=name.endswith("_") and place == 0)
        return func(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))


def _zeros(branch: Tensor, *, is_written: bool) -> Tensor:
    # Code that adds something to the branch in place may go on with the branch.
    return branch.detach_().zero_() if is_written else torch.zeros_like(branch)


class _Marking(CallInterpreter):
    """Tell which additions a graph makes for its merges."""

    def __init__(
        self, *args: Any, adds: _Adds, merges: Mapping[fx.Node, int], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.adds = adds
        self.merges = merges

    def run_node(self, n: fx.Node) -> Any:
        self.adds.place = self.merges.get(n)
        try:
            return super().run_node(n)
        finally:
            self.adds.place = None
