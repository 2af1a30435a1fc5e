"""The most memory that a forward pass, or a step of training, holds at one time.

Two parts make it up. The *state* is there before and after: parameters, buffers and inputs, in
training also what the optimiser keeps. The *working* memory comes and goes: outputs of layers, what
is saved for the backward pass, gradients.

On a GPU the working memory is what torch's allocator had handed out at most, beyond what it had
handed out before: scratch space of its kernels included. Elsewhere no such counter exists, and
what the operating system shows depends on it; so the storages of all tensors that the operations
of torch return are followed from when they appear to when they are freed. That is exact, the same
on every machine, and leaves out what an operation allocates and frees inside itself.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from blockprune.errors import MeasurementError
from blockprune.modes import in_mode
from blockprune.profiling.arguments import (
    Arguments,
    arguments_of,
    batches,
    check_counts,
    device_of,
)
from blockprune.profiling.execution import Execution, first_line
from blockprune.profiling.steps import OutputLoss, TrainingStep
from blockprune.randomness import preserved_rng, seed_rng

__all__ = ["PeakMemory", "inference_memory", "training_memory"]


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one forward pass, or one training step, of one batch.

    Attributes:
        batch_size: samples in the batch.
        state_bytes: parameters, buffers and inputs; in training also the optimiser's state.
        working_bytes: the most that was held beyond the state at one time.
        source: "CUDA allocator" or "tracked tensors".
    """

    batch_size: int
    state_bytes: int
    working_bytes: int
    source: str

    @property
    def peak_bytes(self) -> int:
        """State and working memory together."""
        return self.state_bytes + self.working_bytes


def inference_memory(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_size: int | None = None,
    execution: Execution | None = None,
) -> PeakMemory:
    """Return the peak memory of one forward pass in evaluation mode, without gradients.

    The pass is not compiled, whatever `execution` says: a compiled program plans its memory alone.

    Args:
        model: on any device; its modes come back.
        example_inputs: a tensor, a tuple of arguments or a dict of keywords.
        batch_size: that the inputs are repeated or cut to; None: the batch as it is given.
        execution: number format and memory layout; the model's own if None.

    Raises:
        MeasurementError: the batch size is no count, or the model refuses the inputs.

    Example:
        >>> import torch
        >>> from blockprune.profiling import inference_memory
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> found = inference_memory(net, torch.zeros(10, 8))
        >>> found.working_bytes == 4 * 10 * (4 + 2)  # both outputs, while the second is made
        True
    """
    execution = execution or Execution()
    size, batch = _one_batch(example_inputs, batch_size)
    converted = execution.converted(model)
    inputs = execution.inputs(batch, device_of(model))
    positional, named = inputs

    def forward() -> None:
        converted(*positional, **named)

    state = (*converted.parameters(), *converted.buffers(), *_tensors((inputs,)))
    with in_mode(False, converted), torch.no_grad(), preserved_rng():
        return _peak("model", forward, device_of(model), size, lambda: state)


def training_memory(
    model: nn.Module,
    example_inputs: Any,
    *,
    batch_size: int | None = None,
    loss_fn: OutputLoss | None = None,
    execution: Execution | None = None,
) -> PeakMemory:
    """Return the peak memory of one step of training, on a copy; see :class:`TrainingStep`.

    The step measured is the second one: the first makes the state of the optimiser, which is
    there from then on. Gradients count as working memory, since each step makes them anew.

    Args:
        model: on any device; it is not trained.
        example_inputs, batch_size: as for :func:`inference_memory`.
        loss_fn: of the model's output, as for :func:`compare_training`.
        execution: memory layout, and the number format of autocast.

    Raises:
        MeasurementError: the batch size is no count, or the model does not train on the inputs.

    Example:
        >>> import torch
        >>> from blockprune.profiling import training_memory
        >>> found = training_memory(torch.nn.Linear(8, 4), torch.zeros(10, 8))
        >>> found.state_bytes == 4 * (2 * (8 * 4 + 4) + 10 * 8)  # weights and momentum; inputs
        True
    """
    size, batch = _one_batch(example_inputs, batch_size)
    eager = (
        Execution(channels_last=execution.channels_last, dtype=execution.dtype)
        if execution
        else Execution()
    )
    with preserved_rng():
        seed_rng(0)
        step = TrainingStep("The model", model, batch, loss_fn, eager)

        def state() -> Iterable[Tensor]:
            kept = [step.optimizer.state_dict()["state"], step.inputs]
            return (*step.model.parameters(), *step.model.buffers(), *_tensors(kept))

        def take() -> None:
            step()
            step.optimizer.zero_grad(set_to_none=True)

        return _peak("model", take, step.device, size, state, refused=step.refused)


def _peak(
    name: str,
    work: Callable[[], None],
    device: torch.device,
    batch_size: int,
    state: Callable[[], Iterable[Tensor]],
    *,
    refused: Callable[[Exception], MeasurementError] | None = None,
) -> PeakMemory:
    """Return the peak of the second time that `work` is done; the first sets up what stays."""
    try:
        work()
    except Exception as error:
        if refused is not None:
            raise refused(error) from error
        raise MeasurementError(
            f"The {name} does not run on the example inputs: {first_line(error)}"
        ) from error
    gc.collect()
    held = {id(s): s for s in map(Tensor.untyped_storage, state())}
    state_bytes = sum(storage.nbytes() for storage in held.values())
    if device.type == "cuda":
        return PeakMemory(batch_size, state_bytes, _allocated(work, device), "CUDA allocator")
    with _LiveStorages(held.values()) as live:
        work()
    return PeakMemory(batch_size, state_bytes, live.most, "tracked tensors")


def _allocated(work: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of what operations return, from when they appear to when they go.

    Args:
        known: storages that were there before; they are not followed.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known = {storage._cdata for storage in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            self._follow(tensor.untyped_storage())
        self.most = max(self.most, self._now)
        return results

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return

        def gone(reference: object) -> None:
            self._now -= self._sizes.pop(key)
            del self._references[key]

        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, gone)
        self._now += storage.nbytes()


def _one_batch(example_inputs: Any, batch_size: int | None) -> tuple[int, Arguments]:
    sizes = None if batch_size is None else (batch_size,)
    check_counts(sizes)
    [(size, batch)] = batches(arguments_of(example_inputs), sizes)
    return size, batch


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
