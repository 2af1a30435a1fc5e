"""One random network against every law; what is wrong is returned as text."""

from __future__ import annotations

import copy
import linecache
import random
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blockprune
from blockprune.plan import PruningPlan
from blockprune.surgery import cut_blocks
from tests.fuzz.recipe import Recipe
from tests.fuzz.source import source_of
from tests.fuzz.truth import Truth, truth
from tests.oracle import disagreements, flatten, outcome

__all__ = ["SHARES", "chosen", "problems"]

SHARES = {"again": 0.15, "scores": 0.15, "by name": 0.3, "file": 0.15, "steps": 0.25}
SHARES |= {"parameters": 0.2}
"""How much of the cases checks a law that costs a trace more; all others are always checked."""


def _program(text: str) -> dict[str, Any]:
    """Return what a program defines; its lines can be looked up, as those of a file can."""
    name = f"<fuzz {hash(text):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "fuzzed"}
    exec(compile(text, name, "exec"), scope)
    return scope


def chosen(recipe: Recipe) -> list[str]:
    """Return the names of the branches that are removed from the network of a recipe."""
    rng, names = random.Random(recipe.choice), list(truth(recipe).removable)
    if not names or rng.random() < 0.2:
        return names
    return rng.sample(names, rng.randint(1, len(names)))


