"""Which module's forward is running, and what an eager model adds in it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["Add", "Adds", "Frame", "OpenModules"]

_ADDS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
_IN_PLACE = frozenset({"add_", "__iadd__"})


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """One call of a module.

    Attributes:
        module: the module.
        call: how many calls of it came before.
        given: the tensors that it was called with.
    """

    module: nn.Module
    call: int
    given: list[Tensor]


class OpenModules:
    """The calls that are running in a model, outermost first, while inside the context."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.frames: list[Frame] = []
        self.calls: Counter[int] = Counter()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> OpenModules:
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(
                module.register_forward_pre_hook(self._open, prepend=True, with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(self._close, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.frames.append(Frame(module, self.calls[id(module)], given))
        self.calls[id(module)] += 1

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.frames and self.frames.pop().module is not module:
            pass


@dataclasses.dataclass
class Add:
    """One add of two tensors.

    Attributes:
        frame: the call it was computed in.
        place: how many adds of that module's calls came before.
        operands: the two tensors.
        is_in_place: whether the first operand is overwritten.
    """

    frame: Frame
    place: int
    operands: list[Tensor]
    is_in_place: bool


class Adds(TorchFunctionMode):
    """Shows every add of two tensors to `before` and `after`, which a subclass gives."""

    def __init__(self, opened: OpenModules) -> None:
        super().__init__()
        self.opened = opened
        self._count: Counter[int] = Counter()

    def before(self, add: Add) -> None:
        """See an add, and exchange its operands where another value is wanted."""

    def after(self, add: Add, result: Tensor) -> None:
        """See what an add gave."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name not in _ADDS or not self.opened.frames or "out" in kwargs:
            return func(*args, **kwargs)
        operands = [*args[:2], *(kwargs[key] for key in ("input", "other") if key in kwargs)]
        if len(operands) != 2 or not all(isinstance(value, Tensor) for value in operands):
            return func(*args, **kwargs)
        frame = self.opened.frames[-1]
        add = Add(frame, self._count[id(frame.module)], operands, name in _IN_PLACE)
        self._count[id(frame.module)] += 1
        self.before(add)
        rest = {key: kwargs[key] for key in kwargs if key not in ("input", "other")}
        result = func(*add.operands, *args[2:], **rest)
        self.after(add, result)
        return result
