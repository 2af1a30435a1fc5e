"""Ticket files: safetensors for the weights, JSON for the plan. No pickle, so no code, anywhere.

A file holds what was removed, not a network: loading applies the plan to a fresh dense model and
then fills in the weights. The example inputs are kept as shapes, so that the dense model can be
traced again.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from blockprune.blocks import find_blocks
from blockprune.errors import TicketError
from blockprune.plan import PruningPlan
from blockprune.surgery import RecoveryRecord, TicketRecord, attach, cut_blocks, record_of
from blockprune.tensor_files import TensorFiles
from blockprune.tracing import Call, TensorFact, tensors_in

__all__ = ["load_ticket", "plan_of", "save_ticket"]

_FILES: Final = TensorFiles("ticket", "save_ticket", "blockprune-ticket-2", TicketError)

_MOST_INPUT_NUMBERS: Final = 2**28
"""In all example inputs of a file together, 1 GiB of float32: a few bytes may ask for any size."""

_LONGEST_PROBLEM: Final = 200


class _Header(BaseModel):
    """What a file says of a ticket; `call` as `_encode` writes it."""

    model_config = ConfigDict(strict=True)

    plan: PruningPlan
    call: dict[Literal["args", "kwargs"], dict[str, Any]]
    preserve_root: bool
    aliases: dict[str, str]
    leaf_modules: tuple[str, ...]
    recovery: RecoveryRecord | None = None


def plan_of(ticket: nn.Module) -> PruningPlan:
    """Return the plan that made a ticket: everything removed from the dense model.

    Args:
        ticket: a ticket, or a module around one alone: `torch.compile(ticket)`,
            `nn.DataParallel(ticket)`. Names are those in the dense model, without the wrapper.

    Raises:
        TicketError: the module is not a ticket.
    """
    return _unwrapped(ticket)[1].plan


def save_ticket(
    ticket: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a ticket's weights and plan to one safetensors file.

    The file appears whole or not at all.

    Args:
        ticket: from `prune`, `remove_blocks` or `load_ticket`; may have been trained since, and
            may be inside what `torch.compile` or `nn.DataParallel` made of it.
        path: the file to write.
        overwrite: replace a file that exists.

    Raises:
        TicketError: not a ticket, the file exists, its folder does not, the disk is full, or the
            ticket was cut with arguments that JSON cannot hold.

    Example:
        >>> import tempfile, torch, blockprune
        >>> from blockprune.models import resnet20
        >>> ticket = blockprune.remove_blocks(resnet20(), ["layer1.1"], torch.rand(1, 3, 32, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     blockprune.save_ticket(ticket, f"{folder}/ticket.safetensors")
        ...     again = blockprune.load_ticket(resnet20(), f"{folder}/ticket.safetensors")
        >>> blockprune.plan_of(again).remove
        ('layer1.1',)
    """
    ticket, record = _unwrapped(ticket)
    target = Path(path)
    if os.path.exists(target) and not overwrite:
        raise TicketError(
            f"{target} exists already. Pass overwrite=True (--force on the command line), or "
            "another path."
        )
    try:
        _check_size(record.call)
    except ValueError as error:
        raise TicketError(f"cannot write {target}: {error}. Cut it with fewer samples.") from error
    tensors, aliases = _distinct(ticket.state_dict())
    header = {
        "plan": record.plan.model_dump(mode="json"),
        "call": {"args": _encode(record.call.args), "kwargs": _encode(record.call.kwargs)},
        "preserve_root": record.preserve_root,
        "leaf_modules": list(record.leaf_modules),
        "aliases": aliases,
        "recovery": record.recovery and record.recovery.model_dump(mode="json"),
    }
    _FILES.write(target, tensors, header)


