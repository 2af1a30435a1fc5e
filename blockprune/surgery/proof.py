"""The proof that a ticket is right, carried out on the spot: for blocks, lists and filters alike.

A proof is a chain of links, each of which says that one model computes what another one does. What
runs are copies whose weights hide nothing, so that neither the ticket nor the dense model notices:

* on the example inputs, in eval and in train mode: types, outputs, buffers, and the gradients of
  the parameters that are left;
* in eval mode on other inputs, where the dense model takes them: another batch size, other image or
  sequence sizes, other values and masks;
* in eval mode under autocast, where that is not slow beyond measure.

The same is drawn at random on both sides. Removing a branch adds nothing but zero, so values agree
exactly but for a few units in the last place, and under autocast exactly. What differs by more is
computed again in float64. Lack of memory is a `MemoryError`, and never a reason to compare less.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    Difference,
    Outcome,
    fresh,
    gradients_of,
    is_coarse,
    outcomes_differ,
    snapshot,
)
from blockprune.surgery.hiding import changed_weights, changes_of, described, doubled, other_calls
from blockprune.tracing import Call, copy_model, isolated, refused, structural_copy, tensors_in

__all__ = ["Link", "Proof", "Verified"]

# Parameters times positions of the input: where no device computes fast in it, autocast is slow.
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
    """What two models are run in.

    Attributes:
        name: in words.
        call: the inputs.
        path: of the module that is called; "" for the model.
        train, differentiate, autocast: in which mode, and whether there are gradients.
        is_example: whether the inputs are those that the ticket was cut with.
    """

    name: str
    call: Call
    path: str = ""
    train: bool = False
    differentiate: bool = False
    autocast: bool = False
    is_example: bool = True


@dataclass(frozen=True)
class Link:
    """One link of a proof: what is compared with what.

    Attributes:
        reference: turns a copy of the dense model into what is trusted.
        what, reference_name: what is compared with what, in words.
        found: turns a copy of the dense model into what is compared; None where that is the ticket.
        advice: what a message about a difference ends in.
        refusal: makes the error of the one that the reference raises on the example inputs.
        locate: says where, in a situation, reference and ticket differ first.
        autocast: whether both sides are of one precision under autocast.
        inner: whether modules inside can be run on their own.
    """

    reference: Callable[[nn.Module], nn.Module]
    what: str
    reference_name: str
    found: Callable[[nn.Module], nn.Module] | None = None
    advice: str = ""
    refusal: Callable[[Exception], Exception] | None = None
    locate: Callable[[nn.Module, nn.Module, Situation], str] | None = None
    autocast: bool = True
    inner: bool = True


class ApartInNumbers(VerificationError):
    """Finite numbers differ by more than a few units in the last place, and nothing else does."""


@dataclass
class Proof:
    """The proof of tickets of one dense model.

    Attributes:
        model: the dense model.
        call: the example inputs.
        links: the proof.
        shortcut: one link that says as much in less time, where it holds.
        paths: modules that both have, whose own outputs are compared as well.
        fitted: cuts tensors, by the names of the dense model, down to what is left in a ticket.
        draws: what makes both sides draw the same.
        wide: how much more room than usual numbers have in float64.
        keep: whether to remember what the references give, for more than one ticket.
        changes: what is added to weights that could hide a difference, by name.
    """

    model: nn.Module
    call: Call
    links: Sequence[Link]
    shortcut: Link | None = None
    paths: Sequence[str] = ()
    fitted: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors
    draws: Callable[[Mapping[nn.Module, str]], AlikeDraws] = AlikeDraws
    wide: float = 1.0
    keep: bool = False
    changes: Mapping[str, Tensor] = field(init=False, default_factory=dict)
    _kept: dict[tuple[int, bool], list[tuple[Situation, Outcome]]] = field(default_factory=dict)

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
        with isolated(), memory_errors():
            self.changes = changes_of(self.model)
            return self._by_shortcut(ticket, names) or self._in_some_precision(ticket, names)

    def _by_shortcut(self, ticket: nn.Module, names: Callable[[str], str]) -> Verified | None:
        if self.shortcut is None:
            return None
        try:
            room = 0.0 if is_coarse(self.model) else 1.0
            return self._carried_out([self.shortcut], ticket, names, room)
        except Exception as error:
            raise_if_out_of_memory(error)
            return None

    def _in_some_precision(self, ticket: nn.Module, names: Callable[[str], str]) -> Verified:
        coarse = is_coarse(self.model)
        try:
            return self._carried_out(self.links, ticket, names, 0.0 if coarse else 1.0)
        except ApartInNumbers as error:
            apart = VerificationError(str(error))
        # Another order of summation rounds otherwise; in float64 nothing but that is left of it.
        try:
            return self._carried_out(self.links, ticket, names, self.wide, in_float64=True)
        except VerificationError:
            raise apart from None
        except Exception as error:
            raise_if_out_of_memory(error)
            # The model does not run in float64: then its own precision is all there is.
            if not coarse:
                raise apart from None
        try:
            return self._carried_out(self.links, ticket, names, 1.0)
        except ApartInNumbers as error:
            raise VerificationError(str(error)) from None

    def _carried_out(
        self,
        links: Sequence[Link],
        ticket: nn.Module,
        names: Callable[[str], str],
        room: float,
        *,
        in_float64: bool = False,
    ) -> Verified:
        compared: dict[str, bool] = {}
        for link in links:
            if link.found is None:
                model = self._copy(ticket, in_float64, self.fitted(self.changes), names)
                comparison = _Comparison(self, link, model, names, room, in_float64)
            else:
                model = link.found(self.dense(in_float64))
                comparison = _Comparison(self, link, model, str, room, in_float64)
            for situation, expected in self._trusted(link, in_float64):
                found = comparison.outcome(situation, expected)
                if found is not None:
                    compared[_in_words(situation, found)] = situation.train
        modes = ("eval", "train") if any(compared.values()) else ("eval",)
        return Verified(modes, tuple(compared))

    def dense(self, in_float64: bool) -> nn.Module:
        """Return a copy of the dense model with weights that hide nothing."""
        return self._copy(self.model, in_float64, self.changes)

    def _copy(
        self,
        model: nn.Module,
        in_float64: bool,
        changes: Mapping[str, Tensor],
        names: Callable[[str], str] = str,
    ) -> nn.Module:
        copy = copy_model(model).double() if in_float64 else structural_copy(model)
        return changed_weights(copy, changes, names)

    def _trusted(self, link: Link, in_float64: bool) -> Iterator[tuple[Situation, Outcome]]:
        """Yield each situation that the reference of a link runs in, and what it gives there."""
        kept = self._kept.get((id(link), in_float64))
        if kept is not None:
            yield from kept
            return
        reference = link.reference(self.dense(in_float64))
        call = self.call.map(_widened) if in_float64 else self.call
        runs = _Runs(self, link, reference, call).outcomes()
        if self.keep:
            self._kept[id(link), in_float64] = kept = list(runs)
            runs = iter(kept)
        yield from runs

    def run(self, model: nn.Module, situation: Situation, names: Callable[[str], str]) -> Outcome:
        """Return what comes of a model of our own in a situation; its buffers stay as they are."""
        own = {names(name): module for name, module in model.named_modules()}
        module = own[situation.path].train(situation.train)
        before = [(holder, dict(holder._buffers)) for holder in module.modules()]
        owned = [b for _, buffers in before for b in buffers.values() if b is not None]
        values = [buffer.clone() for buffer in owned]
        taken: list[Any] = []
        listening = [
            own[path].register_forward_hook(lambda module, args, output: taken.append(output))
            for path in self.paths
            if path and not situation.path
        ]
        call = fresh(situation.call)
        draws = self.draws({module: name for name, module in own.items()})
        seed_rng(SEED)
        try:
            with torch.set_grad_enabled(situation.differentiate), draws, _precision(situation):
                outputs = module(*call.args, **call.kwargs)
                gradients = None
                if situation.differentiate:
                    gradients = gradients_of((outputs, taken), module)
            buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
            return Outcome(snapshot(outputs), snapshot(taken), buffers, gradients)
        finally:
            for handle in listening:
                handle.remove()
            with torch.no_grad():
                for buffer, value in zip(owned, values, strict=True):
                    buffer.copy_(value)
            for holder, buffers in before:
                holder._buffers.update(buffers)


def _in_words(situation: Situation, outcome: Outcome) -> str:
    count = len(outcome.gradients or ())
    return f"{situation.name}: outputs" + (f", {count} gradients" if count else "")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _precision(situation: Situation) -> contextlib.AbstractContextManager[Any]:
    if not situation.autocast:
        return contextlib.nullcontext()
    return torch.autocast(_device_of(situation.call), torch.bfloat16)


def _device_of(call: Call) -> str:
    return next((t.device.type for t in tensors_in((call.args, call.kwargs))), "cpu")


# --- what is trusted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """The runs of what one link of a proof trusts."""

    proof: Proof
    link: Link
    reference: nn.Module
    call: Call

    def outcomes(self) -> Iterator[tuple[Situation, Outcome]]:
        """Yield each situation that the reference runs in, and what it gives there."""
        refusals: list[Exception] = []
        yield from self._in_mode(Situation("eval", self.call), refusals)
        if refusals:
            raise self._refused(refusals[0])
        yield from self._in_mode(Situation("train", self.call, train=True), refusals)
        if refusals and any(self.proof.paths):
            if not self.link.inner:
                raise VerificationError("the model does not run in train mode on these inputs")
            yield from self._inside()
        smallest = self.call
        together, apart, besides = other_calls(self.call)
        is_taken = False
        for calls in ([together], apart, [besides]):
            if calls is apart and is_taken:
                continue
            for situation, outcome in itertools.chain(*map(self._on_others, calls)):
                yield situation, outcome
                is_taken = True
                smallest = min(smallest, situation.call, key=_positions)
        if self.link.autocast and self._has_autocast(smallest):
            situation = Situation("eval, autocast", smallest, autocast=True, is_example=False)
            yield from self._first([situation], [])

    def _in_mode(
        self, situation: Situation, refusals: list[Exception]
    ) -> Iterator[tuple[Situation, Outcome]]:
        # A single value a channel cannot be normalised in train mode; two samples can. And some
        # networks overwrite what their backward needs.
        candidates = [
            replace(situation, call=call, differentiate=differentiate)
            for differentiate in (True, False)
            for call in (situation.call, doubled(situation.call))
        ]
        yield from self._first(candidates, refusals)

    def _inside(self) -> Iterator[tuple[Situation, Outcome]]:
        """Yield what the modules inside give in train mode, where the model around does not run."""
        calls: dict[str, Call] = {}

        def record(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.setdefault(path, fresh(Call(args, kwargs)))

            return hook

        handles = [
            self.reference.get_submodule(p).register_forward_pre_hook(record(p), with_kwargs=True)
            for p in self.proof.paths
            if p
        ]
        self.proof.run(self.reference, Situation("eval", self.call), str)
        for handle in handles:
            handle.remove()
        for path, call in calls.items():
            situation = Situation(f"train, {path!r} alone", call, path, train=True)
            yield from self._in_mode(situation, [])

    def _on_others(self, calls: Sequence[Call]) -> Iterator[tuple[Situation, Outcome]]:
        situations = [Situation(f"eval, {described(c)}", c, is_example=False) for c in calls]
        yield from self._first(situations, [])

    def _first(
        self, situations: Sequence[Situation], refusals: list[Exception]
    ) -> Iterator[tuple[Situation, Outcome]]:
        """Yield the first situation that the reference runs in; else note why it runs in none."""
        found: list[Exception] = []
        for situation in situations:
            try:
                outcome = self.proof.run(self.reference, situation, str)
            except VerificationError:
                # It runs, and not as it was recorded.
                raise
            except Exception as error:
                raise_if_out_of_memory(error)
                found.append(error)
            else:
                yield situation, outcome
                return
        refusals.extend(found)

    def _refused(self, error: Exception) -> Exception:
        if self.link.refusal is not None:
            return self.link.refusal(error)
        return refused(self.proof.model, self.call, error)

    def _has_autocast(self, call: Call) -> bool:
        device = _device_of(call)
        if is_coarse(self.reference) or not torch.amp.is_autocast_available(device):
            return False
        numbers = sum(parameter.numel() for parameter in self.reference.parameters())
        is_fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return is_fast or numbers * _positions(call) < SLOW_AUTOCAST


def _positions(call: Call) -> int:
    """Return how many positions, in images and sequences, a call has at the most."""
    sizes = (t.numel() // t.shape[-3] if t.dim() > 3 else t.numel() for t in _nonempty(call))
    return max(sizes, default=1)


def _nonempty(call: Call) -> list[Tensor]:
    return [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.numel()]


# --- what is compared with it ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """One model, compared in one situation after the other with what is trusted."""

    proof: Proof
    link: Link
    model: nn.Module
    names: Callable[[str], str]
    room: float
    in_float64: bool

    def outcome(self, situation: Situation, expected: Outcome) -> Outcome | None:
        """Return what it gives, the same as expected; None where a guard of ours refuses others.

        Raises:
            VerificationError: it gives something else.
        """
        situation = replace(situation, differentiate=expected.gradients is not None)
        try:
            found = self.proof.run(self.model, situation, self.names)
        except Exception as error:
            raise_if_out_of_memory(error)
            if isinstance(error, TraceError) and not situation.is_example:
                return None
            raise VerificationError(
                f"{self.link.what} fails where {self.link.reference_name} runs, in "
                f"{_mode(situation)}: {type(error).__name__}: {error}"
            ) from error
        expected = self._fitted(expected)
        room = 0.0 if situation.autocast else self.room
        difference = outcomes_differ(found, expected, self.names, room)
        if difference:
            raise self._apart(situation, difference)
        return found

    def _fitted(self, expected: Outcome) -> Outcome:
        gradients = expected.gradients
        return replace(
            expected,
            buffers=self.proof.fitted(expected.buffers),
            gradients=None if gradients is None else self.proof.fitted(gradients),
        )

    def _apart(self, situation: Situation, difference: Difference) -> VerificationError:
        place = ""
        if self.link.locate and situation.is_example and not difference.is_behind:
            dense = self.proof.dense(self.in_float64)
            place = self.link.locate(dense, self.model, situation)
        # Under autocast both sides round alike, and in float64 it does nothing.
        is_apart = difference.may_be_rounding and not situation.autocast
        return (ApartInNumbers if is_apart else VerificationError)(
            f"{self.link.what} differs from {self.link.reference_name}, in {_mode(situation)}"
            f"{place}: {difference}{self.link.advice}"
        )


def _mode(situation: Situation) -> str:
    mode, _, rest = situation.name.partition(", ")
    return f"{mode} mode" + (f" ({rest})" if rest else "")
