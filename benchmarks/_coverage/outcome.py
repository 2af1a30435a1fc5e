"""What one pass through a model gives, and how two outcomes differ."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockprune.surgery.record import record_of, translated

from .holders import Entry, entries_of, is_holder

__all__ = ["Outcome", "copied", "disagreements", "fresh", "outcome_of"]

Inputs = Any
"""What a forward takes: a Tensor, a tuple of arguments, or a dict of keywords."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The output of a pass, and what a backward pass and the pass itself leave behind.

    Attributes:
        structure: the types that the output is made of.
        leaves: what it holds, tensors mostly.
        gradients: of the parameters by name; None where no backward pass was made.
        buffers: and other tensors that the modules hold, by name.
    """

    structure: str
    leaves: list[Any]
    gradients: dict[str, Tensor | None] | None
    buffers: dict[str, Tensor]


def copied(model: nn.Module) -> nn.Module:
    """Return a copy that has everything of its own but the parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def fresh(
    inputs: Inputs, *, differentiable: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments and keywords with tensors of their own, which a model may overwrite.

    With `differentiable` the floating ones are results of an operation that autograd knows.
    """

    def clone(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if differentiable and value.is_floating_point():
            return value.requires_grad_().clone()
        return value

    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    cloned = pytree.tree_map(clone, inputs)
    return ((), cloned) if isinstance(cloned, dict) else (tuple(cloned), {})


def outcome_of(model: nn.Module, output: Any, *, backward: bool) -> Outcome:
    """Return the outcome of the pass that gave `output`, after a backward pass if one is wanted.

    Everything is under the names that the dense model has for it.
    """
    renamed = _renamed(model)
    leaves, spec = pytree.tree_flatten(output)
    gradients = None
    if backward:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for parameter in parameters.values():
            parameter.grad = None
        loss = _loss(leaves)
        if loss is not None:
            loss.backward()
        gradients = {
            translated(name, renamed): parameter.grad for name, parameter in parameters.items()
        }
        for parameter in parameters.values():
            parameter.grad = None
    return Outcome(
        structure=f"{type(output).__name__} {spec}",
        leaves=[value.detach() if isinstance(value, Tensor) else value for value in leaves],
        gradients=gradients,
        buffers={translated(name, renamed): value for name, value in _state(model).items()},
    )


def floating(leaves: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors that a loss can be made of."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            yield leaf


def _loss(leaves: Iterable[Any]) -> Tensor | None:
    total: Tensor | None = None
    for leaf in floating(leaves):
        # Distinct weights for each element, so that no two errors cancel.
        weights = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
        term = (leaf * weights).sum().double()
        total = term if total is None else total + term
    return total


def _renamed(model: nn.Module) -> Mapping[str, str]:
    """Return, of a ticket whose layers moved up in a list, their names to those they had."""
    record = record_of(model)
    return record.renamed if record is not None else {}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers, and the tensors that modules hold as plain attributes."""
    plain = {
        ".".join(part for part in (path, name) if part): value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {**plain, **dict(model.named_buffers(remove_duplicate=False))}


def disagreements(
    ticket: Outcome,
    reference: Outcome,
    *,
    ulps: float,
    but: frozenset[str] = frozenset(),
    removed: int = 0,
) -> list[str]:
    """List every way in which a ticket's outcome differs from its reference's.

    The ticket may lack parameters and buffers; those that it has must agree, but for the buffers
    named in `but`. A gradient that is absent and one that is all zeros train alike, yet a parameter
    that the reference trains must be trained by the ticket. An object in the output, such as a
    cache, may lack the entries of as many branches as were `removed`.
    """
    found = []
    if ticket.structure != reference.structure:
        found.append(f"output structure {ticket.structure} instead of {reference.structure}")
    for index, (mine, theirs) in enumerate(zip(ticket.leaves, reference.leaves, strict=False)):
        if is_holder(theirs):
            found += [
                f"output {index}: {problem}"
                for problem in _differences_within(mine, theirs, ulps, removed)
            ]
        elif problem := _difference(mine, theirs, ulps):
            found.append(f"output {index}: {problem}")
    for name, buffer in ticket.buffers.items():
        if name not in reference.buffers:
            found.append(f"{name} is neither a buffer nor an attribute of the dense model")
        elif name not in but:
            wanted = reference.buffers[name].to(buffer.dtype)
            if problem := _difference(buffer, wanted, ulps):
                found.append(f"buffer {name}: {problem}")
    if ticket.gradients is not None and reference.gradients is not None:
        found += _gradient_disagreements(ticket.gradients, reference.gradients, ulps)
    return found


def _differences_within(found: Any, wanted: Any, ulps: float, removed: int) -> Iterator[str]:
    """Yield how the tensors that two objects hold differ.

    What one holds must be what the other does, in order, but for `removed` entries at most that are
    left out, or have not been filled.
    """
    if type(found) is not type(wanted):
        yield f"{type(found).__name__} instead of {type(wanted).__name__}"
        return
    theirs = entries_of(wanted)
    following, complete = iter(theirs), 0
    for path, entry in entries_of(found):
        match = next((other for _, other in following if _is_part(entry, other, ulps)), None)
        if match is None:
            yield f"{path} is nothing that the dense model returns after what came before"
            return
        complete += len(match) == len(entry)
    if len(theirs) - complete > removed:
        yield f"{complete} entries instead of {len(theirs)}, without {removed} branches"


def _is_part(found: Entry, wanted: Entry, ulps: float) -> bool:
    return found.keys() <= wanted.keys() and not any(
        _difference(found[name], wanted[name], ulps) for name in found
    )


def _gradient_disagreements(
    mine: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], ulps: float
) -> list[str]:
    found = []
    # A gradient sums over every position, in an order that a removed branch can change:
    # its rounding is measured against the largest gradient of the net.
    largest = max((_largest(g) for g in theirs.values() if g is not None), default=0.0)
    for name, gradient in mine.items():
        wanted = theirs.get(name)
        if name not in theirs:
            found.append(f"parameter {name} is not in the dense model")
        elif gradient is None:
            if wanted is not None and bool(wanted.any()):
                found.append(f"gradient of {name} is missing")
        else:
            wanted = torch.zeros_like(gradient) if wanted is None else wanted
            if problem := _difference(gradient, wanted, ulps, largest):
                found.append(f"gradient of {name}: {problem}")
    return found


def _difference(found: Any, wanted: Any, ulps: float, scale: float | None = None) -> str | None:
    """Say how two leaves differ, or return None where they agree to a few ulps of `scale`.

    The scale is the largest value wanted, unless given.
    """
    if not isinstance(wanted, Tensor):
        return None if found == wanted else f"{found!r} instead of {wanted!r}"
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} instead of a tensor"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{tuple(found.shape)} {found.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}"
    if torch.equal(found, wanted):
        return None
    if not wanted.is_floating_point():
        return f"{int((found != wanted).sum())} of {wanted.numel()} {wanted.dtype} elements differ"
    usual = wanted.isfinite()
    if not torch.equal(found[~usual].nan_to_num(7.0), wanted[~usual].nan_to_num(7.0)):
        return "infinities or NaNs at other places"
    scale = _largest(wanted[usual]) if scale is None else scale
    worst = _largest((found - wanted)[usual])
    unit = torch.finfo(wanted.dtype).eps * scale
    # Not "worst > bound": a NaN where a number is wanted must not pass.
    if worst <= ulps * unit:
        return None
    return f"off by {worst:.3g} where the largest is {scale:.3g}"


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