def load_ticket(
    dense_model: nn.Module, path: str | os.PathLike[str], *, verify: bool = True
) -> nn.Module:
    """Return the ticket in a file, rebuilt from a dense model of the architecture it was cut from.

    Args:
        dense_model: left untouched; its weights do not matter.
        path: a file that `save_ticket` wrote.
        verify: prove the rebuilt ticket equal to its zero-branch reference.

    Raises:
        TicketError: the file is absent, damaged, not a ticket, or its weights do not fit.
        StalePlanError: it was cut from a model of another structure.
    """
    header, tensors = _FILES.read(path, _Header)
    device = next((p.device for p in dense_model.parameters()), torch.device("cpu"))
    try:
        call = _call_of(header).map(lambda fact: fact.example().to(device), TensorFact)
    # Torch refuses sizes and types that no tensor can have by any of these.
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise TicketError(f"{path} does not hold a valid ticket header: {error}") from error
    analysis = find_blocks(
        dense_model,
        call,
        header.plan.granularity,
        preserve_root=header.preserve_root,
        leaf_modules=header.leaf_modules,
    )
    # Plans of earlier versions do not say it.
    how = {"preserve_root": header.preserve_root, "leaf_modules": header.leaf_modules}
    ticket = cut_blocks(dense_model, analysis, header.plan.model_copy(update=how), verify=verify)
    _fill(ticket, tensors, header.aliases, path)
    record = record_of(ticket)
    assert record is not None
    attach(ticket, dataclasses.replace(record, recovery=header.recovery))
    return ticket


def _unwrapped(module: nn.Module) -> tuple[nn.Module, TicketRecord]:
    """Return the ticket that a module is, or is around alone, and how it was made.

    Raises:
        TicketError: there is none.
    """
    inner = module
    while (record := record_of(inner)) is None:
        # What compiles, spreads or replicates a module has nothing of its own but that module.
        children = list(inner.children())
        own = (*inner.parameters(recurse=False), *inner.buffers(recurse=False))
        if len(children) != 1 or own:
            raise TicketError(
                f"this {type(module).__name__} is not a ticket: it carries no plan. Tickets come "
                "from blockprune.prune, remove_blocks and load_ticket."
            )
        inner = children[0]
    return inner, record


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and the further names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    known: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in known:
            aliases[name] = known[identity]
        else:
            known[identity] = name
            tensors[name] = tensor
    return tensors, aliases


def _call_of(header: _Header) -> Call:
    """Return the example inputs; `ValueError` where they are none, or too large."""
    args, kwargs = (_decode(header.call.get(part)) for part in ("args", "kwargs"))
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise ValueError("its call is malformed")
    call = Call(args, kwargs)
    _check_size(call)
    return call


def _check_size(call: Call) -> None:
    """Raise `ValueError` where a call has more numbers than a file may ask for."""
    facts = tensors_in((call.args, call.kwargs), TensorFact)
    numbers = sum(math.prod(fact.shape) for fact in facts)
    if numbers > _MOST_INPUT_NUMBERS:
        raise ValueError(
            f"its example inputs have more than {_MOST_INPUT_NUMBERS:,} numbers, the most that are "
            "made for a file"
        )


def _fill(
    ticket: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], path: Any
) -> None:
    """Copy the weights in, after checking all of them."""
    state = ticket.state_dict()
    problems = [
        f"{name} stands for {first}"
        for name, first in aliases.items()
        if name in tensors or first not in tensors
    ]
    tensors |= {name: tensors[first] for name, first in aliases.items() if first in tensors}
    problems += [f"{name} is missing" for name in state if name not in tensors]
    problems += [f"{name} is not in the model" for name in tensors if name not in state]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype} in the file and "
        f"{tuple(tensor.shape)} {tensor.dtype} in the model"
        for name, tensor in state.items()
        if name in tensors
        and (tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype)
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        first_ones = "; ".join(problem[:_LONGEST_PROBLEM] for problem in problems[:3])
        raise TicketError(f"{path} does not fit the model: {first_ones}{more}.")
    # Some classes ask for the version of their state, which goes with it.
    state.update({name: tensors[name] for name in state})
    ticket.load_state_dict(state)


def _encode(value: Any) -> Any:
    """Return example inputs as JSON: containers are tagged, tensors are shape and dtype."""
    if isinstance(value, TensorFact):
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return {"list": [_encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TicketError(
        f"the ticket was cut with an argument of type {type(value).__name__}, which a ticket file "
        "cannot hold. Cut it with example_inputs of tensors, numbers and strings to save it."
    )


def _decode(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("an example input is malformed")
    ((kind, content),) = value.items()
    if kind == "tensor":
        shape, name = content
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{str(shape)[:80]} is no shape")
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {str(name)[:40]!r}")
        return TensorFact(tuple(shape), dtype, torch.device("cpu"))
    if kind == "tuple":
        return tuple(_decode(item) for item in content)
    if kind == "list":
        return [_decode(item) for item in content]
    if kind == "dict" and isinstance(content, dict):
        return {key: _decode(item) for key, item in content.items()}
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    raise ValueError(f"unknown kind {kind[:40]!r} in the example inputs")
