"""``analyze --why``: how a model was traced, and which modules were not looked into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from blockprune.blocks import BlockAnalysis, Reason
from blockprune.cli.output import plural, print_line, print_wrapped
from blockprune.tracing import COMPILED, NOT_EXECUTED
from blockprune.tracing.advice import advice

__all__ = ["has_more_to_say", "leaves_as_json", "print_why", "traced_as_json"]

NAMES_SHOWN = 3
ROOT = "the root"


@dataclass(frozen=True)
class Leaf:
    """Modules of one class that were not looked into for one reason."""

    paths: tuple[str, ...]
    kind: str
    reason: str
    may_merge: bool

    @property
    def may_hide_blocks(self) -> bool:
        """Whether a residual block can be in its own code."""
        return self.may_merge or self.reason in (COMPILED, NOT_EXECUTED)


def has_more_to_say(analysis: BlockAnalysis) -> bool:
    """Whether a block may hide in a module, or the root was not traced."""
    hidden = any(rejection.reason is Reason.OPAQUE for rejection in analysis.rejections)
    return hidden or "" in analysis.traced.opaque


def traced_as_json(analysis: BlockAnalysis) -> dict[str, Any]:
    """Return how the model was traced: as what, and in which regions."""
    return {
        "as": _traced_as(analysis),
        "regions": [region.path for region in analysis.traced.regions],
    }


def leaves_as_json(analysis: BlockAnalysis) -> list[dict[str, Any]]:
    """Return each module that was not looked into, with the reason and what to do."""
    return [
        {
            "name": leaf.paths[0],
            "class": leaf.kind,
            "reason": leaf.reason,
            "advice": advice(leaf.reason),
            "may_merge": leaf.may_merge,
        }
        for leaf in _leaves(analysis)
    ]


def print_why(analysis: BlockAnalysis) -> None:
    """Print how the model was traced, and each kind of leaf with its reason and advice."""
    print_line("")
    print_wrapped(_how(analysis))
    regions = _blocks_of_regions(analysis)
    given: dict[str, str] = {}
    for leaf in _grouped(_leaves(analysis)):
        print_line("")
        print_wrapped(_title(leaf))
        print_wrapped(leaf.reason, label="reason", indent=4)
        print_wrapped(_effect(leaf, regions), label="effect", indent=4)
        if leaf.may_hide_blocks or "" in leaf.paths:
            text = advice(leaf.reason)
            short = f"As for {given[text]}." if text in given else text
            given.setdefault(text, leaf.kind)
            print_wrapped(short, label="advice", indent=4)


def _leaves(analysis: BlockAnalysis) -> list[Leaf]:
    """Return the modules that were not looked into, one by one."""
    traced = analysis.traced
    return [
        Leaf(
            (path,),
            type(traced.root.get_submodule(path)).__name__,
            reason,
            path in traced.may_merge,
        )
        for path, reason in traced.opaque.items()
    ]


def _grouped(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Return leaves with those that differ in their name only as one."""
    paths: dict[tuple[str, str, bool], tuple[str, ...]] = {}
    for leaf in leaves:
        key = (leaf.kind, leaf.reason, leaf.may_merge)
        paths[key] = (*paths.get(key, ()), *leaf.paths)
    return [Leaf(names, *key) for key, names in paths.items()]


def _traced_as(analysis: BlockAnalysis) -> str:
    if any(region.path == "" for region in analysis.traced.regions):
        return "with_leaves" if analysis.traced.opaque else "whole"
    return "regions"


def _how(analysis: BlockAnalysis) -> str:
    inner = [region.path for region in analysis.traced.regions if region.path]
    leaves = plural(len(analysis.traced.opaque), "module")
    by_itself = "by itself" if len(inner) == 1 else "each by itself"
    match _traced_as(analysis):
        case "whole":
            return "Traced whole: every module that runs was looked into."
        case "with_leaves":
            also = f" Inside them, {_listed(inner)} traced {by_itself}." if inner else ""
            return f"Traced whole, but for {leaves} that the trace calls and does not enter.{also}"
    why = "was not traced" if "" in analysis.traced.opaque else "keeps its class, as asked"
    found = f"{_listed(inner)} traced {by_itself}" if inner else "no module inside was traced"
    return f"The root {why}; {found}."


def _title(leaf: Leaf) -> str:
    number = f"{len(leaf.paths)} x " if len(leaf.paths) > 1 else ""
    return f"{number}{leaf.kind}: {_some(path or ROOT for path in leaf.paths)}"


def _listed(paths: list[str]) -> str:
    was = "was" if len(paths) == 1 else "were"
    return f"{plural(len(paths), 'module')} ({_some(paths)}) {was}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _effect(leaf: Leaf, regions: Mapping[str, set[str]]) -> str:
    """Say what of the model is not seen, and what inside the leaf is."""
    if leaf.reason == NOT_EXECUTED:
        own = "A block may hide here: nothing in it was run."
    elif leaf.reason == COMPILED:
        own = "A block may hide here: its own code cannot be seen."
    elif leaf.may_merge:
        own = "A block may hide here: its own code adds tensors of one shape."
    else:
        own = "Nothing is lost: its own code adds no two tensors of one shape."
    inside = [
        path for path in regions if any(_is_inside(path, leaf_path) for leaf_path in leaf.paths)
    ]
    if not inside:
        return own
    found = len(set().union(*(regions[path] for path in inside)))
    looked = plural(len(inside), "module")
    return f"{own} Inside, {looked} could be traced: {plural(found, 'block')} found."


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _blocks_of_regions(analysis: BlockAnalysis) -> dict[str, set[str]]:
    """Return, for each region, the names of the blocks in it."""
    found: dict[str, set[str]] = {region.path: set() for region in analysis.traced.regions}
    for block in analysis.blocks:
        for cut in analysis.cuts.of_blocks([block.name], analysis.granularity):
            found[cut.flow.region.path].add(block.name)
    return found
