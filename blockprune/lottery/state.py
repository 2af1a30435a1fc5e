"""What training can go on from, as one value and as one file that can never run code.

A file is safetensors: the tensors under ``weights/``, ``momentum/`` and ``ema/``, the rest as JSON
in its header, with a digest of everything. So a flipped bit is found as surely as a missing half.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from pydantic import BaseModel
from torch import Tensor, nn

from blockprune.errors import CheckpointError
from blockprune.lottery.averages import wide
from blockprune.lottery.steps import Step
from blockprune.tensor_files import TensorFiles

__all__ = ["TrainingState", "copied", "load_state", "misfits", "save_state", "summary"]

_FILES: Final = TensorFiles("checkpoint", "save_state", "blockprune-state-2", CheckpointError)


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A moment of training, and all that training from there on depends on; tensors on the CPU.

    Attributes:
        step: batches done; the schedule, the data order and all draws follow from it.
        weights: the model's whole ``state_dict``, buffers included.
        momentum: the optimiser's velocities by name of parameter; empty, or a name missing: fresh.
        ema: the moving averages of ``weights``; None where there are none.

    Example:
        >>> from blockprune.lottery.state import TrainingState
        >>> from blockprune.models import resnet20
        >>> state = TrainingState.of(resnet20())
        >>> state.step, len(state.weights), len(state.momentum)
        (Step(epoch=0, iteration=0), 139, 0)
    """

    step: Step
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the state before the first step of ``model``, which can train on unharmed.

        Raises:
            CheckpointError: the model keeps something in its ``state_dict`` that is no tensor.
        """
        return cls(Step(), copied(model.state_dict()))

    def load_into(self, model: nn.Module, *, averaged: bool = True) -> None:
        """Give ``model`` the weights of this state, all of them or none.

        Args:
            model: of the same structure, on any device.
            averaged: take the moving averages where there are some, as evaluations do.

        Raises:
            CheckpointError: names, shapes or types differ; the first of them are named.
        """
        problems = self.misfits(model)
        if problems:
            raise CheckpointError(f"the state does not fit the model: {summary(problems)}.")
        model.load_state_dict(self.ema if averaged and self.ema is not None else self.weights)

    def misfits(self, model: nn.Module) -> list[str]:
        """Return, in words, every difference in names, shapes and types; empty where all fit."""
        problems = misfits(self.weights, model.state_dict())
        if self.ema is not None:
            averaged = {name: wide(tensor) for name, tensor in self.weights.items()}
            problems += [f"the average {problem}" for problem in misfits(self.ema, averaged)]
        # A velocity may be missing: it starts at zero.
        known = dict(model.named_parameters(remove_duplicate=False))
        moving = {name: known[name] for name in self.momentum if name in known}
        problems += [f"the momentum {problem}" for problem in misfits(self.momentum, moving)]
        return problems


class _Header(BaseModel):
    step: Step
    averaged: bool


def save_state(state: TrainingState, path: str | os.PathLike[str]) -> None:
    """Write a state to one file, which appears whole or not at all; equal states, equal files.

    A file that is there already is replaced at once, and only by a whole one.

    Raises:
        CheckpointError: the folder does not exist, the disk is full, or a tensor is of a kind
            that safetensors cannot hold.

    Example:
        >>> import tempfile
        >>> from blockprune.lottery.state import TrainingState, load_state, save_state
        >>> from blockprune.models import resnet20
        >>> state = TrainingState.of(resnet20())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(state, f"{folder}/state.safetensors")
        ...     again = load_state(f"{folder}/state.safetensors")
        >>> all(again.weights[name].equal(tensor) for name, tensor in state.weights.items())
        True
    """
    header = {"step": state.step.model_dump(), "averaged": state.ema is not None}
    _FILES.write(path, _flat(state), header)


def load_state(path: str | os.PathLike[str]) -> TrainingState:
    """Return the state in a file that `save_state` wrote, every byte of it checked.

    Raises:
        CheckpointError: the file is absent, cut short, damaged, or of another kind.
    """
    header, tensors = _FILES.read(path, _Header)
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "momentum": {}, "ema": {}}
    for entry, tensor in tensors.items():
        part, _, name = entry.partition("/")
        if part not in parts:
            raise CheckpointError(f"{path} holds {entry!r}, which is no part of a state.")
        parts[part][name] = tensor
    ema = parts["ema"] if header.averaged else None
    return TrainingState(header.step, parts["weights"], parts["momentum"], ema)


def copied(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies on the CPU, one for each tensor however many names it has.

    Raises:
        CheckpointError: something is no tensor.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}; a state of training holds tensors only."
            )
        storage = tensor.untyped_storage().data_ptr()
        place = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        found[name] = copies[place]
    return found


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return, in words, every difference in names, shapes and types; empty where all fit."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        first, second = found[name], wanted[name]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            problems.append(f"{name} is {_kind(first)} where {_kind(second)} is needed")
    return sorted(problems)


def summary(problems: Iterable[str], limit: int = 3) -> str:
    """Return the first few problems as one clause, with the number of the others."""
    every = list(problems)
    more = f" (and {len(every) - limit} more)" if len(every) > limit else ""
    return "; ".join(every[:limit]) + more


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _flat(state: TrainingState) -> dict[str, Tensor]:
    """Return all tensors under the names that the file has for them, sharing no memory."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "weights": state.weights,
        "momentum": state.momentum,
        "ema": state.ema or {},
    }
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
