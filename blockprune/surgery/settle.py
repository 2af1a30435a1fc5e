"""Taking layers that became a pass-through out of the lists that hold them.

Inside a model that keeps its class, a layer whose branches are all gone need not stay as a module
that does nothing: `for layer in self.layers` runs as well over a shorter list. Whether the code
around a list agrees (it may ask for `self.layers[3]`) is not guessed but tried: what is proved of a
ticket with pass-throughs must hold for the shorter model. In lists where it does not, the
pass-throughs stay.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import fx, nn

from blockprune.blocks import Cut, Cuts, lies_in
from blockprune.errors import VerificationError, memory_errors
from blockprune.surgery.configuration import follow_configuration, has_configuration
from blockprune.surgery.graph_module import graph_module
from blockprune.surgery.lists import (
    Removal,
    is_in_list,
    moved_up,
    removals,
    renumber,
    take_out,
)
from blockprune.surgery.proof import Proof, Verified
from blockprune.surgery.record import translated
from blockprune.tracing import assemble, copy_model, isolated, structural_copy

__all__ = ["Settled", "layers_to_take_out", "settle"]


@dataclasses.dataclass(frozen=True)
class Settled:
    """A ticket without the layers that became a pass-through.

    Attributes:
        ticket: the ticket.
        graphs: region path to graph, of the regions in it that are graphs.
        renamed: for each layer that moved up in its list, its name to the one before.
        reference: a model of as many layers with nothing cut; None where layers did not go.
        drift: what a model built from the configuration would compute with another number, if any.
        verified: what was compared of it; None where nothing was.
    """

    ticket: nn.Module
    graphs: dict[str, fx.Graph]
    renamed: dict[str, str]
    reference: nn.Module | None = None
    drift: str = ""
    verified: Verified | None = None

    def name_of(self, name: str) -> str:
        """Return what a module or parameter of the ticket is called in the dense model."""
        return translated(name, self.renamed)


def layers_to_take_out(
    model: nn.Module, cuts: Cuts, chosen: Sequence[Cut], lists: Collection[str] | None = None
) -> tuple[list[Removal], set[str]]:
    """Return what can go from which list, and the paths of the regions that it covers.

    A layer can go where nothing is left of it but its input, and where the region that it lies in
    loses such layers only: any other cut makes that region a graph, in which there are no lists.
    `lists`: paths of the lists that are looked at, None for all.
    """
    nested = set(cuts.lying_in(chosen))
    gone = nested | {cut.name for cut in chosen}
    # What lies wholly in branches that go vanishes with them.
    ways = {
        name: [cuts.branches[part] for part in parts]
        for name, parts in cuts.layers.items()
        if gone.issuperset(parts) and not nested.issuperset(parts)
    }
    for cut in chosen:
        if not cut.branch.is_exact and cut.name not in nested:
            ways.setdefault(cut.name, []).append(cut)
    ways = {
        name: parts
        for name, parts in ways.items()
        if is_in_list(model, name)
        and (lists is None or name.rpartition(".")[0] in lists)
        # Who draws or counts once a layer would do so less often.
        and not any(lies_in(name, path) for path in cuts.stateful if path != name)
    }
    covered = {cut for parts in ways.values() for cut in parts}
    graphs = {cut.flow for cut in chosen if cut not in covered}
    names = [n for n, parts in ways.items() if graphs.isdisjoint(cut.flow for cut in parts)]
    # Lists inside a layer that goes go with it.
    names = [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]
    return removals(model, names), {
        cut.flow.region.path for cut in chosen if cut.flow not in graphs
    }


def settle(
    model: nn.Module,
    graphs: Mapping[str, fx.Graph],
    cuts: Cuts,
    chosen: Sequence[Cut],
    proof: Proof,
    *,
    renumbered: bool,
    told: bool,
) -> Settled:
    """Return the ticket without its pass-throughs, as far as the proof holds for it.

    Args:
        model: the dense model.
        graphs: region path to the ticket's graph.
        cuts, chosen: the branches of the model, and those that go.
        proof: of what the ticket must compute.
        renumbered: whether the layers behind are to have the names of a shallower model.
        told: whether to warn of pass-throughs that stay.
    """
    gone, covered = layers_to_take_out(model, cuts, chosen)
    why = ""

    def proved(form: Settled) -> Settled | None:
        nonlocal why
        try:
            return dataclasses.replace(form, verified=proof.of(form.ticket, form.name_of))
        except VerificationError as error:
            why = str(error)
            return None

    def attempt(gone: list[Removal], covered: set[str], *, final: bool) -> Settled | None:
        inside = {path: graph for path, graph in graphs.items() if path not in covered}
        for follows in (True, False) if has_configuration(model) else (False,):
            shorter = _without(model, inside, gone, final, follows, renumbered)
            form = shorter and proved(shorter)
            if form is not None:
                if final and has_configuration(model) and not follows:
                    _warn("the configuration could not be brought in step with the layers left", 6)
                if final and form.drift:
                    _warn(f"a model read from the configuration differs: {form.drift}", 6)
                return form
        return None

    found = attempt(gone, covered, final=True)
    if found is None and len(gone) > 1:
        ways = {r.path: layers_to_take_out(model, cuts, chosen, [r.path]) for r in gone}
        good = [path for path, way in ways.items() if way[0] and attempt(*way, final=False)]
        gone, covered = layers_to_take_out(model, cuts, chosen, good)
        found = attempt(gone, covered, final=True) if gone else None
    if found is None:
        if told:
            _warn(f"pass-throughs stay in the place of layers, since without them {why}", 5)
        with isolated(), memory_errors():
            ticket = assemble(copy_model(model), graphs, graph_module)
        found = Settled(ticket, dict(graphs), {})
    return found


def _without(
    model: nn.Module,
    graphs: dict[str, fx.Graph],
    gone: Sequence[Removal],
    final: bool,
    follows: bool,
    renumbered: bool,
) -> Settled | None:
    """Return a copy of `model` with these graphs and without these layers.

    `follows`: with its configuration in step, or None where that is not possible.
    """
    with isolated(), memory_errors():
        # What is only tried out shares its weights.
        ticket = assemble((copy_model if final else structural_copy)(model), graphs, graph_module)
    take_out(ticket, gone)
    reference, drift = None, ""
    if follows:
        followed = follow_configuration(model, ticket, gone)
        if followed is None:
            return None
        reference, drift = followed
    if not renumbered:
        return Settled(ticket, graphs, {}, reference, drift)
    renumber(ticket, gone)
    return Settled(ticket, graphs, moved_up(gone), reference, drift)


def _warn(what: str, stacklevel: int) -> None:
    warnings.warn(f"{what}.", stacklevel=stacklevel)
