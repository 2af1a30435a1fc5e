"""`remove_blocks`: from a plan, or names, to a verified ticket."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from blockprune.blocks import BlockAnalysis, Cut, Flow, by_flow, find_blocks
from blockprune.errors import (
    ApproximationWarning,
    PlanError,
    StalePlanError,
    TraceError,
    memory_errors,
)
from blockprune.granularity import Granularity
from blockprune.plan import PruningPlan, named_plan
from blockprune.surgery.caches import fill_cache_slots
from blockprune.surgery.claims import proof_of_cut
from blockprune.surgery.configuration import has_configuration
from blockprune.surgery.graph_module import graph_module
from blockprune.surgery.lost import (
    warn_of_lost_hooks,
    warn_of_lost_statistics,
)
from blockprune.surgery.record import TicketRecord, attach, record_of, translated
from blockprune.surgery.rewrite import reference_graph, ticket_graph
from blockprune.surgery.settle import Settled, layers_to_take_out, settle
from blockprune.tracing import (
    LeafModules,
    assemble,
    copy_graph,
    copy_model,
    isolated,
    structural_copy,
    surroundings_kept,
)

__all__ = ["cut_blocks", "cuts_of", "remove_blocks"]


def remove_blocks(
    model: nn.Module,
    plan_or_names: PruningPlan | str | Iterable[str],
    example_inputs: Any,
    *,
    granularity: str = "branch",
    verify: bool = True,
    preserve_root: bool | None = None,
    leaf_modules: LeafModules | None = None,
) -> nn.Module:
    """Return a shallower copy of `model`: the ticket, with the named blocks gone.

    The ticket equals the dense model with the outputs of the removed branches multiplied by zero,
    in outputs and in gradients of the kept parameters, in eval and in train mode. It has the dense
    model's signature, output type, device, dtype, modes and `requires_grad`; the keys of its state
    are a subset of the dense ones. The dense model is left untouched.

    Args:
        model: the dense model, or a ticket to cut further.
        plan_or_names: a `PruningPlan`, or names of branch or layer blocks.
        example_inputs: what the forward takes: a Tensor, a tuple of arguments or a dict of
            keywords.
        granularity: that names are of, see `find_blocks`: it tells which block is meant where a
            branch and a layer share a name, and "layer_approx" allows post-norm layers. A plan has
            its own.
        verify: prove the equality on `example_inputs` before returning.
        preserve_root: keep the root module's class and methods; None: as the plan's analysis did,
            else no. Layers that became a pass-through
            are taken out of the `ModuleList` or `Sequential` that holds them; those behind keep
            their names. In a transformers model they move up, and its configuration follows. Where
            branches of a layer stay, the child of the root that holds it becomes a graph.
        leaf_modules: modules that are called and not looked into: classes, names of classes, or
            `fnmatch` patterns of qualified names; None: those of the plan, else none.

    Returns:
        A `torch.fx.GraphModule` where the model traces as a whole, else a copy of the model whose
        traced parts are `GraphModule`s.

    Raises:
        BlockNotFoundError, BlockNotRemovableError: a name is not that of a removable block.
        StalePlanError: the plan was made for a model of another structure.
        PlanError: neither a plan nor names, or a plan that was made with other `preserve_root` or
            `leaf_modules`.
        VerificationError: the ticket is not equal to its reference; nothing is returned.
        TraceError: the model does not run on `example_inputs`, or a block is inside what
            `torch.compile` returned.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> dense = resnet20()
        >>> ticket = blockprune.remove_blocks(dense, ["layer1.1"], torch.rand(2, 3, 32, 32))
        >>> sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in ticket.parameters())
        4704
    """
    asked = _names_of(plan_or_names)
    plan = asked if isinstance(asked, PruningPlan) else None
    if preserve_root is None:
        preserve_root = plan is not None and plan.preserve_root
    if leaf_modules is None:
        leaf_modules = () if plan is None else plan.leaf_modules
    analysis = find_blocks(
        model,
        example_inputs,
        granularity if plan is None else plan.granularity,
        preserve_root=preserve_root,
        leaf_modules=leaf_modules,
    )
    if not isinstance(asked, PruningPlan):
        asked = _plan_of_names(analysis, asked)
    return cut_blocks(model, analysis, asked, verify=verify)


def cut_blocks(
    model: nn.Module,
    analysis: BlockAnalysis,
    plan: PruningPlan,
    *,
    verify: bool = True,
    renumber: bool = True,
) -> nn.Module:
    """Carry out `plan` on `model`, which `analysis` was made of; see `remove_blocks`.

    `renumber`: whether layers of a kept root may move up in their lists.
    """
    _check_how(analysis, plan)
    preserve_root = analysis.preserve_root
    if plan.fingerprint != analysis.fingerprint:
        raise StalePlanError(
            f"the plan was made for a model of another structure (fingerprint "
            f"{plan.fingerprint[:12]}..., this {type(model).__name__} has "
            f"{analysis.fingerprint[:12]}...). Make a plan for this model, or pass the model, the "
            "granularity and the kind of example inputs that it was made with."
        )
    with surroundings_kept(model):
        cuts = cuts_of(analysis, plan.remove, plan.granularity)
        _warn_of_approximation(cuts)
        by_region = by_flow(cuts)
        graphs = {
            f.region.path: ticket_graph(f, group, analysis.cuts) for f, group in by_region.items()
        }
        references = {f.region.path: reference_graph(f, group) for f, group in by_region.items()}
        for region in analysis.traced.regions:
            if region.path == "" and region.path not in graphs:
                graphs[""], references[""] = (
                    copy_graph(region.graph)[0],
                    copy_graph(region.graph)[0],
                )
        _refuse_compiled(model, graphs)
        # A root that is a graph has no lists.
        has_lists = "" not in graphs and bool(layers_to_take_out(model, analysis.cuts, cuts)[0])
        with isolated(), memory_errors():
            # The ticket itself, unless layers are yet to be taken out of it.
            start = structural_copy if has_lists else copy_model
            form = Settled(assemble(start(model), graphs, graph_module), graphs, {})
        shared = _shared(analysis, by_region)
        proof = proof_of_cut(
            model,
            analysis.traced,
            cuts,
            references,
            graphs,
            is_shortened=has_lists,
            shared=shared,
        )
        if has_lists:
            form = settle(
                model,
                graphs,
                analysis.cuts,
                cuts,
                proof,
                # Its class and its configuration say what the layers of a shallower one are called.
                renumbered=renumber and preserve_root and has_configuration(model),
                told=renumber and preserve_root,
            )
        verified = form.verified
        if verify and verified is None:
            verified = proof.of(form.ticket)
        if has_configuration(form.ticket):
            check = partial(proof.of, form.ticket, form.name_of) if verify else lambda: None
            fill_cache_slots(form.ticket, form.reference or model, check)
        warn_of_lost_hooks(model, form.ticket, form.renamed, stacklevel=4)
        warn_of_lost_statistics(model, shared, analysis.traced.call, stacklevel=4)
        record = TicketRecord(
            plan=plan,
            call=analysis.traced.call.described(),
            preserve_root=preserve_root,
            removed=_removed(analysis, cuts),
            leaf_modules=analysis.traced.leaf_modules,
            verified=verified.modes if verified else (),
            compared=verified.compared if verified else (),
            renamed=form.renamed,
        )
        earlier = record_of(model)
        attach(form.ticket, record if earlier is None else _after(earlier, plan, record))
        return form.ticket


def _names_of(plan_or_names: PruningPlan | str | Iterable[str]) -> PruningPlan | list[str]:
    """Return a plan as it is, names as a list.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(plan_or_names, PruningPlan):
        return plan_or_names
    if isinstance(plan_or_names, str):
        return [plan_or_names]
    if isinstance(plan_or_names, Iterable):
        names = list(plan_or_names)
        if all(isinstance(name, str) for name in names):
            return names
    raise PlanError(
        f"What is to go is a PruningPlan, or names of blocks, not {plan_or_names!r}. "
        "blockprune.make_plan chooses a number of blocks; find_blocks lists their names."
    )


