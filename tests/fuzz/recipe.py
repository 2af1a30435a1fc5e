"""What one random network is made of: a value drawn from an integer, and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

__all__ = ["FRESH", "Layer", "Loop", "Part", "Recipe", "Region", "Unit", "draw"]

IMAGE = ("conv", "conv", "conv", "norm", "norm", "bias_conv", "depthwise", "weight_norm", "gate")
TOKEN = ("conv", "conv", "norm", "attention", "multihead")
ANYWHERE = ("scale", "relu", "relu_", "gelu", "tanh", "drop", "drop", "path", "functional_drop")
RARE = ("stubborn", "mode", "plain", "affineless", "untracked", "cumulative", "hardtanh_", "relu6")
IN_PLACE = ("relu_", "functional_relu_", "hardtanh_")
HANDS_ON = ("drop", "drop_channels", "path", "functional_drop", "mode")
"""Operations that in eval mode return the very tensor that they are given."""

FRESH = ("conv", "norm", "bias_conv", "pool")
"""Operations whose result is a new tensor that autograd does not need again."""

MERGES = ("add", "add", "radd", "iadd", "torch", "alpha", "alpha_one", "method", "add_")
ORDERS = ("", "f + x + g", "f + g + x", "x + (f + g)", "f + (g + x)", "f += g", "dropped")
"""How two branches in parallel are added to x; "": one after the other."""

BEGINNINGS = ((), ("norm",), ("norm", "relu_"), ("norm", "drop"), ("conv", "gelu"), ("scale",))
"""What two branches in parallel may share."""

SHORTCUTS = ("identity",) * 8 + ("module", "empty", "clone", "scaled", "projection", "down")
AFTER = ("", "", "relu", "relu_", "relu_", "functional_relu_", "relu6", "gelu", "norm")


@dataclass(frozen=True)
class Unit:
    """after(shortcut(x) merged with branch(x)), and a second branch in parallel where given.

    `order`: in which two branches in parallel are added; `begins`: what both start with.
    """

    branch: tuple[Part, ...]
    merge: str = "add"
    shortcut: str = "identity"
    after: str = ""
    parallel: tuple[Part, ...] = ()
    escapes: bool = False
    masked: bool = False  # the branch reads a second input of the network
    drop_path: bool = False
    order: str = ""
    begins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A transformer layer: two branches, the norms before them or behind the merges."""

    norm_first: bool = True
    kind: str = "attention"
    drop: bool = False


@dataclass(frozen=True)
class Loop:
    """x = x + f(x) for each of several f in one forward."""

    branches: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Region:
    """Items in a module whose forward branches on its data, so that it cannot be traced."""

    items: tuple[Part, ...]


Part = str | Unit | Layer | Loop | Region


@dataclass(frozen=True)
class Recipe:
    """A whole network, and how it is used."""

    body: tuple[Part, ...]
    dimensions: int = 2  # of the images; 0: tokens
    stem: tuple[str, ...] = ()
    again: int | None = None  # index of an item of the body that is called once more at the end
    tied: bool = False  # the first two units share a weight
    branching: bool = False  # the root branches on its data
    output: str = "tensor"  # "tuple", "dict", "list", "features", "auxiliary"
    inputs: str = "args"  # "kwargs", "dict"
    dtype: str = "float32"
    frozen: str = ""  # "half", "stem", "most"
    choice: int = 0  # decides which blocks are removed, and which laws are sampled


# ---------------------------------------------------------------- the draw


def _operations(rng: Random, dimensions: int, low: int, high: int) -> tuple[Part, ...]:
    common = (*(IMAGE if dimensions else TOKEN), *ANYWHERE)
    pools = ("pool", "maxpool", "drop_channels") if dimensions else ()
    chosen: list[Part] = []
    for _ in range(rng.randint(low, high)):
        chosen.append(rng.choice((*RARE, *pools) if rng.random() < 0.15 else common))
    return tuple(chosen)


def _unit(rng: Random, dimensions: int, depth: int, *, top: bool) -> Unit:
    branch = _operations(rng, dimensions, 1, 4)
    if depth and rng.random() < 0.3:
        at = rng.randint(0, len(branch))
        branch = (*branch[:at], _part(rng, dimensions, depth - 1), *branch[at:])
    # Inside a branch nothing may change the shape.
    shortcuts = SHORTCUTS if dimensions and top else SHORTCUTS[:-1]
    unit = Unit(
        branch,
        rng.choice((*MERGES, "shortcut_add_") if rng.random() < 0.2 else MERGES),
        rng.choice(shortcuts),
        rng.choice(AFTER),
        _operations(rng, dimensions, 1, 3) if rng.random() < 0.2 else (),
        rng.random() < 0.07,
        top and rng.random() < 0.15,
        rng.random() < 0.15,
    )
    return _sound(unit)


def _computes(part: Part) -> bool:
    """Return whether a part hands on something else than its input with terms added."""
    return isinstance(part, str) and part not in (*HANDS_ON, *IN_PLACE)


