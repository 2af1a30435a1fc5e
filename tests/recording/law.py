"""The law that every test of this package holds a ticket to.

A model is cut on example inputs. Then the ticket and an independent reference are run in trials:
on other inputs, in another mode, in another dtype, under autocast. The reference is a deep copy of
the dense model whose removed branches end in a layer of zeros; nothing of blockprune made it.

`right` demands that outputs, gradients of parameters and buffers agree in every trial.
`right_or_refused` also accepts an error of blockprune, at the cut or at the call, but not on the
very inputs that the model was cut with. Neither accepts another kind of error or a silent
difference, and in both the cut must leave the dense model and all that is global as it was.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import BlockpruneError
from tests.oracle import call, difference, flatten

__all__ = [
    "Trial",
    "assert_alike",
    "assert_that_it_says_why",
    "reference",
    "right",
    "right_or_refused",
    "right_where",
    "same",
    "surroundings",
    "untouched",
]


@dataclasses.dataclass(frozen=True)
class Trial:
    """How a ticket is run beside its reference.

    Attributes:
        inputs: what the forward takes: a Tensor, a tuple of arguments or a dict of keywords.
        train: the mode.
        prepare: is called on the ticket and on the reference first, such as `nn.Module.double`.
        within: makes the context of the call, such as autocast.
        calls: how often both are called; each call is compared.
        backward: whether gradients are compared too, where the outputs have any.
        ulps: how many units in the last place values may differ, measured on the largest one.
        gradient_ulps: the same for gradients, measured on the largest gradient of all.
    """

    inputs: Any
    train: bool = False
    prepare: Callable[[nn.Module], object] = lambda _: None
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    calls: int = 1
    backward: bool = True
    ulps: float = 4
    gradient_ulps: float = 16


def right(
    model: nn.Module,
    example: Any,
    trials: Iterable[Trial] = (),
    *,
    cut: str | Sequence[str],
    zero: str | Sequence[str],
    **options: Any,
) -> nn.Module:
    """Cut, compare in every trial, and return the ticket.

    Args:
        model: the dense model.
        example: the inputs that it is cut with.
        trials: further ones; the example itself is always tried, in both modes.
        cut: names of the blocks to remove.
        zero: names of the layers that the removed branches end in.
        options: further ones of `remove_blocks`.
    """
    refusals: list[BlockpruneError] = []
    ticket = _hold(model, example, trials, cut, zero, options, refusals)
    if refusals:
        raise refusals[0]
    assert ticket is not None
    return ticket


def right_or_refused(
    model: nn.Module,
    example: Any,
    trials: Iterable[Trial] = (),
    *,
    cut: str | Sequence[str],
    zero: str | Sequence[str],
    **options: Any,
) -> list[BlockpruneError]:
    """Do what `right` does, but let blockprune refuse the cut or a trial; return the refusals."""
    refusals: list[BlockpruneError] = []
    _hold(model, example, trials, cut, zero, options, refusals)
    for error in refusals:
        assert_that_it_says_why(error)
    return refusals


def right_where(is_followed: bool, *args: Any, **options: Any) -> None:
    """Demand that a ticket is right, or, where not `is_followed`, that it is right or refuses."""
    if is_followed:
        right(*args, **options)
    else:
        right_or_refused(*args, **options)


def _hold(
    model: nn.Module,
    example: Any,
    trials: Iterable[Trial],
    cut: str | Sequence[str],
    zero: str | Sequence[str],
    options: dict[str, Any],
    refusals: list[BlockpruneError],
) -> nn.Module | None:
    """Cut and compare; return the ticket, if there is one, and add to `refusals`."""
    expected = reference(model, zero)
    assert_that_the_branch_matters(model, expected, example)
    with untouched(model):
        try:
            ticket = blockprune.remove_blocks(model, cut, example, **options)
        except BlockpruneError as error:
            refusals.append(error)
            return None
        # What it was cut with, a ticket takes.
        for trial in (Trial(example), Trial(example, train=True)):
            assert_alike(ticket, expected, trial)
    for trial in trials:
        try:
            assert_alike(copy.deepcopy(ticket), copy.deepcopy(expected), trial)
        except BlockpruneError as error:
            refusals.append(error)
    return ticket


def reference(model: nn.Module, zero: str | Sequence[str]) -> nn.Module:
    """Return a copy of `model` in which the layers or parameters called `zero` hold zeros."""
    expected = copy.deepcopy(model)
    parameters = dict(expected.named_parameters())
    for path in [zero] if isinstance(zero, str) else zero:
        parts = [parameters[path]] if path in parameters else _parameters_at(expected, path)
        for parameter in parts:
            nn.init.zeros_(parameter)
    return expected


def _parameters_at(model: nn.Module, path: str) -> list[nn.Parameter]:
    found = list(model.get_submodule(path).parameters(recurse=False))
    assert found, f"{path} has no parameters"
    return found


def assert_that_the_branch_matters(model: nn.Module, expected: nn.Module, example: Any) -> None:
    """Assert that the reference is another function than the dense model."""
    dense, zeroed = (_outputs(copy.deepcopy(m).eval(), example)[0] for m in (model, expected))
    assert any(difference(a, b, 64) for a, b in zip(dense, zeroed, strict=True)), (
        "the test is empty: the branch makes no difference to the dense model"
    )


def assert_that_it_says_why(error: BlockpruneError) -> None:
    """Assert that a refusal is more than a name."""
    assert len(str(error)) > 20


def assert_alike(ticket: nn.Module, expected: nn.Module, trial: Trial) -> None:
    """Assert that a ticket and its reference do the same in a trial."""
    for module in (ticket, expected):
        module.train(trial.train)
        trial.prepare(module)
    for number in range(trial.calls):
        wanted = _run(expected, trial)
        found = _run(ticket, trial)
        problems = list(_problems(found, wanted, trial))
        assert not problems, f"silent difference, call {number} of {_told(trial)}: {problems}"


def same(found: Any, wanted: Any, ulps: float = 8) -> None:
    """Assert that two outputs have one structure and equal tensors."""
    (mine, shape), (theirs, wanted_shape) = flatten(found), flatten(wanted)
    assert shape == wanted_shape
    problems = [difference(a, b, ulps) for a, b in zip(mine, theirs, strict=True)]
    assert not any(problems), f"silent difference: {problems}"


@dataclasses.dataclass(frozen=True)
class _Run:
    leaves: list[Any]
    structure: Any
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def _run(module: nn.Module, trial: Trial) -> _Run:
    module.zero_grad(set_to_none=True)
    with trial.within():
        leaves, structure = _outputs(module, trial.inputs)
    gradients = {}
    if trial.backward and (loss := _loss(leaves)) is not None:
        loss.backward()  # type: ignore[no-untyped-call]
        named = module.named_parameters(remove_duplicate=False)
        gradients = {name: p.grad for name, p in named if p.grad is not None and p.grad.any()}
    return _Run(leaves, structure, gradients, dict(module.state_dict()))


def _outputs(module: nn.Module, inputs: Any) -> tuple[list[Any], Any]:
    arguments = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    return flatten(call(module, arguments))


def _loss(leaves: Iterable[Any]) -> Tensor | None:
    """Return a sum in which each element has a weight of its own, so that no errors cancel."""
    terms = [
        (leaf.double() * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)).sum()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    return torch.stack(terms).sum() if terms else None


def _problems(found: _Run, wanted: _Run, trial: Trial) -> Iterator[str]:
    if found.structure != wanted.structure:
        yield f"output structure {found.structure} instead of {wanted.structure}"
        return
    for index, (mine, theirs) in enumerate(zip(found.leaves, wanted.leaves, strict=True)):
        if problem := difference(mine, theirs, trial.ulps):
            yield f"output {index}: {problem}"
    for name, tensor in found.state.items():
        theirs = wanted.state.get(name)
        if theirs is not None and (problem := difference(tensor, theirs, trial.ulps)):
            yield f"{name}: {problem}"
    largest = max((float(g.abs().max()) for g in wanted.gradients.values()), default=0.0)
    for name in {**wanted.gradients, **found.gradients}:
        yield from _gradient_problems(name, found, wanted, trial.gradient_ulps, largest)


def _gradient_problems(
    name: str, found: _Run, wanted: _Run, ulps: float, largest: float
) -> Iterator[str]:
    """Compare gradients; one that is all zeros and one that is absent train alike.

    A layer of zeros takes a gradient in the reference; in the ticket it is gone.
    """
    mine, theirs = found.gradients.get(name), wanted.gradients.get(name)
    zeroed = name in wanted.state and not wanted.state[name].any()
    if theirs is None:
        yield f"a gradient of {name} that the reference has not"
    elif mine is None:
        if not (zeroed and name not in found.state):
            yield f"no gradient of {name}"
    elif mine.shape != theirs.shape:
        yield f"gradient of {name} has shape {tuple(mine.shape)}"
    else:
        worst = float((mine - theirs).abs().max())
        if not worst <= ulps * torch.finfo(theirs.dtype).eps * largest:
            yield f"gradient of {name} is off by {worst:.3g} (largest {largest:.3g})"


def _told(trial: Trial) -> str:
    tensors = [x for x in flatten(trial.inputs)[0] if isinstance(x, Tensor)]
    shapes = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
    return f"{'train' if trial.train else 'eval'} on {shapes}"


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Assert that what happens inside changes neither the models nor what is global."""
    before = [_portrait_of(model) for model in models]
    around = surroundings()
    yield
    for model, was in zip(models, before, strict=True):
        now = _portrait_of(model)
        changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        assert not changed, f"the dense model changed: {changed}"
    assert surroundings() == around, "something global changed"


