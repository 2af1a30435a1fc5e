"""The recordings of one model: under which conditions it is run, and what is put back after."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import raise_if_out_of_memory
from blockprune.randomness import seed_rng
from blockprune.tracing.calls import Call, refused
from blockprune.tracing.copying import (
    copy_model,
    mark_as_writing,
    structural_copy,
    writes_weights,
)
from blockprune.tracing.devices import Elsewhere
from blockprune.tracing.recorded import Invocation, Recording, Step, knowns
from blockprune.tracing.recording import record
from blockprune.tracing.state import State
from blockprune.tracing.values import TensorFact, tensors_in
from blockprune.tracing.weights import WritesWeights

__all__ = ["Run", "Runs", "other_batch"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Run:
    """One recording.

    Attributes:
        name: of the condition: "eval", "train", "batch", "aliased", "no grad", "autocast" or a
            dtype.
        mode: "eval" or "train".
        by_path: what was recorded of each module, by its path.
    """

    name: str
    mode: str
    recording: Recording
    by_path: dict[str, list[Invocation]]


class Runs:
    """The recordings of `root`, each made when it is first asked for.

    Args:
        root: a structural copy of the model, which is copied again for each run.
        call: the example inputs.

    Raises:
        TraceError: the model does not run on `call`; quotes what it says.
    """

    def __init__(self, root: nn.Module, call: Call) -> None:
        self.root, self.call = root, call
        self._made: dict[str, Run | None] = {}
        self._shared: list[list[str]] | None = None
        self.grad = True
        self.main = self._first()
        self.merging = self._merging()

    @property
    def expected(self) -> list[Tensor]:
        """The tensors that the model returns in eval mode."""
        return self.main.recording.output

    def always(self) -> Iterator[Run]:
        """Yield the recordings that every graph has to agree with, the first one left out."""
        in_train = self._attempt("train", self._other_batch, train=True)
        if in_train is None:
            in_train = self.alike()
            yield from _present(self.wider())
        else:
            self._add_skipped(in_train)
        yield from _present(in_train)

    def _add_skipped(self, run: Run) -> None:
        """Add to a run in train mode what calls of modules that it skipped do (layer drop)."""
        for seed in range(1, 4):
            skipped = self.main.by_path.keys() - run.by_path.keys()
            if not skipped:
                return
            other = self._attempt(f"train {seed}", self._other_batch, train=True, seed=seed)
            if other is not None:
                found = skipped & other.by_path.keys()
                run.by_path.update({path: other.by_path[path] for path in found})
                run.recording.stopped.update(other.recording.stopped)

    def alike(self) -> Run | None:
        """Return the recording in train mode, of as many samples as the example has."""
        return self._attempt("train alike", self._as_it_is, train=True)

    def wider(self) -> Run | None:
        """Return the recording in eval mode, of another number of samples."""
        return self._attempt("batch", self._other_batch, train=False)

    def longer(self) -> Run | None:
        """Return the recording in which dimensions of size 1, but for the samples, have size 2."""

        def grown(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().clone()
            for dimension in range(1, tensor.dim()):
                if tensor.shape[dimension] == 1:
                    tensor = torch.cat([tensor, tensor], dimension)
            return tensor

        given = list(tensors_in((self.call.args, self.call.kwargs)))
        if not any(1 in tensor.shape[1:] for tensor in given):
            return None
        return self._attempt("longer", lambda: self.call.map(grown), train=False)

    def _merging(self) -> frozenset[str]:
        """Return the paths of modules in whose own forward tensors of one shape are added.

        Where a module adds two tensors that it is given, the one that calls it does.
        """
        steps = (
            event
            for run in (self.main, *self.always())
            for calls in run.by_path.values()
            for call in calls
            for event in call.events
        )
        return frozenset(
            path
            for step in steps
            if isinstance(step, Step) and step.merges
            for path in _adding(step)
        )

    def merges_in(self, path: str) -> bool:
        """Whether tensors of one shape are added in the module at `path`, or inside."""
        return any(name == path or name.startswith(f"{path}.") for name in self.merging)

    def stopped(self) -> dict[str, str]:
        """Return the paths of modules that no graph can hold, as every recording has it."""
        found: dict[str, str] = {}
        for run in (self.main, *self.always()):
            found |= run.recording.stopped
        return found

    def aliased(self) -> Run | None:
        """Return the recording in which equal tensors among the arguments are one."""
        seen: dict[Any, Tensor] = {}

        def unify(tensor: Tensor) -> Tensor:
            return seen.setdefault((tensor.shape, tensor.dtype, tensor.device), tensor)

        own = self.call.map(lambda tensor: tensor.detach().clone())
        one = own.map(unify)
        count = len({id(tensor) for tensor in tensors_in((one.args, one.kwargs))})
        if count == len(list(tensors_in((own.args, own.kwargs)))):
            return None
        return self._attempt("aliased", lambda: one, train=False, as_it_is=True)

    def without_grad(self) -> Run | None:
        """Return the recording under the other grad state."""
        return self._attempt("no grad", self._as_it_is, train=False, grad=not self.grad)

    def with_grad_of_inputs(self) -> Run | None:
        """Return the recording in which the inputs require gradients."""

        def required(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.is_floating_point())

        return self._attempt(
            "grad of inputs", lambda: self.call.map(required), train=False, as_it_is=True
        )

    def under_autocast(self) -> Run | None:
        """Return the recording under autocast, or without it where it is on."""
        device = next((t.device.type for t in self.root.parameters()), "cpu")
        is_on = torch.is_autocast_enabled(device)
        with torch.autocast(device, torch.bfloat16, enabled=not is_on):
            return self._attempt("autocast", self._as_it_is, train=False)

    def in_dtype(self, dtype: torch.dtype, *, train: bool = False) -> Run | None:
        """Return the recording of the model and its inputs in another dtype."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return self._attempt(
            f"{dtype}{' in train mode' if train else ''}",
            lambda: self.call.map(cast),
            train=train,
            convert=lambda model: model.to(dtype),
        )

    def on_device(self, kind: str) -> Run | None:
        """Return the recording on another kind of device, without numbers."""
        there = Elsewhere(kind)
        return self._attempt(
            f"device {kind}",
            lambda: self.call.map(there.tensor),
            train=False,
            convert=there.model,
            under=there.entered,
        )

    def shared_names(self, path: str) -> dict[str, str]:
        """Return the names, within the module at `path`, of what is recorded under another name."""
        if self._shared is None:
            names: dict[int, list[str]] = {}
            everything = (
                *self.root.named_modules(remove_duplicate=False),
                *self.root.named_parameters(remove_duplicate=False),
                *self.root.named_buffers(remove_duplicate=False),
            )
            for name, value in everything:
                names.setdefault(id(value), []).append(name)
            self._shared = [several for several in names.values() if len(several) > 1]
        prefix = f"{path}." if path else ""
        found = {}
        for first, *others in self._shared:
            inner = next((name for name in others if name.startswith(prefix)), None)
            if inner is not None and not first.startswith(prefix):
                found[first] = inner.removeprefix(prefix)
        return found

    def of_part(self, path: str, call: Call, called: Collection[str], replayed: Invocation) -> Run:
        """Return the recording of one module, called another way than the model around it does.

        Raises:
            Exception: what the module says of such a call.
        """
        model = structural_copy(self.root.get_submodule(path))
        seed_rng(0)
        found = record(
            model,
            call.map(lambda fact: fact.example(), TensorFact),
            train=False,
            grad=self.grad,
            leaves=frozenset(called),
            path=path,
            replayed=replayed,
        )
        return Run("other arguments", "eval", found, _by_path(found))

    # --- one run --------------------------------------------------------------------------------

    def _first(self) -> Run:
        """Record the model as it is called: with gradients where it can."""
        failure: Exception | None = None
        for self.grad, sizes in ((True, True), (False, True), (True, False), (False, False)):
            try:
                return self._run("eval", self.call, train=False, grad=self.grad, sizes=sizes)
            except Exception as error:
                raise_if_out_of_memory(error)
                failure = failure or error
            try:
                self._eager()
            except Exception as error:
                raise refused(self.root, self.call, error) from error
        assert failure is not None
        raise refused(self.root, self.call, failure) from failure

    def _eager(self) -> None:
        copy = structural_copy(self.root).eval()
        given = self.call.map(lambda tensor: tensor.detach().clone())
        seed_rng(0)
        with torch.no_grad():
            copy(*given.args, **given.kwargs)

    def _as_it_is(self) -> Call:
        return self.call

    def _other_batch(self) -> Call | None:
        return other_batch(self.call)

    def _attempt(
        self, name: str, make_call: Callable[[], Call | None], *, train: bool, **options: Any
    ) -> Run | None:
        """Return a recording, made once; None where the model does not run that way."""
        if name not in self._made:
            options.setdefault("grad", self.grad)
            call, self._made[name] = make_call(), None
            try:
                if call is not None:
                    self._made[name] = self._run(name, call, train=train, **options)
            except Exception as error:
                raise_if_out_of_memory(error)
        return self._made[name]

    def _run(
        self,
        name: str,
        call: Call,
        *,
        train: bool,
        grad: bool,
        sizes: bool = True,
        as_it_is: bool = False,
        seed: int = 0,
        convert: Callable[[nn.Module], nn.Module] | None = None,
        under: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Run:
        def once(only: frozenset[str] | None) -> tuple[Recording, set[str]]:
            # A conversion writes into the parameters, so it gets some of its own.
            model = convert(copy_model(self.root)) if convert else structural_copy(self.root)
            given = call if as_it_is else call.map(lambda tensor: tensor.detach().clone())
            seed_rng(seed)
            state = State(model, [*enumerate(given.args), *given.kwargs.items()], only)
            states.append(state)
            is_own = convert is not None or writes_weights(self.root)
            shared = [] if is_own else list(model.parameters())
            before = [(weight, weight.grad) for weight in shared]
            try:
                with under():
                    found = record(
                        model,
                        given,
                        train=train,
                        grad=grad,
                        sizes=sizes,
                        state=None if only is None else state,
                        keep_output=name == "eval",
                        shared=[*shared, *(held for _, held in before if held is not None)],
                    )
                state.changed()
                return found, state.moved
            finally:
                for weight, held in before:
                    weight.grad = held

        states: list[State] = []

        def restore() -> None:
            while states:
                states.pop().restore()

        try:
            try:
                found, changed = once(None)
            except WritesWeights:
                mark_as_writing(self.root)
                found, changed = once(None)
            if changed:
                # What was a cache is filled by now, and changes no more.
                found, changed = once(frozenset(changed))
            if changed:
                # Once more from where it began, to see in whose forward.
                restore()
                found, _ = once(frozenset(changed))
                restore()
        except Exception:
            restore()
            raise
        return Run(name, "train" if train else "eval", found, _by_path(found))


def _by_path(found: Recording) -> dict[str, list[Invocation]]:
    by_path: dict[str, list[Invocation]] = {}
    for invocation in found.top.invocations():
        by_path.setdefault(invocation.path, []).append(invocation)
    return by_path


def _adding(step: Step) -> Iterator[str]:
    """Yield the paths of the modules that an addition is part of the forward of."""
    operands = {id(known) for known in knowns((step.args, step.kwargs)) if known.is_tensor}
    call = step.within
    while call is not None:
        yield call.path
        given = {id(known) for known in knowns((call.args, call.kwargs))}
        call = call.within if operands <= given else None


def _present(run: Run | None) -> Iterator[Run]:
    if run is not None:
        yield run


def other_batch(call: Call) -> Call | None:
    """Return a call with another number of samples, None where it shows none.

    Samples lie along the first dimension of the tensors, or are items of a list.
    """
    tensors = [t for t in tensors_in((call.args, call.kwargs)) if t.dim()]
    lists = [v for v in (*call.args, *call.kwargs.values()) if type(v) is list and v]
    if lists:
        count = len(lists[0])

        def longer(value: Any) -> Any:
            return [*value, value[-1]] if type(value) is list and len(value) == count else value

        own = call.map(lambda tensor: tensor.detach().clone())
        changed = {name: longer(value) for name, value in own.kwargs.items()}
        return Call(tuple(map(longer, own.args)), changed).map(lambda tensor: tensor.clone())
    if not tensors:
        return None
    count = tensors[0].shape[0]
    if not count:
        return None

    def wider(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count or tensor.layout != torch.strided:
            return tensor.detach().clone()
        tensor = tensor.detach()
        return tensor[:2].clone() if count > 2 else torch.cat([tensor, tensor[:1]])

    return call.map(wider)