def _sound(unit: Unit) -> Unit:
    """Take out what would make the truth a matter of taste, or every network untrainable."""
    if unit.shortcut == "down":
        unit = replace(unit, branch=("stride", *unit.branch), merge="add", parallel=())
        unit = replace(unit, escapes=False)
    if unit.parallel:
        # Two branches of one owner, both removable, both reading an unwritten x.
        unit = replace(unit, shortcut="identity", escapes=False, merge="add", masked=False)
        unit = replace(unit, branch=("conv", *unit.branch), parallel=("conv", *unit.parallel))
    elif unit.escapes or unit.branch[0] == "stubborn":
        unit = replace(unit, branch=("conv", *unit.branch))
    if all(isinstance(part, str) and part not in (*FRESH, "stride") for part in unit.branch):
        unit = replace(unit, branch=("conv", *unit.branch))
    if unit.shortcut == "projection" and not any(map(_computes, unit.branch)):
        # The branch is the input with something added: then the projection is a branch beside it.
        unit = replace(unit, branch=("conv", *unit.branch))
    last = unit.branch[-1]
    is_fresh = isinstance(last, str) and last in FRESH and not unit.drop_path
    if unit.merge in ("iadd", "add_") and not is_fresh:
        unit = replace(unit, merge="add")  # something behind needs the value for its gradient
    if unit.escapes and len(unit.branch) > 1 and unit.branch[1] not in FRESH:
        # What lies behind the value that escapes writes into nothing but values of its own.
        unit = replace(unit, branch=(unit.branch[0], "conv", *unit.branch[1:]))
    if unit.merge == "shortcut_add_" and (unit.escapes or unit.masked):
        unit = replace(unit, merge="add")
    return unit


def _part(rng: Random, dimensions: int, depth: int, *, top: bool = False) -> Part:
    roll = rng.random()
    if not dimensions and roll < 0.35:
        kind = rng.choice(("attention", "multihead"))
        return Layer(rng.random() < 0.7, kind, rng.random() < 0.5)
    if roll < 0.45:
        many = rng.randint(1, 3)
        return Loop(tuple(("conv", *_operations(rng, dimensions, 0, 2)) for _ in range(many)))
    if depth and roll < 0.52:
        count = rng.randint(1, 2)
        return Region(tuple(_part(rng, dimensions, depth - 1) for _ in range(count)))
    return _unit(rng, dimensions, depth, top=top)


def _body(rng: Random, dimensions: int) -> tuple[Part, ...]:
    items: list[Part] = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        if rng.random() < 0.1:
            items.append(rng.choice(("relu", "relu_", "norm", "drop")))
        items.append(_part(rng, dimensions, rng.choice((0, 1, 1, 2)), top=True))
    return tuple(items)


def draw(seed: int, case: int) -> Recipe:
    """Return the recipe that belongs to two integers."""
    rng = Random(f"{seed}/{case}")
    dimensions = rng.choice((0, 0, 1, 2, 2, 2, 2, 3))
    # What has no kernel in half precision is not drawn with it.
    dtypes = ("float32",) * 6 + (("float64", "bfloat16", "float16") if dimensions < 3 else ())
    stems = ((), ("norm",), ("relu",), ("norm", "relu_"), ("norm", "functional_relu_"))
    recipe = Recipe(
        body=_body(rng, dimensions),
        dimensions=dimensions,
        stem=rng.choice(stems),
        tied=rng.random() < 0.1,
        branching=rng.random() < 0.15,
        output=rng.choice(("tensor", "tensor", "tuple", "dict", "list", "features", "auxiliary")),
        inputs=rng.choice(("args", "args", "args", "kwargs", "dict")),
        dtype=rng.choice(dtypes),
        frozen=rng.choice(("", "", "", "half", "stem", "most")),
        choice=rng.randrange(2**30),
    )
    recipe = replace(recipe, body=_shared(recipe.body, Random(f"{seed}/{case}/shared")))
    again = [i for i, part in enumerate(recipe.body) if isinstance(part, Unit) and _flat(part)]
    if again and rng.random() < 0.12:
        recipe = replace(recipe, again=rng.choice(again))
    return recipe


def _shared(parts: tuple[Part, ...], rng: Random) -> tuple[Part, ...]:
    """Return the parts with an order, and a beginning, for each two branches in parallel."""
    return tuple(_sharing(part, rng) for part in parts)


def _sharing(part: Part, rng: Random) -> Part:
    if isinstance(part, Region):
        return Region(_shared(part.items, rng))
    if not isinstance(part, Unit):
        return part
    part = replace(part, branch=_shared(part.branch, rng))
    if not part.parallel:
        return part
    order, begins = rng.choice(ORDERS), rng.choice(BEGINNINGS)
    if order == "f += g" and (part.branch[-1] not in FRESH or part.drop_path):
        order = "x + (f + g)"  # something behind needs f for its gradient
    return replace(part, order=order, begins=begins)


def _flat(unit: Unit) -> bool:
    return (
        not unit.parallel
        and unit.shortcut != "down"
        and all(isinstance(part, str) for part in unit.branch)
    )
