"""Ticket files: safetensors for the weights, JSON for the plan. No pickle, so no code, anywhere.

A file holds what was removed, not a network: loading applies the plan to a fresh dense model and
then fills in the weights. The example inputs are kept as shapes, so that the dense model can be
traced again.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blockprune.blocks import find_blocks
from blockprune.errors import PlanError, TicketError
from blockprune.plan import PruningPlan
from blockprune.surgery import cut_blocks, record_of
from blockprune.tracing import Call, TensorFact

__all__ = ["load_ticket", "plan_of", "save_ticket"]

_FORMAT = "blockprune-ticket-1"


def plan_of(ticket: nn.Module) -> PruningPlan:
    """Return the plan that made a ticket: everything removed from the dense model.

    Raises:
        TicketError: the module is not a ticket.
    """
    record = record_of(ticket)
    if record is None:
        raise TicketError(
            f"this {type(ticket).__name__} is not a ticket: it carries no plan. Tickets come from "
            "blockprune.prune, remove_blocks and load_ticket."
        )
    return record.plan


def save_ticket(
    ticket: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a ticket's weights and plan to one safetensors file.

    The file appears whole or not at all.

    Args:
        ticket: from `prune`, `remove_blocks` or `load_ticket`; may have been trained since.
        path: the file to write.
        overwrite: replace a file that exists.

    Raises:
        TicketError: not a ticket, the file exists, its folder does not, or the ticket was cut with
            arguments that JSON cannot hold.

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
    plan = plan_of(ticket)
    record = record_of(ticket)
    assert record is not None
    target = Path(path)
    if target.exists() and not overwrite:
        raise TicketError(
            f"{target} exists already. Pass overwrite=True (--force on the command line), or "
            "another path."
        )
    if not target.parent.is_dir():
        raise TicketError(f"cannot write {target}: the folder {target.parent} does not exist.")
    tensors, aliases = _distinct(ticket.state_dict())
    header = {
        "format": _FORMAT,
        "plan": json.loads(plan.to_json()),
        "call": {"args": _encode(record.call.args), "kwargs": _encode(record.call.kwargs)},
        "preserve_root": record.preserve_root,
        "leaf_modules": list(record.leaf_modules),
        "aliases": aliases,
    }
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"blockprune": json.dumps(header)})
        os.replace(temporary, target)
    except OSError as error:
        raise TicketError(f"cannot write {target}: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


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
    header, tensors = _read(Path(path))
    try:
        plan = PruningPlan.from_json(json.dumps(header["plan"]))
        args, kwargs = _decode(header["call"]["args"]), _decode(header["call"]["kwargs"])
        preserve_root, aliases = bool(header["preserve_root"]), dict(header["aliases"])
        # Files of before have no such entry.
        leaf_modules = [str(entry) for entry in header.get("leaf_modules", [])]
    except (KeyError, TypeError, ValueError, PlanError, ValidationError) as error:
        raise TicketError(f"{path} does not hold a valid ticket header: {error}") from error
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise TicketError(f"{path} does not hold a valid ticket header: its call is malformed")
    device = next((p.device for p in dense_model.parameters()), torch.device("cpu"))
    call = Call(args, kwargs).map(lambda fact: fact.example().to(device), TensorFact)
    analysis = find_blocks(
        dense_model,
        call,
        plan.granularity,
        preserve_root=preserve_root,
        leaf_modules=leaf_modules,
    )
    ticket = cut_blocks(dense_model, analysis, plan, verify=verify, preserve_root=preserve_root)
    _fill(ticket, tensors, aliases, path)
    return ticket


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
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise TicketError(f"there is no ticket file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("blockprune")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TicketError(f"{path} is not a readable safetensors file: {error}") from error
    if text is None:
        raise TicketError(f"{path} is a safetensors file, but not a ticket: it carries no plan.")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise TicketError(f"{path} carries a plan that is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise TicketError(
            f"{path} has the ticket format {found!r}; this version reads {_FORMAT!r}."
        )
    return header, tensors


def _fill(
    ticket: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], path: Any
) -> None:
    """Copy the weights in, after checking all of them."""
    for name, first in aliases.items():
        if first in tensors:
            tensors[name] = tensors[first]
    state = ticket.state_dict()
    problems = [f"{name} is missing" for name in state if name not in tensors]
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
        raise TicketError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}.")
    ticket.load_state_dict(tensors)


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
    ((kind, content),) = value.items()
    if kind == "tensor":
        shape, name = content
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {name!r}")
        return TensorFact(tuple(int(size) for size in shape), dtype, torch.device("cpu"))
    if kind == "tuple":
        return tuple(_decode(item) for item in content)
    if kind == "list":
        return [_decode(item) for item in content]
    if kind == "dict":
        return {str(key): _decode(item) for key, item in content.items()}
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    raise ValueError(f"unknown kind {kind!r} in the example inputs")
