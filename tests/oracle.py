"""The reference that every ticket is held against: the dense model, run eagerly, with
some branches switched off.

Nothing here traces, and nothing here comes from blockprune. A zoo net passes the value
of each of its branches through `branch`, which hands it on unchanged except inside
`zeroed`, where the branches asked for become zeros. Networks that were not written for
these tests are zeroed by a forward hook on the module that ends the branch.

Random draws would differ between a model and its ticket, because the ticket draws less
often. `FixedDraws` makes each draw a function of the operation and the shape, so that
whatever is drawn in both is drawn equally.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A branch of a zoo net: the module that calls `branch`, the key, which call (None: all)."""

    path: str
    key: str = ""
    call: int | None = None


@dataclasses.dataclass(frozen=True)
class Hook:
    """A branch that ends in the module `path`, whose every output is zeroed."""

    path: str


class _Session:
    def __init__(self, taps: set[tuple[int, str, int | None]]) -> None:
        self.taps = taps
        self.calls: Counter[tuple[int, str]] = Counter()

    def value(self, owner: nn.Module, key: str, value: Tensor) -> Tensor:
        call = self.calls[id(owner), key]
        self.calls[id(owner), key] += 1
        off = (id(owner), key, call) in self.taps or (id(owner), key, None) in self.taps
        return torch.zeros_like(value) if off else value


_sessions: list[_Session] = []


def branch(owner: nn.Module, value: Tensor, key: str = "") -> Tensor:
    """Return `value`, the output of a branch of `owner`, or zeros where it is switched off."""
    return _sessions[-1].value(owner, key, value) if _sessions else value


def _zero_output(module: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, output)


@contextlib.contextmanager
def zeroed(model: nn.Module, zeros: Iterable[Tap | Hook]) -> Iterator[None]:
    """Switch branches of `model` off for one forward pass."""
    zeros = tuple(zeros)
    modules = dict(model.named_modules(remove_duplicate=False))
    taps = {(id(modules[z.path]), z.key, z.call) for z in zeros if isinstance(z, Tap)}
    hooks = [
        modules[z.path].register_forward_hook(_zero_output) for z in zeros if isinstance(z, Hook)
    ]
    _sessions.append(_Session(taps))
    try:
        yield
    finally:
        _sessions.pop()
        for hook in hooks:
            hook.remove()


_RANDOM = {
    "alpha_dropout",
    "bernoulli",
    "bernoulli_",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "multi_head_attention_forward",
    "normal_",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randperm",
    "scaled_dot_product_attention",
    "uniform_",
}


_WHATEVER_THE_LAYOUT = ("multi_head_attention_forward", "scaled_dot_product_attention")
"""These draw for values of their own, whose layout does not depend on what they are given."""


