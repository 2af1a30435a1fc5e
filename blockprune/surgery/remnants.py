"""What is left of a module once its forward is a graph.

Code around a module reads more of it than its call: `encoder.stride` may be a property,
`isinstance(layer, Layer)` decides, `layer.attention.batch_first` is an attribute of a child that
may be gone. So a class is made for each such module, which is a subclass of the module's own: its
methods, properties and class attributes are there, and the plain attributes of the instance are.
Three kinds of thing stand where something stood:

* a `GraphRemnant`, whose forward is a graph. It is a `torch.fx.GraphModule` too;
* a `Dissolved` module, which is part of the graph of one around it and cannot be called;
* a `GoneTensor`, which has the shape and the dtype of one that went, and no numbers.

What went with the removed branches is no child, parameter or buffer any more. It can be read as an
attribute only; calling it, or computing with it, is an `AttributeError` that names it.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import types
import weakref
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from blockprune.errors import TicketError
from blockprune.surgery.plain_names import with_plain_names
from blockprune.surgery.written_graphs import WrittenGraph
from blockprune.tracing import copy_graph

__all__ = ["Dissolved", "GoneTensor", "GraphRemnant", "Remnant", "remnant_of"]

_DESCRIBING = frozenset({"__get__", "dim", "is_floating_point", "numel", "size"})
_OF_FX = frozenset(
    name
    for name in (*dir(fx.GraphModule), *vars(fx.GraphModule(nn.Module(), fx.Graph())))
    if not name.startswith("_") and name not in {*dir(nn.Module), *vars(nn.Module())}
)
"""Names that a `GraphModule` has and other modules have not; those of the original go first."""


class Remnant(nn.Module):
    """Base of the classes made here.

    Attributes:
        remnant_kind: which of the classes below it is.
        remnant_class: the class of the module that stood here.
        remnant_aside: what can be read as an attribute, and is no part of the module.
        remnant_place: qualified name of what stood here, and whether it went.
    """

    remnant_kind: ClassVar[type[Remnant]]
    remnant_class: ClassVar[type[nn.Module]]
    remnant_aside: dict[str, Any]
    remnant_place: tuple[str, bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register nothing: a class that keeps a list of its subclasses is not told of these."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            aside = vars(self).get("remnant_aside", {})
            if name in aside:
                return aside[name]
            raise

    def extra_repr(self) -> str:
        """Return nothing: what the class says of itself may have gone."""
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.remnant_kind, self.remnant_class), (self._fields(), None)

    def __setstate__(self, state: tuple[Any, fx.Graph | WrittenGraph | None]) -> None:
        super().__setstate__(state[0])  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = _blank(self.remnant_kind, self.remnant_class)
        # A class that says itself how it is copied may refuse to tell its state.
        is_told = hasattr(self.remnant_class, "__deepcopy__")
        fields = _without_graph(vars(self)) if is_told else self._fields()
        twin.__setstate__((copy.deepcopy(fields, memo), self._own_graph()))
        return twin

    def __copy__(self) -> Any:
        twin = _blank(self.remnant_kind, self.remnant_class)
        fields = _without_graph(vars(self))
        registries = {name: fields[name].copy() for name in ("_parameters", "_buffers", "_modules")}
        twin.__setstate__((fields | registries, self._own_graph()))
        return twin

    def _fields(self) -> Any:
        fields = self.__getstate__()  # type: ignore[no-untyped-call]
        return _without_graph(fields) if isinstance(fields, dict) else fields

    def _own_graph(self) -> fx.Graph | None:
        return None


class Dissolved(Remnant):
    """A module that became part of the graph of one around it, or went."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, is_gone = self.remnant_place
        why = (
            "went with the branches that were removed"
            if is_gone
            else "became part of the graph of a module around it"
        )
        raise AttributeError(f"{name!r} cannot be called: it {why}.")


