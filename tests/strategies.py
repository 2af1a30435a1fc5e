"""Random residual architectures, each with its truth.

An architecture is a nested tuple of operations and `Residual`s; `Net` builds the module
and `truth` derives, from the architecture alone, which branches can be removed and why
the others cannot. What `truth` has to know about a chain of operations is only whether
it holds parameters and whether it writes into the tensor it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracle import Tap, branch
from tests.zoo import C, DropPath, conv

WITH_PARAMETERS = ("conv", "bias_conv", "norm", "scale")
WITHOUT_PARAMETERS = ("relu", "relu_", "gelu", "pool", "drop", "drop_path")
# In eval mode these hand on the very tensor they are given.
HANDS_ON = ("drop", "drop_path")
MERGES = ("add", "radd", "iadd", "torch", "alpha")
AFTER = ("", "relu", "relu_", "gelu", "norm")


@dataclass(frozen=True)
class Residual:
    """after(shortcut(x) merged with branch(x)), and a second branch in parallel where given."""

    branch: tuple[Any, ...]  # operation names and Residuals
    merge: str = "add"
    shortcut: str = "identity"  # "module", "clone", "scaled", "projection"
    after: str = ""
    parallel: tuple[str, ...] = ()
    escapes: bool = False


@dataclass(frozen=True)
class Architecture:
    stem: tuple[str, ...]
    body: tuple[Any, ...]
    features: bool  # the output is every intermediate value, and not the last alone


@dataclass(frozen=True)
class Truth:
    """Removable branches by name, in execution order, and the refused merges by owner."""

    removable: dict[str, Tap]
    refused: dict[str, frozenset[str]]  # owner: the reasons that would each be right


# ---------------------------------------------------------------- the module


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(C, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _module(item: Any) -> nn.Module:
    if isinstance(item, Residual):
        return Merged(item)
    return {
        "conv": conv,
        "bias_conv": lambda: nn.Conv2d(C, C, 1),
        "norm": lambda: nn.BatchNorm2d(C),
        "scale": Scale,
        "relu": nn.ReLU,
        "relu_": lambda: nn.ReLU(inplace=True),
        "gelu": nn.GELU,
        "pool": lambda: nn.AvgPool2d(3, 1, 1),
        "drop": lambda: nn.Dropout(0.2),
        "drop_path": lambda: DropPath(0.3),
        "": nn.Identity,
    }[item]()


def _chain(items: tuple[Any, ...]) -> nn.Sequential:
    return nn.Sequential(*map(_module, items))


class Merged(nn.Module):
    def __init__(self, spec: Residual) -> None:
        super().__init__()
        self.spec = spec
        self.f = _chain(spec.branch)
        if spec.parallel:
            self.g = _chain(spec.parallel)
        if spec.shortcut in ("module", "projection"):
            self.shortcut = nn.Conv2d(C, C, 1) if spec.shortcut == "projection" else nn.Identity()
        self.after = _module(spec.after)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.spec.shortcut == "scaled":
            return x * 0.5
        if self.spec.shortcut == "clone":
            return x.clone()
        return x if self.spec.shortcut == "identity" else self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.escapes:
            first, *rest = self.f
            inner = out = first(x)
            for module in rest:
                out = module(out)
        else:
            inner = out = self.f(x)
        out = branch(self, out, "f")
        shortcut = self._shortcut(x)
        if self.spec.merge == "add":
            y = shortcut + out
        elif self.spec.merge == "radd":
            y = out + shortcut
        elif self.spec.merge == "iadd":
            out += shortcut
            y = out
        elif self.spec.merge == "torch":
            y = torch.add(shortcut, out)
        elif self.spec.merge == "alpha":
            y = torch.add(shortcut, out, alpha=0.5)
        else:
            y = shortcut.add_(out)
        if self.spec.parallel:
            y = y + branch(self, self.g(x), "g")
        if self.spec.escapes:
            y = y * torch.sigmoid(inner.mean())
        return self.after(y)


class Net(nn.Module):
    """The module of an architecture, with the same weights every time."""

    def __init__(self, spec: Architecture) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), *map(_module, spec.stem))
            self.body = _chain(spec.body)
            self.head = nn.Linear(C, 3)
        self.features = spec.features

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        seen = [x]
        for module in self.body:
            x = module(x)
            seen.append(x)
        y = self.head(x.mean((2, 3)))
        return {"logits": y, "features": seen} if self.features else y


# ---------------------------------------------------------------- the truth


def _writes_into_input(items: tuple[Any, ...]) -> bool:
    for item in items:
        if item == "relu_":
            return True
        if isinstance(item, Residual):
            in_place = item.merge == "add_" and item.shortcut in ("identity", "module")
            return in_place or _writes_into_input(item.branch)
        if item not in HANDS_ON:
            return False
    return False


def _holds_parameters(items: tuple[Any, ...]) -> bool:
    for item in items:
        if item in WITH_PARAMETERS:
            return True
        if isinstance(item, Residual) and (
            item.shortcut == "projection" or item.after == "norm" or _holds_parameters(item.branch)
        ):
            return True
    return False


def _parameters_behind_the_write(items: tuple[Any, ...]) -> bool:
    """Whether something with parameters comes behind what writes into the input of the chain."""
    for i, item in enumerate(items):
        if item == "relu_":
            return _holds_parameters(items[i + 1 :])
        if isinstance(item, Residual):
            rest = item.after == "norm" or _holds_parameters(items[i + 1 :])
            return rest or _parameters_behind_the_write(item.branch)
        if item not in HANDS_ON:
            return False
    return False


def _is_open(spec: Residual) -> bool:
    """Whether the branch writes into x, and the shortcut is taken from x afterwards."""
    return spec.shortcut in ("module", "clone") and _writes_into_input(spec.branch)


def numbered(names: list[str]) -> list[str]:
    """Return names with `#k` on those that occur more than once."""
    return [
        name if names.count(name) == 1 else f"{name}#{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]


def _heaviest(items: tuple[Any, ...]) -> int:
    """Return which item has the most parameters, the first of several."""
    sizes = [sum(p.numel() for p in _module(item).parameters()) for item in items]
    return sizes.index(max(sizes))


def _defects(spec: Residual) -> frozenset[str]:
    writes = _writes_into_input(spec.branch)
    found = {
        "scaled_shortcut": spec.shortcut == "scaled",
        "projection_shortcut": spec.shortcut == "projection",
        # What lies behind the value that is read elsewhere can go.
        "branch_escapes": spec.escapes and not _holds_parameters(spec.branch[1:]),
        # A clone is taken after the branch has run: it holds what was written.
        "mutates_shortcut": writes,
        "no_parameters": not _holds_parameters(spec.branch),
    }
    if _is_open(spec):
        # What a branch writes into x stays for a shortcut that is taken from x afterwards.
        found["mutates_shortcut"] = False
        found["branch_escapes"] |= not _parameters_behind_the_write(spec.branch)
    return frozenset(reason for reason, present in found.items() if present)


def _residuals(items: tuple[Any, ...], path: str) -> Iterator[tuple[str, Residual]]:
    for i, item in enumerate(items):
        if isinstance(item, Residual):
            yield from _residuals(item.branch, f"{path}.{i}.f")
            yield f"{path}.{i}", item


def _branches(spec: Residual, path: str) -> Iterator[tuple[str, Tap]]:
    if spec.parallel:
        yield from ((f"{path}.{key}", Tap(path, key)) for key in ("f", "g"))
    elif spec.escapes:
        # The owner calls the parts of f itself.
        yield f"{path}.f.{1 + _heaviest(spec.branch[1:])}", Tap(path, "f")
    else:
        yield f"{path}.f" if _is_open(spec) else path, Tap(path, "f")


def truth(spec: Architecture) -> Truth:
    """Return what a correct analysis finds in `Net(spec)`."""
    residuals = list(_residuals(spec.body, "body"))
    refused = {path: defects for path, r in residuals if (defects := _defects(r))}
    found = [item for path, r in residuals if path not in refused for item in _branches(r, path)]
    names = numbered([name for name, _ in found])
    return Truth(dict(zip(names, (tap for _, tap in found), strict=True)), refused)


# ---------------------------------------------------------------- the draw


def _sound(spec: Residual) -> Residual:
    """Take out what would make the truth a matter of taste, or every net untrainable."""
    chain = spec.branch
    if spec.escapes or not any(item in ("conv", "bias_conv", "pool", "norm") for item in chain):
        chain = ("conv" if spec.escapes else "pool", *chain)
    parallel = spec.parallel
    if parallel:
        # Two branches of one owner, both removable, both reading an unwritten x.
        spec = replace(spec, shortcut="identity", escapes=False, merge="add")
        chain, parallel = ("conv", *chain), ("conv", *parallel)
    merge = spec.merge
    if merge == "iadd" and chain[-1] not in ("conv", "bias_conv", "norm", "pool"):
        merge = "add"  # the activation saved its output for the backward pass
    if merge == "add_" and spec.escapes:
        merge = "add"
    return replace(spec, branch=chain, parallel=parallel, merge=merge)


_ops = st.sampled_from(
    ("conv", "conv", "conv", "norm", "norm", "bias_conv", "scale", *WITHOUT_PARAMETERS)
)
_chains = st.lists(_ops, min_size=1, max_size=4).map(tuple)


def _residual(branches: st.SearchStrategy[tuple[Any, ...]]) -> st.SearchStrategy[Residual]:
    return st.builds(
        Residual,
        branch=branches,
        merge=st.sampled_from((*MERGES, *MERGES, "add_")),
        shortcut=st.sampled_from(
            ("identity",) * 6 + ("module", "module", "clone", "scaled", "projection")
        ),
        after=st.sampled_from(AFTER),
        parallel=st.one_of(st.just(()), st.just(()), st.just(()), _chains),
        escapes=st.sampled_from((False,) * 7 + (True,)),
    ).map(_sound)


_flat = _residual(_chains)
_nested = _residual(
    st.tuples(_chains, _flat, st.lists(_ops, max_size=2)).map(lambda t: (*t[0], t[1], *t[2]))
)
_leading = _residual(st.tuples(_flat, _chains).map(lambda t: (t[0], *t[1])))
_items = st.one_of(
    _flat, _flat, _flat, _nested, _leading, st.sampled_from(("relu", "relu_", "norm"))
)

architectures: st.SearchStrategy[Architecture] = st.builds(
    Architecture,
    stem=st.sampled_from(((), ("norm",), ("relu",), ("norm", "relu_"), ("norm", "gelu"))),
    body=st.lists(_items, min_size=1, max_size=5).map(tuple),
    features=st.booleans(),
)
