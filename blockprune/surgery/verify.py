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
from blockprune.randomness import seed_rng
from blockprune.surgery.assemble import assemble, graph_module
from blockprune.tracing import (
    Call,
    CallInterpreter,
    TracedModel,
    isolated,
    refused,
    structural_copy,
    tensors_in,
)

__all__ = ["verify"]

_SEED = 20240229
_OUTPUT_ULPS = 4.0
_GRADIENT_ULPS = 32.0

_Outcome = tuple[Any, dict[str, Tensor] | None]
"""Outputs, and gradients by the name of the parameter; None where there is no backward pass."""


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
        VerificationError: names the first node that differs, and the difference.
    """
    with isolated():
        types = _compare_with_eager(model, traced, graphs)
        calls = _region_calls(model, traced.call, graphs)
        modes = {"eval"}
        for path, graph in graphs.items():
            modes |= _compare_region(model, ticket, path, references[path], graph, calls[path])
        _compare_whole(model, ticket, traced.call, references, types)
    return tuple(mode for mode in ("eval", "train") if mode in modes)


class _Interpreted(nn.Module):
    """A region run node by node; `seeded` fixes each node's random draws by its name."""

    def __init__(self, module: nn.Module, graph: fx.Graph, *, seeded: bool) -> None:
        super().__init__()
        self.module = module
        self.graph = graph
        self.seeded = seeded

    def __getattr__(self, name: str) -> Any:
        # Code around the region may ask its module for more than a call.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        interpreter = _Seeded if self.seeded else CallInterpreter
        return interpreter(self.module, graph=self.graph).run_call(Call(args, kwargs))


class _Seeded(CallInterpreter):
    seen: dict[str, Any] | None = None

    def run_node(self, n: fx.Node) -> Any:
        seed_rng(zlib.crc32(n.name.encode()))
        value = super().run_node(n)
        if self.seen is not None:
            self.seen[n.name] = _snapshot(value)
        return value


# --- 1. the trace against the eager model ---------------------------------------------------------


def _compare_with_eager(
    model: nn.Module, traced: TracedModel, graphs: Mapping[str, fx.Graph]
) -> Any:
    """Compare the trace with the eager model; return the types that the model's output has."""
    originals = {region.path: region.graph for region in traced.regions if region.path in graphs}
    eager = structural_copy(model)
    followed = assemble(structural_copy(model), originals, _interpret(seeded=False))
    types = None
    for mode in ("eval", "train"):
        try:
            expected = _run(eager, traced.call, mode)
        except Exception as error:
            if mode == "eval":
                raise refused(model, traced.call, error) from error
            # The dense model itself wants other inputs here (targets, a larger batch).
            return types
        types = types or _types(expected)
        found = _run(followed, traced.call, mode)
        difference = _difference(found, expected, _OUTPUT_ULPS)
        if difference:
            raise VerificationError(
                f"the traced graph of {type(model).__name__} does not compute what the model "
                f"does in {mode} mode: {difference}. Its forward keeps state or depends on "
                "something that a trace cannot see; pass preserve_root=True to keep it."
            )
    return types


# --- 2. each region against its reference ---------------------------------------------------------


