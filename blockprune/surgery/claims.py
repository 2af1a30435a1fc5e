"""What is proved of a ticket: that it is the dense model with the removed branches zeroed.

The shortest proof is one link: the ticket against the dense model's own forward, in which zeros
stand in the place of the branches. Where that way is closed (see `zeroing`), or does not hold,
there are two: the recorded graphs against the dense model as it is, and the ticket against these
graphs with zeros in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from blockprune.blocks import Cut
from blockprune.errors import VerificationError, raise_if_out_of_memory
from blockprune.randomness import AlikeDraws
from blockprune.surgery.comparing import difference_of, fresh, snapshot
from blockprune.surgery.proof import Link, Proof, Situation
from blockprune.surgery.zeroing import follow, zero_branches
from blockprune.tracing import CallInterpreter, TracedModel, structural_copy

__all__ = ["proof_of_cut"]


def proof_of_cut(
    model: nn.Module,
    traced: TracedModel,
    cuts: Sequence[Cut],
    references: Mapping[str, fx.Graph],
    graphs: Mapping[str, fx.Graph],
    *,
    is_shortened: bool,
) -> Proof:
    """Return the proof that tickets equal `model` with the branches of `cuts` zeroed.

    Args:
        model: the dense model.
        traced: its regions.
        cuts: the branches that go.
        references: region path to the graph with zeroed branches.
        graphs: region path to the ticket's graph.
        is_shortened: whether the ticket may lack layers; then there may be several to be proved,
            and regions inside them may be gone.
    """
    recorded = {r.path: r.graph for r in traced.regions if r.path in graphs}
    name = type(model).__name__

    def eager_with_zeros(copy: nn.Module) -> nn.Module:
        return zero_branches(copy, structural_copy(copy), recorded, cuts)

    def refusal(error: Exception) -> VerificationError:
        return VerificationError(
            "the ticket has nothing to be compared with: without these branches the dense model "
            f"fails in eval mode: {type(error).__name__}: {error}"
        )

    zeroed = "the zero-branch reference"
    return Proof(
        model,
        traced.call,
        links=(
            Link(
                reference=lambda copy: copy,
                found=partial(follow, graphs=recorded),
                what=f"the traced graph of {name}",
                reference_name="the model",
                advice=". The model's forward keeps state or depends on something that a trace "
                "cannot see; pass preserve_root=True to keep it.",
            ),
            Link(
                reference=partial(follow, graphs=references),
                what="the ticket",
                reference_name=zeroed,
                refusal=refusal,
                locate=partial(_first_node, references, graphs),
                # Without a branch, what is added to may have another precision.
                autocast=False,
            ),
        ),
        shortcut=Link(eager_with_zeros, "the ticket", zeroed, inner=False)
        if all(cut.branch.is_exact for cut in cuts)
        else None,
        paths=() if is_shortened else tuple(graphs),
        keep=is_shortened,
    )


def _first_node(
    references: Mapping[str, fx.Graph],
    graphs: Mapping[str, fx.Graph],
    reference: nn.Module,
    ticket: nn.Module,
    situation: Situation,
) -> str:
    """Return " at " and the first node that both graphs have and that differs; "" if none does."""
    try:
        expected, found = (
            _values(reference, references, situation),
            _values(ticket, graphs, situation),
        )
    except Exception as error:
        raise_if_out_of_memory(error)
        return ""
    for (path, name), value in found.items():
        if (path, name) in expected and difference_of(value, expected[path, name]):
            return f" at node {name!r}" + (f" of {path!r}" if path else "")
    return ""


def _values(
    model: nn.Module, graphs: Mapping[str, fx.Graph], situation: Situation
) -> dict[tuple[str, str], Any]:
    seen: dict[tuple[str, str], Any] = {}
    copy = follow(structural_copy(model), graphs, lambda path: partial(_Seeing, seen, path))
    module = copy.get_submodule(situation.path).train(situation.train)
    call = fresh(situation.call)
    with torch.no_grad(), AlikeDraws({m: name for name, m in copy.named_modules()}):
        module(*call.args, **call.kwargs)
    return seen


class _Seeing(CallInterpreter):
    """Keep what each node of the graph at `path` computes first."""

    def __init__(
        self, seen: dict[tuple[str, str], Any], path: str, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.seen = seen
        self.path = path

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen.setdefault((self.path, n.name), snapshot(value))
        return value
