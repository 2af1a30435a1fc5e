"""The proof that a ticket is right, carried out on the spot.

Three comparisons, on structural copies, so that neither the ticket nor the dense model notices:

1. the traced graphs against the dense model run eagerly, one call in eval and then one in train
   mode with the same random draws: nothing was baked in, no state was lost;
2. each cut region: the ticket's graph against the reference with zeroed branches, outputs and
   gradients of the kept parameters, in both modes. The generator is seeded before each node by the
   node's name, so that dropout draws agree although the graphs differ;
3. the ticket as a user calls it against the whole reference: values and types of the output.

Removing a branch adds nothing but zero, so values agree exactly but for a few units in the last
place.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.errors import VerificationError
from blockprune.randomness import LayoutFreeDraws, seed_rng
from blockprune.surgery.comparing import (
    OUTPUT_ULPS,
    SEED,
    Difference,
    Outcome,
    difference_of,
    fresh,
    gradients_differ,
    gradients_of,
    is_coarse,
    snapshot,
    types_of,
)
from blockprune.surgery.graph_module import graph_module
from blockprune.tracing import (
    Call,
    CallInterpreter,
    Followed,
    Region,
    TracedModel,
    assemble,
    copy_model,
    isolated,
    refused,
    structural_copy,
)

__all__ = ["verify"]


def verify(
    model: nn.Module,
    ticket: nn.Module,
    traced: TracedModel,
    references: Mapping[str, fx.Graph],
    graphs: Mapping[str, fx.Graph],
) -> tuple[str, ...]:
    """Prove that `ticket` equals `model` with the removed branches multiplied by zero.

    Args:
        model: the dense model.
        ticket: the ticket.
        traced: the regions that it was cut from.
        references: region path to the graph with zeroed branches.
        graphs: region path to the ticket's graph.

    Returns:
        The modes that could be compared: ("eval", "train"), or ("eval",) where the dense model
        itself does not run in train mode on these inputs.

    Raises:
        VerificationError: names the first node that differs, and the difference; or there are no
            values to compare, as the model is on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise VerificationError(
                f"a ticket is verified by the values it computes, and {name!r} has none: it is on "
                "the meta device. Pass verify=False, or a model with weights."
            )
    with isolated():
        proof = _Proof(model, ticket, traced.call, traced.regions, references, graphs)
        modes = _modes_proved(proof)
    return tuple(mode for mode in ("eval", "train") if mode in modes)


def _modes_proved(proof: _Proof) -> set[str]:
    coarse = is_coarse(proof.model)
    try:
        return dataclasses.replace(proof, room=0.0 if coarse else 1.0).carried_out()
    except _ApartInNumbers as error:
        # Another layout in memory rounds otherwise; in float64 nothing but that is left of it.
        try:
            return proof.widened().carried_out()
        except VerificationError:
            raise VerificationError(str(error)) from None
        except Exception:
            # The model does not run in float64: then its own precision is all there is.
            if not coarse:
                raise VerificationError(str(error)) from None
    try:
        return proof.carried_out()
    except _ApartInNumbers as error:
        raise VerificationError(str(error)) from None


class _ApartInNumbers(VerificationError):
    """Finite numbers differ by more than a few units in the last place, and nothing else does."""


def _apart(difference: Difference, message: str) -> VerificationError:
    return (_ApartInNumbers if difference.may_be_rounding else VerificationError)(message)