def _compare_region(
    model: nn.Module,
    ticket: nn.Module,
    path: str,
    reference: fx.Graph,
    graph: fx.Graph,
    call: Call,
) -> set[str]:
    """Compare one region in both modes; return the modes in which the reference runs."""
    dense = _Side(structural_copy(model).get_submodule(path), reference)
    kept = _Side(structural_copy(ticket).get_submodule(path), graph)
    place = f"region {path!r}" if path else "the ticket"
    modes = set()
    for mode in ("eval", "train"):
        outcome = _reference_outcome(dense, call, mode)
        if outcome is not None:
            _compare_sides(place, dense, kept, *outcome, mode)
            modes.add(mode)
    return modes


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of two graphs that are compared, and the module that it fetches from."""

    module: nn.Module
    graph: fx.Graph


def _reference_outcome(dense: _Side, call: Call, mode: str) -> tuple[Call, _Outcome] | None:
    """Return inputs that the reference runs on in this mode and what it gives, else None."""
    # A single value a channel cannot be normalised in train mode; two samples can.
    doubled = call.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor)
    for differentiate in (True, False):  # some networks overwrite what their backward needs
        for candidate in (call, doubled):
            try:
                return candidate, _outcome(dense, candidate, mode, differentiate=differentiate)
            except Exception as error:
                refusal = error
    if mode == "eval":
        raise refusal
    return None


def _compare_sides(
    place: str, dense: _Side, kept: _Side, call: Call, reference: _Outcome, mode: str
) -> None:
    expected, gradients = reference
    try:
        found, kept_gradients = _outcome(kept, call, mode, differentiate=gradients is not None)
    except Exception as error:
        raise VerificationError(
            f"{place} fails where the zero-branch reference runs, in {mode} mode: "
            f"{type(error).__name__}: {error}"
        ) from error
    difference = _difference(found, expected, _OUTPUT_ULPS)
    if difference:
        raise VerificationError(
            f"{place} differs from the zero-branch reference in {mode} mode at "
            f"{_locate(dense, kept, call, mode)}: {difference}"
        )
    # A gradient may be zero but for rounding (a bias before batch normalisation), and rounding is
    # that of the whole backward pass.
    wanted = gradients or {}
    scale = max((_largest(gradient) for gradient in wanted.values()), default=0.0)
    for name, gradient in (kept_gradients or {}).items():
        reference_gradient = wanted.get(name, torch.zeros_like(gradient))
        difference = _difference(gradient, reference_gradient, _GRADIENT_ULPS, scale)
        if difference:
            raise VerificationError(
                f"{place}: the gradient of {name!r} differs from that of the zero-branch "
                f"reference in {mode} mode: {difference}"
            )


def _outcome(side: _Side, call: Call, mode: str, *, differentiate: bool) -> _Outcome:
    """Return outputs, and gradients of a fixed random projection of them by parameter name."""
    module = side.module.train(mode == "train")
    interpreted = _Interpreted(module, side.graph, seeded=True)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    fresh = _fresh(call)
    try:
        with torch.set_grad_enabled(differentiate):
            outputs = interpreted(*fresh.args, **fresh.kwargs)
            return outputs, _gradients(outputs, module) if differentiate else None
    finally:
        # The next run starts from the same running statistics.
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])


def _gradients(outputs: Any, module: nn.Module) -> dict[str, Tensor]:
    heads = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    # A tied weight has several names, and the ticket may have lost the first of them.
    every = module.named_parameters(remove_duplicate=False)
    named = {name: parameter for name, parameter in every if parameter.requires_grad}
    if not heads or not named:
        return {}
    generator = torch.Generator().manual_seed(_SEED)
    cotangents = [
        torch.rand(t.shape, generator=generator).to(device=t.device, dtype=t.dtype) - 0.5
        for t in heads
    ]
    found = torch.autograd.grad(heads, list(named.values()), cotangents, allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}


def _locate(dense: _Side, kept: _Side, call: Call, mode: str) -> str:
    """Return the name of the first node that both graphs have and that differs."""
    records: list[dict[str, Any]] = []
    for side in (dense, kept):
        interpreter = _Seeded(side.module.train(mode == "train"), graph=side.graph)
        interpreter.seen = {}
        with torch.no_grad():
            interpreter.run_call(_fresh(call))
        records.append(interpreter.seen)
    expected, found = records
    for name, value in found.items():
        if name in expected and _difference(value, expected[name], _OUTPUT_ULPS):
            return f"node {name!r}"
    return "its output"


# --- 3. the whole ---------------------------------------------------------------------------------


def _compare_whole(
    model: nn.Module,
    ticket: nn.Module,
    call: Call,
    references: Mapping[str, fx.Graph],
    types: Any,
) -> None:
    reference = assemble(structural_copy(model), dict(references), graph_module)
    expected = _run(reference, call, "eval")
    found = _run(structural_copy(ticket), call, "eval")
    if _types(found) != types:
        raise VerificationError(f"the ticket returns {_types(found)}, the dense model {types}")
    difference = _difference(found, expected, _OUTPUT_ULPS)
    if difference:
        raise VerificationError(
            f"the ticket differs from the zero-branch reference in eval mode: {difference}"
        )


# --- running and comparing ------------------------------------------------------------------------


def _interpret(*, seeded: bool) -> Callable[[str, nn.Module, fx.Graph], nn.Module]:
    return lambda path, module, graph: _Interpreted(module, graph, seeded=seeded)


def _run(model: nn.Module, call: Call, mode: str) -> Any:
    seed_rng(_SEED)
    fresh = _fresh(call)
    with torch.no_grad():
        return _snapshot(model.train(mode == "train")(*fresh.args, **fresh.kwargs))


def _region_calls(model: nn.Module, call: Call, graphs: Mapping[str, fx.Graph]) -> dict[str, Call]:
    """Return what each cut region is called with in one eager eval forward."""
    calls = {"": call}
    if set(graphs) <= {""}:
        return calls
    copy = structural_copy(model)

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(path, _fresh(Call(args, kwargs)))

        return hook

    for path in graphs:
        copy.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True)
    _run(copy, call, "eval")
    return calls


def _fresh(call: Call) -> Call:
    """Return the call with tensors of its own: a forward may write into its inputs."""
    return call.map(lambda tensor: tensor.detach().clone())


def _snapshot(value: Any) -> Any:
    """Return the value with tensors that a later in-place operation cannot reach."""
    return Call((value,), {}).map(lambda tensor: tensor.detach().clone()).args[0]


def _types(value: Any) -> Any:
    """Return the nested type names of an output."""
    if isinstance(value, Tensor):
        return "Tensor"
    name = type(value).__name__.removeprefix("immutable_")
    if isinstance(value, dict):
        return name, {key: _types(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return name, [_types(item) for item in value]
    return name


def _difference(found: Any, expected: Any, ulps: float, scale: float | None = None) -> str:
    """Describe the first difference of two nested values, or return an empty string.

    Numbers may differ by `ulps` units in the last place of `scale`, else of the largest expected.
    """
    ours, theirs = list(tensors_in(found)), list(tensors_in(expected))
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}"
        if torch.equal(a, b):
            continue
        if not (a.dtype.is_floating_point or a.dtype.is_complex):
            return f"{int((a != b).sum())} elements of a {a.dtype} tensor differ"
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(7.0), b[~finite].nan_to_num(7.0)):
            return "infinities or NaNs at other places"
        size = _largest(b[finite]) if scale is None else scale
        largest = _largest((a - b)[finite])
        # Not "largest > bound": a NaN where the reference is finite must not pass.
        if not largest <= ulps * torch.finfo(b.dtype).eps * size:
            return f"largest difference {largest:.3g} on values up to {size:.3g}"
    return ""


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