def surroundings() -> tuple[Any, ...]:
    """Return what an analysis could leave behind outside of the model."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        id(nn.Module.__call__),
        id(nn.Module.__getattr__),
    )


def _portrait_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model holds, every attribute of every module, as values to compare."""
    portrait = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            if name != "_non_persistent_buffers_set":
                portrait[f"{path}.{name}"] = _portrait(value, {id(module)})
        portrait[f"{path}.__class__"] = id(type(module))
    return portrait


def _portrait(value: Any, seen: set[int]) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return value
    if isinstance(value, nn.Module):
        return id(value)
    if id(value) in seen:
        return "seen"
    seen = {*seen, id(value)}
    if isinstance(value, Tensor):
        return _tensor_portrait(value, seen)
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, Mapping):
        return type(value), [(_portrait(k, seen), _portrait(v, seen)) for k, v in value.items()]
    if isinstance(value, Sequence):
        return type(value), [_portrait(item, seen) for item in value]
    if isinstance(value, Set):
        return type(value), sorted(str(item) for item in value)
    if hasattr(value, "cache_info"):
        return id(value), value.cache_info()
    if hasattr(value, "__dict__") and not callable(value):
        return id(value), _portrait(vars(value), seen)
    return id(value)


def _tensor_portrait(tensor: Tensor, seen: set[int]) -> Any:
    if tensor.is_meta:
        return "a tensor without data"
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (
        id(tensor),
        str(tensor.dtype),
        tuple(tensor.shape),
        tensor.requires_grad,
        raw.numpy().tobytes(),
        None if not tensor.is_leaf or tensor.grad is None else _portrait(tensor.grad, seen),
    )
