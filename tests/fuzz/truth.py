"""What a correct analysis finds in the network of a recipe, derived from the recipe alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.fuzz.recipe import HANDS_ON, IN_PLACE, Layer, Loop, Part, Recipe, Region, Unit
from tests.strategies import numbered

__all__ = ["Truth", "truth"]

WITHOUT_PARAMETERS = (
    *("relu", "relu_", "functional_relu_", "relu6", "hardtanh_", "gelu", "tanh", "mode"),
    *("drop", "drop_channels", "path", "functional_drop", "affineless", "plain"),
    *("pool", "maxpool"),
)


@dataclass(frozen=True)
class Switch:
    """Where the reference switches a branch off: the module, the branch, which call (None: all)."""

    path: str
    key: str
    call: int | None = None


@dataclass(frozen=True)
class Truth:
    """Removable branches by name, in execution order, and the refused merges by owner."""

    removable: dict[str, Switch]
    refused: dict[str, frozenset[str]]  # owner: the reasons that would each be right
    nested: dict[str, tuple[str, ...]]  # what goes with a branch, as it lies inside it
    reads_numbers: bool  # some forward does, which therefore is no graph

    def may_be_found(self, name: str) -> bool:
        """Whether a branch writes into x first, so that x may be taken to be what it has written.

        The rest of the branch can go then, and what it writes stays.
        """
        return "mutates_shortcut" in self.refused.get(name.partition("#")[0], ())


def _reads_numbers(parts: tuple[Part, ...]) -> bool:
    return any(
        isinstance(part, Region)
        or (isinstance(part, Unit) and _reads_numbers((*part.branch, *part.parallel)))
        or (isinstance(part, Loop) and any(map(_reads_numbers, part.branches)))
        for part in parts
    )


def _writes_into_input(parts: tuple[Part, ...]) -> bool:
    for part in parts:
        if isinstance(part, Region):
            return _writes_into_input(part.items)
        if isinstance(part, Unit):
            in_place = part.merge == "shortcut_add_" and part.shortcut in (
                "identity",
                "module",
                "empty",
            )
            return in_place or (not part.masked and _writes_into_input(part.branch))
        if isinstance(part, Layer | Loop):
            return isinstance(part, Loop) and _writes_into_input(part.branches[0])
        if part in IN_PLACE:
            return True
        if part not in HANDS_ON:
            return False
    return False


def _holds_parameters(parts: tuple[Part, ...]) -> bool:
    for part in parts:
        if isinstance(part, Layer | Loop):
            return True
        if isinstance(part, Region):
            if _holds_parameters(part.items):
                return True
        elif isinstance(part, Unit):
            projects = part.shortcut in ("projection", "down") or part.after == "norm"
            if projects or _holds_parameters(part.branch) or _holds_parameters(part.parallel):
                return True
        elif part not in WITHOUT_PARAMETERS:
            return True
    return False


def _parameters_behind_the_write(parts: tuple[Part, ...]) -> bool:
    """Whether something with parameters comes behind what writes into the input of the chain."""
    for i, part in enumerate(parts):
        rest = parts[i + 1 :]
        if isinstance(part, Region):
            return _parameters_behind_the_write((*part.items, *rest))
        if isinstance(part, Unit):
            if part.after == "norm" or part.parallel or _holds_parameters(rest):
                return True
            in_branch = not part.masked and _writes_into_input(part.branch)
            return in_branch and _parameters_behind_the_write(part.branch)
        if isinstance(part, Loop):
            return True
        if part in IN_PLACE:
            return _holds_parameters(rest)
        if part not in HANDS_ON:
            return False
    return False


def _is_open(unit: Unit) -> bool:
    """Whether the branch writes into x, and the shortcut is taken from x afterwards."""
    writes = not unit.masked and not unit.begins and _writes_into_input(unit.branch)
    # An empty Sequential hands on the very tensor that was written into.
    return writes and unit.shortcut in ("module", "clone")


def _defects(unit: Unit) -> frozenset[str]:
    writes = not unit.masked and _writes_into_input(unit.branch)
    is_open = _is_open(unit)
    found = {
        "scaled_shortcut": unit.shortcut == "scaled",
        "projection_shortcut": unit.shortcut in ("projection", "down"),
        # What lies behind the value that is read elsewhere can go.
        "branch_escapes": (unit.escapes and not _holds_parameters(unit.branch[1:]))
        # What the branch writes into x stays, for the shortcut.
        or (is_open and not _parameters_behind_the_write(unit.branch)),
        "mutates_shortcut": writes and not is_open,
        "no_parameters": not _holds_parameters(unit.branch),
    }
    return frozenset(reason for reason, present in found.items() if present)


@dataclass
class _Merge:
    owner: str
    key: str
    child: str
    defects: frozenset[str]
    inner: tuple[_Merge, ...] = ()
    goes_whole: bool = True


def _chain(parts: tuple[Part, ...], path: str) -> Iterator[_Merge]:
    for i, part in enumerate(parts):
        yield from _merges(part, f"{path}.{i}")


def _merges(part: Part, path: str) -> Iterator[_Merge]:
    if isinstance(part, Region):
        yield from _chain(part.items, f"{path}.items")
    elif isinstance(part, Layer):
        for key in ("attention", "mlp"):
            yield _Merge(path, key, key, frozenset())
    elif isinstance(part, Loop):
        for i, branch in enumerate(part.branches):
            writes = _writes_into_input(branch)
            yield _Merge(
                path,
                str(i),
                f"blocks.{i}",
                frozenset({"mutates_shortcut", "branch_escapes"} if writes else ()),
            )
    elif isinstance(part, Unit):
        inner = tuple(_chain(part.branch[part.escapes :], f"{path}.f"))
        yield from inner
        if part.parallel:
            yield _Merge(path, "f", "f", frozenset(), inner)
            yield _Merge(path, "g", "g", frozenset())
        else:
            yield _Merge(
                path, "f", "f", _defects(part), inner, not part.escapes and not _is_open(part)
            )


def truth(recipe: Recipe) -> Truth:
    """Return what a correct analysis finds in `Net` of this recipe."""
    merges = list(_chain(recipe.body, "body"))
    calls: list[int | None] = [None] * len(merges)
    # A root that cannot be traced calls a region twice, which is one block.
    is_traced = not recipe.branching and recipe.output != "auxiliary"
    if recipe.again is not None and is_traced:
        path = f"body.{recipe.again}"
        once = [i for i, merge in enumerate(merges) if merge.owner == path]
        for i in once:
            calls[i] = 0
        merges += [merges[i] for i in once]
        calls += [1] * len(once)
    sound = [(merge, call) for merge, call in zip(merges, calls, strict=True) if not merge.defects]
    owners = Counter(merge.owner for merge, _ in sound)
    bases = [
        merge.owner
        if owners[merge.owner] == 1 and merge.goes_whole
        else f"{merge.owner}.{merge.child}"
        for merge, _ in sound
    ]
    names = numbered(bases)
    removable = {
        name: Switch(merge.owner, merge.key, call)
        for name, (merge, call) in zip(names, sound, strict=True)
    }
    by_merge = {id(merge): name for name, (merge, _) in zip(names, sound, strict=True)}
    nested = {
        name: tuple(by_merge[id(inner)] for inner in merge.inner if id(inner) in by_merge)
        for name, (merge, _) in zip(names, sound, strict=True)
    }
    refused = {merge.owner: merge.defects for merge in merges if merge.defects}
    return Truth(removable, refused, nested, not is_traced or _reads_numbers(recipe.body))