def problems(recipe: Recipe) -> list[str]:
    """Return every way in which a network breaks a law; an error counts as one."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("error")
            if recipe.again is not None:
                warnings.filterwarnings("ignore", ".*called by a removed branch and by what stays")
            return list(_Case(recipe).problems())
    except Exception as error:  # whatever it is, it is what the case has found
        return [f"{type(error).__name__}: {error}"]


class _Case:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.truth = recipe, truth(recipe)
        self.rng = random.Random(recipe.choice + 1)
        program = _program(source_of(recipe))
        self.make_inputs = program["inputs"]
        self.dense: nn.Module = program["make"]()
        self.switched: nn.Module = _program(source_of(recipe, switched=True))["make"]()
        self.names = chosen(recipe)

    def inputs(self, batch: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            return self.make_inputs(batch)

    def problems(self) -> Iterator[str]:
        x = self.inputs(2)
        self.trains = _trains(self.dense, x)
        before, generator = _state(self.dense, x), torch.get_rng_state()
        analysis = blockprune.find_blocks(self.dense, x)
        yield from _analysis_problems(analysis, self.truth)
        if self.sampled("again"):
            again = blockprune.find_blocks(self.dense, x)
            if again.to_json() != analysis.to_json():
                yield "a second analysis differs"
        if not self.truth.removable.keys() <= set(analysis.names):
            return
        if analysis.names and self.sampled("scores"):
            yield from self._score_problems(analysis)
        if self.names:
            yield from self._ticket_problems(self._ticket(analysis, x), analysis, x)
        if self.names and self.sampled("parameters"):
            yield from self._parameter_problems(analysis)
        if not torch.equal(generator, torch.get_rng_state()):
            yield "the random generator of the caller moved on"
        yield from _changes(before, _state(self.dense, x))

    def sampled(self, law: str) -> bool:
        """Whether this case checks a law that a share of them check; it follows from the recipe."""
        return self.rng.random() < SHARES[law]

    # ------------------------------------------------------------ the ticket

    def _ticket(self, analysis: blockprune.BlockAnalysis, x: Any) -> nn.Module:
        """Return the verified ticket, cut by names or by a plan of the analysis at hand."""
        if self.sampled("by name"):
            return blockprune.remove_blocks(self.dense, self.names, x)
        return cut_blocks(self.dense, analysis, _plan(analysis, self.names))

    def _ticket_problems(
        self, ticket: nn.Module, analysis: blockprune.BlockAnalysis, x: Any
    ) -> Iterator[str]:
        reference = self._reference()
        # A norm called twice counts in the reference the call whose output is then zero.
        shared = self.recipe.again is not None
        for train, batch in ((False, 2), (True, 2), (self.rng.random() < 0.5, 3)):
            given, backward = self.inputs(batch), self.trains and batch == 2
            mine = outcome(ticket, given, train=train, backward=backward)
            theirs = outcome(reference, given, train=train, backward=backward)
            for problem in disagreements(mine, theirs, buffers=not shared):
                yield f"{'train' if train else 'eval'}, batch {batch}: {problem}"
        yield from _state_problems(ticket, self.dense)
        if self.sampled("file"):
            yield from self._file_problems(ticket, x)
        if self.sampled("steps"):
            yield from self._step_problems(ticket, analysis, x)

    def _reference(self) -> nn.Module:
        """Return the network whose chosen branches, and those nested in them, give zero."""
        reference = copy.deepcopy(self.switched)
        for name in self.names:
            switch = self.truth.removable[name]
            module: Any = reference.get_submodule(switch.path)
            module.off = module.off | {(switch.key, switch.call)}
        return reference

    def _file_problems(self, ticket: nn.Module, x: Any) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ticket.safetensors"
            blockprune.save_ticket(ticket, path)
            loaded = blockprune.load_ticket(self.dense, path, verify=False)
        if blockprune.plan_of(loaded) != blockprune.plan_of(ticket):
            yield "the plan changed in a file"
        mine = outcome(loaded, x, train=True, backward=False)
        theirs = outcome(ticket, x, train=True, backward=False)
        yield from (f"from a file: {problem}" for problem in disagreements(mine, theirs, ulps=0))

    def _step_problems(
        self, ticket: nn.Module, analysis: blockprune.BlockAnalysis, x: Any
    ) -> Iterator[str]:
        """Removing one after the other is removing them at once."""
        nested = {inner for name in self.names for inner in self.truth.nested[name]}
        alone = [name for name in self.names if name not in nested]
        if len(alone) < 2 or self.recipe.again is not None:
            return
        once = cut_blocks(self.dense, analysis, _plan(analysis, alone[:1]), verify=False)
        gone = {alone[0], *self.truth.nested[alone[0]]}
        left, found = self.truth.removable.keys() - gone, blockprune.find_blocks(once, x)
        # What was refused for what a branch inside it does may be a block once that is gone.
        freed = set(found.names) - left
        kept = {name for name in left if not self._is_emptied(name, gone)}
        if not kept.issubset(found.names) or not freed.issubset(self.truth.refused):
            yield f"the ticket without {alone[0]} has {found.names} instead of {sorted(left)}"
            return
        twice = cut_blocks(once, found, _plan(found, alone[1:]), verify=False)
        mine = outcome(twice, x, train=False, backward=False)
        theirs = outcome(ticket, x, train=False, backward=False)
        yield from (f"in two steps: {problem}" for problem in disagreements(mine, theirs))

    def _is_emptied(self, name: str, gone: Collection[str]) -> bool:
        """Whether a branch has no parameters left once the branches in `gone`, inside it, are."""
        inner = [self.truth.removable[one].path for one in self.truth.nested[name] if one in gone]
        path = self.truth.removable[name].path
        own = (f"{path}.{key}" for key, _ in self.dense.get_submodule(path).named_parameters())
        return bool(inner) and all(key.startswith(tuple(f"{one}." for one in inner)) for key in own)

    # ------------------------------------------------------------ numbers

    def _parameter_problems(self, analysis: blockprune.BlockAnalysis) -> Iterator[str]:
        block = analysis.block(self.rng.choice(self.names))
        ticket = cut_blocks(self.dense, analysis, _plan(analysis, [block.name]), verify=False)
        dense, kept = (sum(p.numel() for p in m.parameters()) for m in (self.dense, ticket))
        if dense - kept != block.params:
            yield f"{block.name} has {block.params} parameters, and {dense - kept} went"

    def _score_problems(self, analysis: blockprune.BlockAnalysis) -> Iterator[str]:
        for criterion in ("random", "l1"):
            try:
                scores = [
                    blockprune.score_blocks(self.dense, criterion, analysis=analysis, seed=3)
                    for _ in range(2)
                ]
            except blockprune.CriterionError:
                continue  # a block without weights has no norm
            if scores[0] != scores[1] or set(scores[0].scores) != set(analysis.names):
                yield f"{criterion} scores differ from one time to the next"


# ---------------------------------------------------------------- what is compared


def _plan(analysis: blockprune.BlockAnalysis, names: list[str]) -> PruningPlan:
    """Return the plan that removes these branches."""
    return PruningPlan(
        remove=tuple(names),
        granularity="branch",
        criterion=None,
        scores={},
        p=None,
        fingerprint=analysis.fingerprint,
    )


def _trains(model: nn.Module, x: Any) -> bool:
    """Whether the backward pass of the dense network works: some can only be run."""
    try:
        for train in (False, True):
            outcome(model, x, train=train)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def _analysis_problems(analysis: blockprune.BlockAnalysis, wanted: Truth) -> Iterator[str]:
    known = [name for name in analysis.names if name in wanted.removable]
    others = [name for name in analysis.names if name not in wanted.removable]
    if known != [*wanted.removable] or not all(map(wanted.may_be_found, others)):
        yield f"found {analysis.names} instead of {tuple(wanted.removable)}"
        return
    for block in analysis.blocks:
        inside = tuple(name for name in block.contains if name not in others)
        if block.name in wanted.nested and inside != wanted.nested[block.name]:
            yield f"{block.name} contains {block.contains}, not {wanted.nested[block.name]}"
    refused = {r.name.partition("#")[0]: str(r.reason) for r in analysis.rejections}
    # Inside what cannot be traced, a part without parameters is not looked into.
    bare = {name for name, why in wanted.refused.items() if "no_parameters" in why}
    unseen = bare - refused.keys() if wanted.reads_numbers else set()
    if unseen:
        refused = {name: why for name, why in refused.items() if why != "opaque"}
    for owner, reasons in wanted.refused.items():
        may_be_found = wanted.may_be_found(owner)
        if owner in unseen or (owner not in refused and may_be_found):
            continue
        if refused.get(owner) not in (reasons | {"no_parameters"} if may_be_found else reasons):
            yield f"{owner} is refused as {refused.get(owner)}, not {sorted(reasons)}"
    for owner in refused.keys() - wanted.refused.keys():
        yield f"{owner} is refused as {refused[owner]}, and should not be"


def _state_problems(ticket: nn.Module, dense: nn.Module) -> Iterator[str]:
    mine, theirs = ticket.state_dict(), dense.state_dict()
    for name, tensor in mine.items():
        if name not in theirs:
            yield f"{name} is not in the dense state"
        elif tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
            yield f"{name} differs from the dense state"
    trained = dict(dense.named_parameters(remove_duplicate=False))
    for name, parameter in ticket.named_parameters(remove_duplicate=False):
        if name in trained and parameter.requires_grad is not trained[name].requires_grad:
            yield f"requires_grad of {name} changed"


def _state(model: nn.Module, x: Any) -> dict[str, Any]:
    """Return everything that a bystander could notice of a network and of its input."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, Any] = {f"input {i}": v.clone() for i, v in enumerate(flatten(x)[0])}
    for name, tensor in tensors.items():
        found[name] = tensor.detach().clone()
        found[f"{name} itself"] = (id(tensor), tensor.requires_grad, tensor.grad is None)
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        found[f"module {name}"] = (id(module), type(module), module.training, hooks)
    return found


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        both = isinstance(old, Tensor) and isinstance(new, Tensor)
        if not (torch.equal(old, new) if both else old == new):
            yield f"{name} of the dense network changed"
