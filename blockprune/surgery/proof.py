"""The proof that a ticket is right, carried out on the spot: for blocks, lists and filters alike.

A proof is a chain of links, each of which says that one model computes what another one does. What
runs are copies whose weights hide nothing, so that neither the ticket nor the dense model notices:

* on the example inputs, in eval and in train mode: outputs, buffers, and the gradients of what is
  left;
* in eval mode on inputs of another batch size, of other sizes and of other values, where the dense
  model takes them;
* in eval mode under autocast, where that is not slow beyond measure.

Both sides draw the same at random. Removing a branch adds nothing but zero, so values agree exactly
but for a few units in the last place; what differs by more must agree in float64. Lack of memory is
a `MemoryError`, and never a reason to compare less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import (
    TraceError,
    VerificationError,
    memory_errors,
    raise_if_out_of_memory,
)
from blockprune.randomness import AlikeDraws, seed_rng
from blockprune.surgery.comparing import (
    SEED,
    Differs,
    Outcome,
    compare_outcomes,
    fresh,
    given_back,
    gradients_of,
    is_coarse,
    snapshot,
)
from blockprune.surgery.hiding import changed_weights, changes_of, doubled, other_calls, shapes_of
from blockprune.tracing import (
    Call,
    aliased_copy,
    copy_model,
    isolated,
    refused,
    structural_copy,
    surroundings_kept,
    tensors_in,
)

__all__ = ["Link", "Proof", "Situation", "Verified"]

# Parameters times numbers in the input, where a processor does not compute in half precision.
SLOW_AUTOCAST = 1e9


@dataclass(frozen=True)
class Verified:
    """What a proof has compared.

    Attributes:
        modes: ("eval", "train"), or ("eval",) where the dense model does not run in train mode.
        compared: each comparison in words, such as "train: outputs, 62 gradients".
    """

    modes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Situation:
    """What models are run in; `training` holds the paths of the modules in train mode."""

    name: str
    call: Call
    training: tuple[str, ...] = ()
    differentiate: bool = False
    autocast: bool = False
    is_example: bool = True

    def __str__(self) -> str:
        mode, _, inputs = self.name.partition(", ")
        return f"{mode} mode" + (f" ({inputs})" if inputs else "")


@dataclass(frozen=True)
class Link:
    """One link of a proof: that one model, `what`, computes what another, `than`, does.

    Attributes:
        what, than: the two, in words.
        reference: turns a copy of the dense model into the second.
        found: turns one into the first; None where that is the ticket.
        rounds_alike: whether the two have one precision everywhere under autocast.
        locate: says where in a situation first and second differ first.
    """

    what: str
    than: str
    reference: Callable[[nn.Module], nn.Module]
    found: Callable[[nn.Module], nn.Module] | None = None
    rounds_alike: bool = True
    locate: Callable[[nn.Module, nn.Module, Situation], str] = lambda *models: ""


class _ApartInNumbers(VerificationError):
    """Finite numbers differ by more than a few units in the last place, and nothing else does."""


@dataclass(frozen=True)
class Proof:
    """The proof of tickets of one dense model.

    Attributes:
        model, call: the dense model and the example inputs.
        links: the proof.
        shortcut: one link that says as much in less time, where it holds.
        paths: modules whose own outputs are compared too, and which train where the model does not.
        fitted: cuts tensors, by the names of the dense model, down to what is left in a ticket.
        draws: what makes both sides draw the same, given the names of modules.
        wide: how much more room than usual numbers have in float64.
        shared: modules that a branch that goes and what stays both call. Their statistics in train
            mode are those of the calls that stay, which a warning says, and are not compared.
    """

    model: nn.Module
    call: Call
    links: Sequence[Link]
    shortcut: Link | None = None
    paths: Sequence[str] = ()
    fitted: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors
    draws: Callable[[Mapping[nn.Module, str]], AlikeDraws] = AlikeDraws
    wide: float = 1.0
    shared: Sequence[str] = ()

    def of(self, ticket: nn.Module, names: Callable[[str], str] = str) -> Verified:
        """Prove `ticket`, and return what was compared.

        Args:
            ticket: is left as it is.
            names: turns the name of a module or parameter of it into that in the dense model.

        Raises:
            VerificationError: says what differs, or why nothing can be compared.
            TraceError: the dense model does not run on the example inputs.
            MemoryError: there is not enough memory.
        """
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_meta:
                raise VerificationError(
                    f"a ticket is verified by the values it computes, and {name!r} has none: it is "
                    "on the meta device. Pass verify=False, or a model with weights."
                )
        room = 0.0 if is_coarse(self.model) else 1.0
        with isolated(), memory_errors():
            if self.shortcut is not None:
                try:
                    return self._carried_out([self.shortcut], ticket, names, room)
                except Exception as error:
                    # The links may hold all the same; if not, they say what is wrong.
                    raise_if_out_of_memory(error)
            try:
                return self._carried_out(self.links, ticket, names, room)
            except _ApartInNumbers as error:
                return self._in_float64(ticket, names, VerificationError(str(error)))

    def _in_float64(
        self, ticket: nn.Module, names: Callable[[str], str], apart: VerificationError
    ) -> Verified:
        """Prove what is `apart` in its own precision: nothing is left of rounding in float64."""
        wide = replace(self, call=self.call.map(_widened))
        try:
            return wide._carried_out(self.links, ticket, names, self.wide, _in_double)
        except VerificationError:
            raise apart from None
        except Exception as error:
            raise_if_out_of_memory(error)
            # The model does not run in float64: then its own precision is all there is.
            if not is_coarse(self.model):
                raise apart from None
        return self._carried_out(self.links, ticket, names, 1.0)

    def _carried_out(
        self,
        links: Sequence[Link],
        ticket: nn.Module,
        names: Callable[[str], str],
        room: float,
        copy: Callable[[nn.Module], nn.Module] = aliased_copy,
    ) -> Verified:
        changes = changes_of(self.model)
        dense = changed_weights(copy(self.model), changes)
        compared: dict[str, bool] = {}
        for link in links:
            found = link.found and link.found(structural_copy(dense))
            called = str if found else names
            found = found or changed_weights(copy(ticket), self.fitted(changes), names)
            for situation, expected in self._trusted(link, structural_copy(dense)):
                try:
                    outcome = self._outcome(link, found, situation, expected, called, room)
                except Differs as error:
                    # Under autocast both sides round alike; float64 would hide where they do not.
                    apart = error.may_be_rounding and not situation.autocast
                    where = link.locate(dense, found, situation) if error.is_of_outputs else ""
                    raise (_ApartInNumbers if apart else VerificationError)(
                        f"{link.what} differs from {link.than}, in {situation}{where}: {error}"
                    ) from None
                if outcome is not None:
                    count = len(outcome.gradients or ())
                    said = f"{situation.name}: outputs" + (f", {count} gradients" if count else "")
                    compared[said] = bool(situation.training)
                del expected, outcome  # the next run needs the memory
        return Verified(("eval", "train") if any(compared.values()) else ("eval",), (*compared,))

    def _outcome(
        self,
        link: Link,
        found: nn.Module,
        situation: Situation,
        expected: Outcome,
        names: Callable[[str], str],
        room: float,
    ) -> Outcome | None:
        """Return what `found` gives, which is as expected; None where it refuses other inputs."""
        situation = replace(situation, differentiate=expected.gradients is not None)
        try:
            outcome = self._run(found, situation, names)
        except Exception as error:
            raise_if_out_of_memory(error)
            if isinstance(error, TraceError) and not situation.is_example:
                return None
            raise VerificationError(
                f"{link.what} fails where {link.than} runs, in {situation}: "
                f"{type(error).__name__}: {error}"
            ) from error
        left = Outcome(
            expected.outputs,
            self._of_one(self.fitted(expected.buffers)),
            expected.gradients and self.fitted(expected.gradients),
            expected.given,
        )
        compare_outcomes(outcome, left, names, 0.0 if situation.autocast else room)
        return outcome

    def _of_one(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers without those of shared modules."""
        outer = tuple(f"{name}." for name in self.shared)
        return {key: value for key, value in buffers.items() if not key.startswith(outer)}

    def _trusted(self, link: Link, dense: nn.Module) -> Iterator[tuple[Situation, Outcome]]:
        """Yield each situation that the reference of a link runs in, and what it gives there."""
        reference = link.reference(dense)
        refusals: list[Exception] = []

        def first(*situations: Situation) -> Generator[tuple[Situation, Outcome], None, bool]:
            for situation in situations:
                try:
                    outcome = self._run(reference, situation, str)
                except VerificationError:
                    # It runs, and not as it was recorded.
                    raise
                except Exception as error:
                    raise_if_out_of_memory(error)
                    refusals.append(error)
                else:
                    yield situation, outcome
                    return True
            return False

        def example(name: str, *training: str) -> list[Situation]:
            # A single value a channel cannot be normalised in train mode; two samples can. And some
            # networks overwrite what their backward needs.
            calls = self.call, doubled(self.call)
            ways = [(call, differs) for differs in (True, False) for call in calls]
            return [Situation(name, call, training, differs) for call, differs in ways]

        if not (yield from first(*example("eval"))):
            if link is self.links[0]:
                raise refused(self.model, self.call, refusals[0])
            raise VerificationError(
                f"{link.what} has nothing to be compared with: without these branches the dense "
                f"model fails in eval mode: {type(refusals[0]).__name__}: {refusals[0]}"
            )
        inner = [path for path in self.paths if path]
        if not (yield from first(*example("train", ""))) and inner:
            yield from first(*example(f"train, {', '.join(inner)} alone", *inner))
        smallest = self.call
        for calls in other_calls(self.call):
            others = [Situation(f"eval, {shapes_of(c)}", c, is_example=False) for c in calls]
            for situation, outcome in first(*others):
                yield situation, outcome
                smallest = min(smallest, situation.call, key=_numbers_in)
        if link.rounds_alike and _has_autocast(dense, smallest):
            call, name = smallest, "eval, autocast"
            yield from first(Situation(name, call, autocast=True, is_example=False))

    def _run(self, model: nn.Module, situation: Situation, names: Callable[[str], str]) -> Outcome:
        """Return what comes of a model of our own in a situation; its buffers stay as they are."""
        own = {names(name): module for name, module in model.named_modules()}
        model.eval()
        for path in situation.training:
            own[path].train()
        buffers = [(holder, dict(holder._buffers)) for holder in model.modules()]
        values = {buffer: buffer.clone() for buffer in model.buffers()}
        taken: list[Any] = []
        hooks = [
            own[path].register_forward_hook(lambda module, args, output: taken.append(output))
            for path in self.paths
            if path
        ]
        call = fresh(situation.call)
        draws = self.draws({module: name for name, module in own.items()})
        seed_rng(SEED)
        try:
            with (
                surroundings_kept(model),
                torch.set_grad_enabled(situation.differentiate),
                draws,
                _precision(situation),
            ):
                outputs = model(*call.args, **call.kwargs), taken
                gradients = gradients_of(outputs, model) if situation.differentiate else None
            left = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
            given = given_back(outputs[0], call)
            return Outcome(snapshot(outputs), left, gradients, given)
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for buffer, value in values.items():
                    buffer.copy_(value)
            for holder, before in buffers:
                if not isinstance(holder, torch.jit.ScriptModule):
                    holder._buffers.update(before)


def _in_double(model: nn.Module) -> nn.Module:
    return copy_model(model).double()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _numbers_in(call: Call) -> int:
    return sum(tensor.numel() for tensor in tensors_in((call.args, call.kwargs)))


def _device_of(call: Call) -> str:
    return next((t.device.type for t in tensors_in((call.args, call.kwargs))), "cpu")


def _precision(situation: Situation) -> contextlib.AbstractContextManager[Any]:
    if not situation.autocast:
        return contextlib.nullcontext()
    return torch.autocast(_device_of(situation.call), torch.bfloat16)


def _has_autocast(model: nn.Module, call: Call) -> bool:
    device = _device_of(call)
    if is_coarse(model) or not torch.amp.is_autocast_available(device):
        return False
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    return sum(p.numel() for p in model.parameters()) * _numbers_in(call) < SLOW_AUTOCAST
