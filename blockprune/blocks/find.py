"""`find_blocks`: from a model to its removable residual blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from blockprune.blocks.cuts import Cut, Cuts, replacements_in
from blockprune.blocks.flow import Flow
from blockprune.blocks.layers import find_layers
from blockprune.blocks.naming import branch_names, numbered, owner_of
from blockprune.blocks.readers import ParameterReaders
from blockprune.blocks.rule import Branch, Refusal, examine
from blockprune.blocks.types import (
    BlockAnalysis,
    Reason,
    Rejection,
    ResidualBlock,
    Stage,
)
from blockprune.errors import PlanError
from blockprune.granularity import GRANULARITIES, Granularity
from blockprune.tracing import COMPILED, NOT_EXECUTED, LeafModules, TracedModel, trace_model

__all__ = ["find_blocks"]


def find_blocks(
    model: nn.Module,
    example_inputs: Any,
    granularity: str = "branch",
    *,
    preserve_root: bool = False,
    leaf_modules: LeafModules = (),
) -> BlockAnalysis:
    """Find every removable residual block of a model, and say why the other merges are none.

    The model is left untouched and need not be in any particular mode.

    Args:
        model: any `nn.Module`.
        example_inputs: what its forward takes: a Tensor, a tuple of arguments, or a dict of
            keywords.
        granularity: "branch": one identity shortcut, one block. "layer": the branches of one module
            whose output is its input once they are gone are one block named by that module.
            "layer_approx": beside those, layers that keep only normalisations without their
            branches (post-norm) are blocks that go whole. That is an approximation: it is not the
            dense model with branches multiplied by zero, and removing such a block warns.
        preserve_root: keep the root module's class; its children are looked into one by one.
        leaf_modules: modules that are called and not looked into: classes, names of classes, or
            `fnmatch` patterns of qualified names.

    Returns:
        The analysis; a model with no removable block gets one with no blocks.

    Raises:
        TraceError: the model does not run on `example_inputs`, or cannot be copied.
        PlanError: an unknown granularity.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> analysis = blockprune.find_blocks(resnet20(), torch.rand(1, 3, 32, 32))
        >>> analysis.names[:3]
        ('layer1.0', 'layer1.1', 'layer1.2')
    """
    if granularity not in GRANULARITIES:
        choices = ", ".join(map(repr, GRANULARITIES))
        raise PlanError(f"granularity must be one of {choices}, got {granularity!r}")
    with _collection_paused():
        traced = trace_model(
            model, example_inputs, preserve_root=preserve_root, leaf_modules=leaf_modules
        )
        return dataclasses.replace(_analyse(traced, granularity), preserve_root=preserve_root)


def _analyse(traced: TracedModel, granularity: Granularity) -> BlockAnalysis:
    flows = [Flow(region) for region in traced.regions]
    branches, refusals = _examine_all(flows)
    branch_cuts = _name_cuts(branches, refusals)
    refused = _name_refusals(refusals)
    places = {name: (flow, refusal.merge) for name, (flow, refusal) in refused.items()}
    cuts = Cuts(branch_cuts, *find_layers(branch_cuts), flows, places, traced.stateful)
    rejections = [*_rejections(refused), *_opaque(traced)]
    blocks = _blocks(cuts, granularity, ParameterReaders(traced, flows))
    stages = _stages(blocks, rejections)
    place = {name: index for index, stage in enumerate(stages) for name in stage.blocks}
    return BlockAnalysis(
        blocks=tuple(dataclasses.replace(block, stage=place[block.name]) for block in blocks),
        rejections=tuple(rejections),
        granularity=granularity,
        fingerprint=_fingerprint(traced.root, list(cuts.branches)),
        stages=tuple(stages),
        traced=traced,
        cuts=cuts,
    )


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep the garbage collector from walking the growing graphs again and again.

    An analysis makes many small objects that stay; walking them all each time their number has
    grown by a quarter is what would make its time grow faster than the model.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _examine_all(
    flows: Sequence[Flow],
) -> tuple[list[tuple[Flow, Branch]], list[tuple[Flow, Refusal]]]:
    """Put every merge of the model to the rule.

    Branches are in order of their ends, which is the same whatever the order of the adds; refusals
    in that of the merges.
    """
    branches: list[tuple[Flow, Branch]] = []
    refusals: list[tuple[Flow, Refusal]] = []
    for flow in flows:
        for verdict in examine(flow):
            if isinstance(verdict, Branch):
                branches.append((flow, verdict))
            else:
                refusals.append((flow, verdict))
    branches.sort(key=lambda pair: _place(pair[0], pair[1].branch))
    refusals.sort(key=lambda pair: _place(pair[0], pair[1].merge))
    return branches, refusals


def _place(flow: Flow, node: fx.Node) -> tuple[float, ...]:
    # A call of a module ends behind what a region of its own does in it.
    return (*flow.region.order, flow.index[node], math.inf)


def _name_cuts(
    branches: Sequence[tuple[Flow, Branch]], refusals: Sequence[tuple[Flow, Refusal]]
) -> dict[str, Cut]:
    names = branch_names(branches, refusals)
    return {
        name: Cut(name, flow, branch, frozenset(flow.dead_without(replacements_in(flow, [branch]))))
        for name, (flow, branch) in zip(names, branches, strict=True)
    }


def _name_refusals(refusals: Sequence[tuple[Flow, Refusal]]) -> dict[str, tuple[Flow, Refusal]]:
    names = numbered(
        [owner_of(refusal.merge, flow) or refusal.merge.name for flow, refusal in refusals]
    )
    return dict(zip(names, refusals, strict=True))


def _blocks(cuts: Cuts, granularity: Granularity, readers: ParameterReaders) -> list[ResidualBlock]:
    parts: dict[str, tuple[str, ...]] = {}
    layers = _layers(cuts, granularity)
    layer_of = {part: name for name, inner in layers.items() for part in inner}
    for name in cuts.branches:
        layer = layer_of.get(name)
        parts.setdefault(layer or name, layers[layer] if layer else (name,))
    block_of = {part: name for name, inner in parts.items() for part in inner}
    blocks = []
    for name, branches in parts.items():
        is_exact = name not in layers or name in cuts.layers
        chosen = [cuts.branches[part] for part in branches] if is_exact else [*cuts.bypasses[name]]
        dead = cuts.inner_nodes(chosen).union(*cuts.dead_nodes(chosen).values())
        nested = set(cuts.lying_in(chosen))
        goes = dict.fromkeys(
            block_of[inner]
            for inner in cuts.branches
            if inner in nested and nested.issuperset(parts[block_of[inner]])
        )
        goes.pop(name, None)
        blocks.append(
            ResidualBlock(
                name=name,
                owner=owner_of(chosen[-1].branch.joins, chosen[-1].flow) if is_exact else name,
                params=readers.vanishing(dead),
                shape=_shape(chosen[-1].flow, chosen[-1].branch.joins),
                stage=0,
                branches=branches,
                contains=tuple(goes),
                parameters=readers.names(dead),
                is_exact=is_exact,
            )
        )
    return blocks


def _layers(cuts: Cuts, granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Return the layer blocks of a granularity, and the names of the branches in each."""
    layers = dict(cuts.layers) if granularity != "branch" else {}
    if granularity == "layer_approx":
        for name, ways in cuts.bypasses.items():
            gone = set(cuts.lying_in(ways))
            layers[name] = tuple(part for part in cuts.branches if part in gone)
    return layers