def _check_how(analysis: BlockAnalysis, plan: PruningPlan) -> None:
    """Refuse a plan for a model that was looked at in another way.

    Raises:
        PlanError: says what differs.
    """
    for name in ("preserve_root", "leaf_modules"):
        made, found = getattr(plan, name), getattr(analysis, name)
        if made != found:
            raise PlanError(
                f"the plan was made with {name}={made!r}, and the model was now analysed with "
                f"{name}={found!r}. Leave {name} out, and that of the plan is used; or make a plan "
                f"of find_blocks(..., {name}={found!r})."
            )


def _refuse_compiled(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse to put a graph inside a compiled module, which goes on calling what it compiled.

    Raises:
        TraceError: names that module.
    """
    for path in paths:
        parts = path.split(".") if path else []
        for end in range(len(parts) + 1):
            outer = ".".join(parts[:end])
            if isinstance(model.get_submodule(outer), torch._dynamo.OptimizedModule):
                place = f"{outer!r}" if outer else "the model"
                raise TraceError(
                    f"{place} is what torch.compile returned, and would go on computing what it "
                    "was made from. Remove blocks from the model as it was before (the _orig_mod "
                    "of a compiled module), and compile the ticket."
                )


def _after(earlier: TicketRecord, plan: PruningPlan, record: TicketRecord) -> TicketRecord:
    """Return the record of a ticket cut again: all that went, and names, as in the dense model."""
    removed = tuple(translated(name, earlier.renamed) for name in record.removed)
    is_approximate = "layer_approx" in (earlier.plan.granularity, plan.granularity)
    together = PruningPlan(
        remove=(*earlier.removed, *removed),
        granularity="layer_approx" if is_approximate else "branch",
        # Two rankings of two models are no ranking of one.
        criterion=None,
        scores={},
        p=None,
        fingerprint=earlier.plan.fingerprint,
        preserve_root=plan.preserve_root,
        leaf_modules=plan.leaf_modules,
    )
    moved = {new: translated(old, earlier.renamed) for new, old in record.renamed.items()}
    return dataclasses.replace(
        record,
        plan=together,
        call=earlier.call,
        removed=together.remove,
        renamed={**earlier.renamed, **moved},
        recovery=earlier.recovery,
    )


def _plan_of_names(analysis: BlockAnalysis, names: list[str]) -> PruningPlan:
    """Return the plan that removes these blocks and those nested in them."""
    cuts = cuts_of(analysis, names, analysis.granularity)
    return named_plan(analysis, _removed(analysis, cuts), _granularity_of(cuts))


def _removed(analysis: BlockAnalysis, cuts: Iterable[Cut]) -> tuple[str, ...]:
    """Return the branches that go with `cuts`, nested ones too, and the layers bypassed."""
    exact = [cut for cut in cuts if cut.branch.is_exact]
    bypassed = {cut.name for cut in cuts if not cut.branch.is_exact}
    gone = {cut.name for cut in exact}.union(analysis.cuts.lying_in(exact))
    branches = [name for name in analysis.cuts.branches if name in gone]
    return (*branches, *(name for name in analysis.cuts.bypasses if name in bypassed))


def _shared(analysis: BlockAnalysis, by_region: dict[Flow, list[Cut]]) -> list[str]:
    """Return the modules that both a branch that goes and what stays call."""
    found = []
    for flow, cuts in by_region.items():
        dead = flow.dead_without(analysis.cuts.replacements(cuts).get(flow, {}))
        called = {str(node.target) for node in dead if node.op == "call_module"}
        gone = set(flow.modules_gone(dead))
        found += [name for name in map(flow.region.qualified, sorted(called)) if name not in gone]
    return found


def _granularity_of(cuts: Iterable[Cut]) -> Granularity:
    return "branch" if all(cut.branch.is_exact for cut in cuts) else "layer_approx"


def cuts_of(analysis: BlockAnalysis, names: Iterable[str], granularity: str) -> list[Cut]:
    """Return the cuts that remove these blocks.

    Raises:
        BlockNotFoundError, BlockNotRemovableError: one of the names is not that of a block.
    """
    known = {*analysis.cuts.branches, *analysis.cuts.layers}
    if granularity == "layer_approx":
        known |= set(analysis.cuts.bypasses)
    for name in (names := list(names)):
        if name not in known:
            analysis.block(name)
    return analysis.cuts.of_blocks(names, granularity)


def _warn_of_approximation(cuts: Iterable[Cut]) -> None:
    names = [cut.name for cut in cuts if not cut.branch.is_exact]
    if names:
        warnings.warn(
            f"{', '.join(dict.fromkeys(names))}: the whole layer goes, normalisations on the "
            "stream included. The ticket is not the dense model with zeroed branches, but the one "
            "with these layers replaced by their input.",
            ApproximationWarning,
            stacklevel=4,
        )