class _OwnInit:
    """Stands before the class of the original, whose `__init__` is not to be called."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]


class GraphRemnant(Remnant, fx.GraphModule):
    """A module whose forward is a graph."""

    def take_graph(self, graph: fx.Graph) -> None:
        """Follow `graph` from now on."""
        vars(self)["_graph"] = graph
        graph.owning_module = self
        self._prefer_own_names()
        GraphRemnant.recompile(self)

    def _prefer_own_names(self) -> None:
        """Let what the module calls `graph` or `meta` itself be read under that name."""
        held = self._modules, self._parameters, self._buffers, vars(self).get("remnant_aside", {})
        for name in _OF_FX:
            of_class = inspect.getattr_static(self.remnant_class, name, None)
            if any(name in names for names in held):
                setattr(type(self), name, property(partial(_own, name)))
            elif of_class not in (None, inspect.getattr_static(fx.GraphModule, name, None)):
                setattr(type(self), name, of_class)

    def recompile(self) -> Any:
        graph = self._graph
        plain, aliases = with_plain_names(graph)
        for name, of in aliases.items():
            setattr(type(self), name, property(of))
        vars(self)["_graph"] = plain
        try:
            return fx.GraphModule.recompile(self)
        finally:
            vars(self)["_graph"] = graph

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return the parts of a pickle, with the graph as data.

        Raises:
            TicketError: a class or function in it cannot be found again by its name.
        """
        make, arguments, (fields, _) = super().__reduce_ex__(protocol)
        written = WrittenGraph.of(self._graph)
        classes = {getattr(type(part), "remnant_class", type(part)) for part in self.modules()}
        try:
            pickle.dumps((arguments, classes, written))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise TicketError(
                f"this ticket cannot be pickled ({error}). Keep it with blockprune.save_ticket, "
                "which writes its weights and its plan."
            ) from error
        return make, arguments, (fields, written)

    def __setstate__(self, state: tuple[Any, fx.Graph | WrittenGraph | None]) -> None:
        super().__setstate__(state)
        graph = state[1].read() if isinstance(state[1], WrittenGraph) else state[1]
        assert graph is not None
        self.take_graph(graph)

    def _own_graph(self) -> fx.Graph:
        graph, _ = copy_graph(self._graph)
        for node, twin in zip(self._graph.nodes, graph.nodes, strict=True):
            twin.meta = dict(node.meta)
        return graph


def _without_graph(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "_graph"}


def _own(name: str, remnant: Remnant) -> Any:
    return Remnant.__getattr__(remnant, name)


class GoneTensor(Tensor):
    """A tensor that went: it can be asked what it was like, and has no numbers."""

    _gone_name: str  # of the tensor, in the module that it was read from

    @staticmethod
    def of(name: str, like: Tensor) -> GoneTensor:
        """Return what is left of a tensor called `name`."""
        return _gone_tensor(
            name, tuple(like.shape), like.dtype, str(like.device), like.requires_grad
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        names = [arg._gone_name for arg in args if isinstance(arg, GoneTensor)]
        raise AttributeError(
            f"{', '.join(map(repr, names)) or 'a tensor'} went with the branches that were removed."
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AttributeError("a tensor that went with the branches that were removed has no values")

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"GoneTensor({self._gone_name!r}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GoneTensor:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        like = tuple(self.shape), self.dtype, str(self.device), self.requires_grad
        return _gone_tensor, (self._gone_name, *like)


def _gone_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, requires_grad: bool
) -> GoneTensor:
    made = torch.Tensor._make_wrapper_subclass(
        GoneTensor, shape, dtype=dtype, device=torch.device(device), requires_grad=requires_grad
    )
    made._gone_name = name
    return made


def remnant_of(module: nn.Module, kind: type[Remnant]) -> Any:
    """Return a remnant of the class of `module`, of the given kind, in which nothing is yet."""
    original = type(module)
    if issubclass(original, Remnant):
        original = original.remnant_class
    elif issubclass(original, fx.GraphModule):
        # Torch makes a class of its own for each of these.
        original = next(c for c in original.__mro__ if "GraphModuleImpl" not in c.__qualname__)
    return _blank(kind, original)


_DISSOLVED: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()
"""The class for each original; one with a graph needs a class of its own for its forward."""


def _blank(kind: type[Remnant], original: type[nn.Module]) -> Any:
    if kind is Dissolved:
        made = _DISSOLVED.get(original)
        if made is None:
            made = _DISSOLVED[original] = _class(kind, original, (kind, original))
        remnant: Any = object.__new__(made)
        nn.Module.__init__(remnant)
        return remnant
    made = _class(kind, original, (kind, _OwnInit, original))
    remnant = object.__new__(made)
    fx.GraphModule.__init__(remnant, nn.Module(), fx.Graph(), original.__name__)
    return remnant


def _class(kind: type[Remnant], original: type[nn.Module], bases: tuple[type, ...]) -> type:
    namespace = {
        "remnant_kind": kind,
        "remnant_class": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return types.new_class(original.__name__, bases, {}, lambda body: body.update(namespace))