@dataclasses.dataclass(frozen=True)
class _Proof:
    """What is compared; numbers may differ by `room` times a few units in the last place."""

    model: nn.Module
    ticket: nn.Module
    call: Call
    regions: tuple[Region, ...]
    references: Mapping[str, fx.Graph]
    graphs: Mapping[str, fx.Graph]
    room: float = 1.0

    def widened(self) -> _Proof:
        """Return the same in float64."""
        return dataclasses.replace(
            self,
            model=copy_model(self.model).double(),
            ticket=copy_model(self.ticket).double(),
            call=self.call.map(_widened),
        )

    def carried_out(self) -> set[str]:
        """Compare everything, and return the modes that could be compared."""
        types = _compare_with_eager(self)
        calls = _region_calls(self.model, self.call, self.graphs)
        modes = {"eval"}
        for path in self.graphs:
            dense = _side(self.model, path, self.references)
            kept = _side(self.ticket, path, self.graphs)
            modes |= _compare_region(path, dense, kept, calls[path], self.room)
        _compare_whole(self, types)
        return modes

    def apart(self, found: Any, expected: Any) -> Difference | None:
        return difference_of(found, expected, self.room * OUTPUT_ULPS)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class _Seeded(CallInterpreter):
    seen: dict[str, Any] | None = None

    def run_call(self, call: Call) -> Any:
        # A branch that goes may take a change of memory layout along.
        with LayoutFreeDraws():
            return super().run_call(call)

    def run_node(self, n: fx.Node) -> Any:
        seed_rng(zlib.crc32(n.name.encode()))
        value = super().run_node(n)
        if self.seen is not None:
            self.seen[n.name] = snapshot(value)
        return value


# --- 1. the trace against the eager model ---------------------------------------------------------


def _compare_with_eager(proof: _Proof) -> Any:
    """Compare the trace with the eager model; return the types that the model's output has."""
    model, call = proof.model, proof.call
    originals = {r.path: r.graph for r in proof.regions if r.path in proof.graphs}
    eager = structural_copy(model)
    followed = assemble(structural_copy(model), originals, _followed(CallInterpreter))
    types = None
    for mode in ("eval", "train"):
        try:
            expected = _run(eager, call, mode)
        except Exception as error:
            if mode == "eval":
                raise refused(model, call, error) from error
            # The dense model itself wants other inputs here (targets, a larger batch).
            return types
        types = types or types_of(expected)
        found = _run(followed, call, mode)
        difference = proof.apart(found, expected)
        if difference:
            raise _apart(
                difference,
                f"the traced graph of {type(model).__name__} does not compute what the model "
                f"does in {mode} mode: {difference}. Its forward keeps state or depends on "
                "something that a trace cannot see; pass preserve_root=True to keep it.",
            )
    return types


# --- 2. each region against its reference ---------------------------------------------------------


