"""Tickets against the dense model run eagerly with something switched off in it.

Nothing here traces. A branch is switched off where the eager model adds it (`branches.py`), a layer
by handing its input on (`passing.py`), and of the analysis only names are taken. Both models draw
alike (`draws.py`), and are compared in outputs, gradients and buffers (`outcome.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from blockprune.blocks import BlockAnalysis, ResidualBlock

from .branches import BranchNotFoundError, Finder, Switch, SwitchedOff
from .calls import OpenModules
from .outcome import Inputs, Outcome, copied, disagreements, floating, outcome_of
from .passing import PassedThrough
from .running import all_trainable, run

__all__ = ["ULPS", "Cut", "Oracle", "Verdict"]

ULPS = 8
"""Units in the last place of the largest value by which a ticket may be off."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """What was removed from a ticket: branch blocks, or layers as wholes."""

    branches: tuple[ResidualBlock, ...] = ()
    layers: tuple[ResidualBlock, ...] = ()

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all parameters that the removed blocks read."""
        blocks = (*self.branches, *self.layers)
        return frozenset(name for block in blocks for name in block.parameters)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a ticket compares with the reference in one mode; no problem means equal.

    Attributes:
        problems: every difference, or what kept the reference from being made.
        limits: what could not be compared, because the dense model itself cannot do it.
    """

    problems: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


class Oracle:
    """The eager dense model in one mode, and what its tickets are held against.

    Args:
        model: the dense model, which is not run itself and stays as it is.
        inputs: a Tensor, a tuple of arguments or a dict of keywords.
        analysis: of the branches of the model, for their names.
        sought: the branch blocks that tickets will lack.
        train: the mode.

    Attributes:
        refusal: why the dense model does not run in this mode; None where it does.
        limits: what it cannot do although it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        analysis: BlockAnalysis,
        sought: Sequence[ResidualBlock],
        *,
        train: bool,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.train = train
        self.refusal: str | None = None
        self.limits: tuple[str, ...] = ()
        self._switches: dict[str, list[Switch]] = {}
        self._unfound: dict[str, str] = {}
        self._dense: Outcome | None = None
        self._run_dense(analysis, sought)

    def verdict(self, ticket: nn.Module, cut: Cut, *, ulps: float = ULPS) -> Verdict:
        """Compare `ticket` with the dense model that has `cut` switched off."""
        assert self._dense is not None
        unfound = [self._unfound[b.name] for b in cut.branches if b.name in self._unfound]
        if unfound:
            found = "the oracle does not find the branch: "
            return Verdict(tuple(found + problem for problem in unfound), self.limits)
        try:
            reference, repeated = self._reference(cut)
        except Exception as error:
            return Verdict((f"the reference does not run: {_said(error)}",), self.limits)
        if not disagreements(self._outputs(reference), self._dense, ulps=0):
            return Verdict(("switching this off changes no output",), self.limits)
        try:
            found = self._outcome_of(copied(ticket))
        except Exception as error:
            return Verdict((f"the ticket fails where the dense model runs: {_said(error)}",))
        problems = disagreements(
            found,
            reference,
            ulps=ulps,
            but=self._shared(cut, repeated),
            removed=sum(len(block.branches) for block in (*cut.branches, *cut.layers)),
        )
        return Verdict(tuple(problems), self.limits)

    def _run_dense(self, analysis: BlockAnalysis, sought: Sequence[ResidualBlock]) -> None:
        try:
            # With inputs that autograd knows, also what is added to an input is found.
            model, output = self._watch(analysis, sought, differentiable=True)
        except Exception:
            try:
                model, output = self._watch(analysis, sought, differentiable=False)
            except Exception as error:
                self.refusal = _said(error)
                return
        try:
            outcome_of(model, output, backward=True)
        except RuntimeError as error:
            # Some models overwrite what their backward pass needs.
            self.limits = (f"no gradients, the dense model has none: {_said(error)}",)
        self._dense = self._outputs(outcome_of(model, output, backward=False))
        values = [leaf for leaf in self._dense.leaves if isinstance(leaf, Tensor)]
        if not any(bool(value.isfinite().any()) for value in values):
            self.refusal = "it returns no finite number"

    def _watch(
        self, analysis: BlockAnalysis, sought: Sequence[ResidualBlock], *, differentiable: bool
    ) -> tuple[nn.Module, Any]:
        """Run a copy of the dense model and find the branches in it; return it and its output."""
        model = copied(self.model).train(self.train)
        with all_trainable(model), OpenModules(model) as opened:
            with Finder(opened, sought) as finder:
                output = run(model, self.inputs, differentiable=differentiable)
            outputs = list(floating(pytree.tree_leaves(output)))
            for block in sought:
                try:
                    self._switches[block.name] = finder.find(block, analysis.blocks, outputs)
                except BranchNotFoundError as error:
                    self._unfound[block.name] = str(error)
            finder.forget()
        return model, output

    def _reference(self, cut: Cut) -> tuple[Outcome, set[str]]:
        """Return the outcome of the dense model without `cut`, and the modules it calls again."""
        model = copied(self.model).train(self.train)
        switches = [s for block in cut.branches for s in self._switches[block.name]]
        with OpenModules(model) as opened, PassedThrough(model, cut.layers):
            off = SwitchedOff(opened, switches)
            outcome = self._outcome_of(model, off)
        if off.missed:
            raise BranchNotFoundError(f"these adds were not come across again: {off.missed}")
        repeated = {path for path, module in model.named_modules() if opened.calls[id(module)] > 1}
        return outcome, repeated

    def _outcome_of(
        self, model: nn.Module, mode: contextlib.AbstractContextManager[Any] | None = None
    ) -> Outcome:
        with mode or contextlib.nullcontext():
            output = run(model.train(self.train), self.inputs)
        return outcome_of(model, output, backward=not self.limits)

    def _outputs(self, outcome: Outcome) -> Outcome:
        return dataclasses.replace(outcome, gradients=None, buffers={})

    def _shared(self, cut: Cut, repeated: set[str]) -> frozenset[str]:
        """Return the buffers that a switched-off call may have updated, unlike the ticket."""
        modules = repeated & {name.rpartition(".")[0] for name in cut.parameters}
        return frozenset(
            f"{path}.{name}"
            for path in modules
            for name, _ in self.model.get_submodule(path).named_buffers(recurse=False)
        )


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