def _rejections(refused: Mapping[str, tuple[Flow, Refusal]]) -> list[Rejection]:
    return [
        Rejection(name, refusal.reason, refusal.detail, _shape(flow, refusal.merge))
        for name, (flow, refusal) in refused.items()
    ]


def _opaque(traced: TracedModel) -> list[Rejection]:
    """Report the opaque modules that could hide a block.

    These have parameters, and add tensors of one shape, or were never run, or cannot be seen.
    """
    return [
        Rejection(path or type(traced.root).__name__, Reason.OPAQUE, reason)
        for path, reason in traced.opaque.items()
        if (path in traced.may_merge or reason in (COMPILED, NOT_EXECUTED))
        and next(traced.root.get_submodule(path).parameters(), None) is not None
    ]


def _stages(blocks: Iterable[ResidualBlock], rejections: Iterable[Rejection]) -> list[Stage]:
    members: dict[tuple[int, ...], list[str]] = {}
    for block in blocks:
        members.setdefault(block.shape, []).append(block.name)
    fixed = Counter(
        rejection.shape
        for rejection in rejections
        if rejection.reason is Reason.PROJECTION_SHORTCUT
    )
    return [Stage(shape, tuple(names), fixed[shape]) for shape, names in members.items()]


def _shape(flow: Flow, node: fx.Node) -> tuple[int, ...]:
    fact = flow.fact(node)
    assert fact is not None
    return fact.shape


def _fingerprint(root: nn.Module, names: Sequence[str]) -> str:
    """Return a digest of the structure: names and shapes of the state, names of the branches."""
    state = [(name, tuple(tensor.shape)) for name, tensor in root.state_dict().items()]
    text = json.dumps([state, list(names)])
    return hashlib.sha256(text.encode()).hexdigest()
