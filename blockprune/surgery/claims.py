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
from blockprune.randomness import AlikeDraws
from blockprune.surgery.comparing import Differs, compare, fresh, snapshot
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
    shared: Sequence[str] = (),
) -> Proof:
    """Return the proof that tickets equal `model` with the branches of `cuts` zeroed.

    Args:
        model: the dense model.
        traced: its regions.
        cuts: the branches that go.
        references: region path to the graph with zeroed branches.
        graphs: region path to the ticket's graph.
        is_shortened: whether tickets may lack layers, and regions inside these.
        shared: modules that a branch that goes and what stays both call.
    """
    recorded = {r.path: r.graph for r in traced.regions if r.path in graphs}
    zeroed = "the zero-branch reference"

    def zeroing(copy: nn.Module) -> nn.Module:
        return zero_branches(copy, structural_copy(copy), recorded, cuts)

    def first_node(dense: nn.Module, ticket: nn.Module, situation: Situation) -> str:
        if is_shortened:
            return ""
        expected, found = _values(dense, references, situation), _values(ticket, graphs, situation)
        for (path, name), value in found.items():
            try:
                compare(value, expected.get((path, name), value))
            except Differs:
                return f" at node {name!r}" + (f" of {path!r}" if path else "")
        return ""

    recording = Link(
        f"the traced graph of {type(model).__name__}",
        "the model (its forward may keep state, or depend on what a trace cannot see; pass "
        "preserve_root=True to keep it)",
        lambda copy: copy,
        partial(follow, graphs=recorded),
    )
    # Without a branch, what it is added to may have another precision under autocast.
    rewriting = Link(
        "the ticket",
        zeroed,
        partial(follow, graphs=references),
        rounds_alike=False,
        locate=first_node,
    )
    exact = all(cut.branch.is_exact for cut in cuts)
    return Proof(
        model,
        traced.call,
        (recording, rewriting),
        shortcut=Link("the ticket", zeroed, zeroing) if exact else None,
        paths=() if is_shortened else tuple(graphs),
        shared=shared,
    )


def _values(
    model: nn.Module, graphs: Mapping[str, fx.Graph], situation: Situation
) -> dict[tuple[str, str], Any]:
    """Return what each node of each graph computes in a situation."""
    seen: dict[tuple[str, str], Any] = {}
    copy = follow(structural_copy(model), graphs, lambda path: partial(_Seeing, seen, path))
    copy.eval()
    for path in situation.training:
        copy.get_submodule(path).train()
    call = fresh(situation.call)
    with torch.no_grad(), AlikeDraws({m: name for name, m in copy.named_modules()}):
        copy(*call.args, **call.kwargs)
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