def _compare_region(path: str, dense: _Side, kept: _Side, call: Call, room: float) -> set[str]:
    """Compare one region in both modes; return the modes in which the reference runs."""
    place = f"region {path!r}" if path else "the ticket"
    modes = set()
    for mode in ("eval", "train"):
        outcome = _reference_outcome(place, dense, call, mode)
        if outcome is not None:
            _compare_sides(place, dense, kept, *outcome, mode, room)
            modes.add(mode)
    return modes


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of two graphs that are compared, and the module that it fetches from."""

    module: nn.Module
    graph: fx.Graph


def _side(model: nn.Module, path: str, graphs: Mapping[str, fx.Graph]) -> _Side:
    """Return the graph at `path` with its module, in which inner regions follow their graphs."""
    outer = f"{path}." if path else ""
    inner = {p: g for p, g in graphs.items() if p != path and p.startswith(outer)}
    whole = assemble(structural_copy(model), inner, _followed(_Seeded))
    return _Side(whole.get_submodule(path), graphs[path])


def _reference_outcome(
    place: str, dense: _Side, call: Call, mode: str
) -> tuple[Call, Outcome] | None:
    """Return inputs that the reference runs on in this mode and what it gives, else None.

    Raises:
        VerificationError: it does not run in eval mode.
    """
    # A single value a channel cannot be normalised in train mode; two samples can.
    doubled = call.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor)
    refusals: list[Exception] = []
    for differentiate in (True, False):  # some networks overwrite what their backward needs
        for candidate in (call, doubled):
            try:
                return candidate, _outcome(dense, candidate, mode, differentiate=differentiate)
            except Exception as error:
                refusals.append(error)
    if mode == "eval":
        raise VerificationError(
            f"{place} has nothing to be compared with: without these branches the dense model "
            f"fails in eval mode: {type(refusals[0]).__name__}: {refusals[0]}"
        ) from refusals[0]
    return None


def _compare_sides(
    place: str, dense: _Side, kept: _Side, call: Call, reference: Outcome, mode: str, room: float
) -> None:
    expected, gradients = reference
    try:
        found, kept_gradients = _outcome(kept, call, mode, differentiate=gradients is not None)
    except Exception as error:
        raise VerificationError(
            f"{place} fails where the zero-branch reference runs, in {mode} mode: "
            f"{type(error).__name__}: {error}"
        ) from error
    difference = difference_of(found, expected, room * OUTPUT_ULPS)
    if difference:
        raise _apart(
            difference,
            f"{place} differs from the zero-branch reference in {mode} mode at "
            f"{_locate(dense, kept, call, mode, room)}: {difference}",
        )
    difference = gradients_differ(kept_gradients or {}, gradients or {}, room)
    if difference:
        raise _apart(
            difference, f"{place}, against the zero-branch reference in {mode} mode: {difference}"
        )


def _outcome(side: _Side, call: Call, mode: str, *, differentiate: bool) -> Outcome:
    """Return outputs, and gradients of a fixed random projection of them by parameter name."""
    module = side.module.train(mode == "train")
    followed = Followed(module, side.graph, _Seeded)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    inputs = fresh(call)
    try:
        with torch.set_grad_enabled(differentiate):
            outputs = followed(*inputs.args, **inputs.kwargs)
            return outputs, gradients_of(outputs, module) if differentiate else None
    finally:
        # The next run starts from the same running statistics.
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def _locate(dense: _Side, kept: _Side, call: Call, mode: str, room: float) -> str:
    """Return the name of the first node that both graphs have and that differs."""
    records: list[dict[str, Any]] = []
    for side in (dense, kept):
        interpreter = _Seeded(side.module.train(mode == "train"), graph=side.graph)
        interpreter.seen = {}
        with torch.no_grad():
            interpreter.run_call(fresh(call))
        records.append(interpreter.seen)
    expected, found = records
    for name, value in found.items():
        if name in expected and difference_of(value, expected[name], room * OUTPUT_ULPS):
            return f"node {name!r}"
    return "its output"


# --- 3. the whole ---------------------------------------------------------------------------------


def _compare_whole(proof: _Proof, types: Any) -> None:
    call = proof.call
    reference = assemble(structural_copy(proof.model), dict(proof.references), graph_module)
    expected = _run(reference, call, "eval")
    try:
        found = _run(structural_copy(proof.ticket), call, "eval")
    except Exception as error:
        raise VerificationError(
            f"the ticket fails where the zero-branch reference runs, in eval mode: "
            f"{type(error).__name__}: {error}"
        ) from error
    if types_of(found) != types:
        raise VerificationError(f"the ticket returns {types_of(found)}, the dense model {types}")
    difference = proof.apart(found, expected)
    if difference:
        raise _apart(
            difference,
            f"the ticket differs from the zero-branch reference in eval mode: {difference}",
        )


# --- running and comparing ------------------------------------------------------------------------


def _followed(
    interpreter: type[CallInterpreter],
) -> Callable[[str, nn.Module, fx.Graph], nn.Module]:
    return lambda path, module, graph: Followed(module, graph, interpreter)


def _run(model: nn.Module, call: Call, mode: str) -> Any:
    seed_rng(SEED)
    inputs = fresh(call)
    with torch.no_grad():
        return snapshot(model.train(mode == "train")(*inputs.args, **inputs.kwargs))


def _region_calls(model: nn.Module, call: Call, graphs: Mapping[str, fx.Graph]) -> dict[str, Call]:
    """Return what each cut region is called with in one eager eval forward."""
    calls = {"": call}
    if set(graphs) <= {""}:
        return calls
    copy = structural_copy(model)

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, fresh(Call(args, kwargs)))

        return hook

    for path in graphs:
        copy.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True)
    _run(copy, call, "eval")
    return calls