class FixedDraws(TorchFunctionMode):
    """Seed the generator before each random operation by its name, its shape and `salt`.

    What is drawn does not depend on the layout of the values in memory either.
    """

    def __init__(self, salt: int = 0) -> None:
        super().__init__()
        self.salt = salt

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _RANDOM:
            shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else args[:1]
            torch.manual_seed(zlib.crc32(f"{self.salt} {name} {shape}".encode()))
            if args and isinstance(args[0], Tensor) and name not in _WHATEVER_THE_LAYOUT:
                return _drawn_in_order(func, args[0], *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _drawn_in_order(func: Any, given: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Draw in the order of the indices: torch draws in that of the memory, which may differ."""
    if given.is_contiguous():
        return func(given, *args, **kwargs)
    plain = given.contiguous()
    version = plain._version
    value = func(plain, *args, **kwargs)
    if plain._version != version:
        return given.copy_(plain)
    return given if value is plain else value


def fresh(inputs: Inputs) -> Inputs:
    """Return inputs whose tensors are clones: a model may write into its input."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def call(model: nn.Module, inputs: Inputs, salt: int = 0) -> Any:
    """Run `model` on a copy of `inputs`, a tuple of arguments or a dict of keywords."""
    inputs = fresh(inputs)
    with torch.random.fork_rng(devices=[]), FixedDraws(salt):
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def flatten(output: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a model's output and a description of its structure."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        values = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        leaves, spec = pytree.tree_flatten(values)
        return leaves, (type(output), str(spec))
    leaves, spec = pytree.tree_flatten(output)
    return leaves, (type(output), str(spec))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one pass through a model gives: the output, the gradients, the buffers afterwards."""

    leaves: list[Any]
    structure: Any
    gradients: dict[str, Tensor | None] | None  # None where no backward pass was asked for
    buffers: dict[str, Tensor]
    attributes: dict[str, Tensor]  # tensors that are neither parameter nor buffer


def _loss(leaves: Iterable[Any]) -> Tensor | None:
    total: Tensor | None = None
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            # Distinct weights for each element, so that no two errors cancel.
            weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
            term = (leaf * weights).sum().double()
            total = term if total is None else total + term
    return total


def outcome(
    model: nn.Module,
    inputs: Inputs,
    *,
    train: bool,
    zeros: Iterable[Tap | Hook] = (),
    salt: int = 0,
    backward: bool = True,
) -> Outcome:
    """Run a deep copy of `model` forward and, unless told not to, backward."""
    model = copy.deepcopy(model).train(train)
    model.zero_grad(set_to_none=True)
    with zeroed(model, zeros):
        output = call(model, inputs, salt)
    leaves, structure = flatten(output)
    gradients = None
    if backward:
        loss = _loss(leaves)
        if loss is not None:
            loss.backward()
        named = model.named_parameters(remove_duplicate=False)
        gradients = {name: parameter.grad for name, parameter in named}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return Outcome(leaves, structure, gradients, buffers, _plain_tensors(model))


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def trainable(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a backward pass works in both modes: some in-place nets are inference only."""
    try:
        for train in (False, True):
            outcome(model, inputs, train=train)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def difference(found: Any, wanted: Any, ulps: float) -> str | None:
    """Say how two leaves differ, or return None where they agree to a few ulps."""
    if not isinstance(wanted, Tensor):
        return None if found == wanted else f"{found!r} instead of {wanted!r}"
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} instead of a tensor"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{tuple(found.shape)} {found.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}"
    if torch.equal(found, wanted):
        return None
    if not wanted.is_floating_point():
        return "other integers"
    scale = wanted.abs().max()
    worst = (found - wanted).abs().max()
    allowed = ulps * torch.finfo(wanted.dtype).eps * scale
    return (
        None if bool(worst <= allowed) else f"off by {worst:.3g} where the largest is {scale:.3g}"
    )


def disagreements(
    ticket: Outcome, reference: Outcome, *, ulps: float = 8, buffers: bool = True
) -> list[str]:
    """List every way in which a ticket's outcome differs from its reference's.

    The ticket may lack parameters and buffers; those that it has must agree. Without
    `buffers` only their presence is looked at: a norm that is called twice counts in the
    reference the call whose output is then zeroed. A gradient that is absent and one that
    is all zeros train alike, but a parameter that the reference trains must be trained by
    the ticket.
    """
    found = []
    if ticket.structure != reference.structure:
        found.append(f"output structure {ticket.structure} instead of {reference.structure}")
    for i, (mine, theirs) in enumerate(zip(ticket.leaves, reference.leaves, strict=False)):
        if problem := difference(mine, theirs, ulps):
            found.append(f"output {i}: {problem}")
    for name, buffer in ticket.buffers.items():
        # A graph holds a plain tensor as a buffer, which follows `.to`; the value counts.
        plain = reference.attributes.get(name)
        wanted = reference.buffers.get(name) if plain is None else plain.to(buffer.dtype)
        if wanted is None:
            found.append(f"{name} is neither a buffer nor an attribute of the dense model")
        elif buffers and (problem := difference(buffer, wanted, ulps)):
            found.append(f"buffer {name}: {problem}")
    if ticket.gradients is not None and reference.gradients is not None:
        found += _gradient_disagreements(ticket.gradients, reference.gradients, ulps)
    return found


def _gradient_disagreements(
    mine: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], ulps: float
) -> list[str]:
    found = []
    # A gradient sums over every position, in an order that a removed branch can change:
    # its rounding is measured against the largest gradient of the net.
    largest = max((float(g.abs().max()) for g in theirs.values() if g is not None), default=0.0)
    for name, gradient in mine.items():
        if name not in theirs:
            found.append(f"parameter {name} is not in the dense model")
            continue
        wanted = theirs[name]
        if wanted is None:
            if gradient is not None and bool(gradient.any()):
                found.append(f"gradient of {name} exists, and the reference has none")
        elif gradient is None:
            found.append(f"gradient of {name} is missing")
        elif gradient.shape != wanted.shape:
            found.append(f"gradient of {name} has shape {tuple(gradient.shape)}")
        else:
            worst = float((gradient - wanted).abs().max())
            if not worst <= ulps * torch.finfo(wanted.dtype).eps * largest:
                found.append(f"gradient of {name} is off by {worst:.3g} (largest {largest:.3g})")
    return found
