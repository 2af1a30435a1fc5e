"""MODEL and ``--weights`` to an ``nn.Module`` with example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blockprune.errors import ModelSpecError, TraceError
from blockprune.inputs import infer_example_inputs, random_inputs
from blockprune.models.building import model_and_inputs, model_factory
from blockprune.tracing import map_tensors

__all__ = ["ModelSource", "build_model", "load_weights"]

KEYS_SHOWN = 4


@dataclass(frozen=True)
class ModelSource:
    """What the command line says about a model: where it comes from and what it reads."""

    spec: str
    weights: Path | None
    shapes: Sequence[tuple[int, ...]]
    seed: int

    def load(self, device: torch.device | None = None) -> tuple[nn.Module, Any]:
        """Build the model, with the weights given or random ones, and example inputs for it.

        Args:
            device: of both; None: as they are made.
        """
        model, inputs = build_model(self.spec, self.seed)
        if self.weights is not None:
            load_weights(model, self.weights)
        if device is not None:
            model, inputs = model.to(device), map_tensors(inputs, lambda t: t.to(device))
        if self.shapes:
            inputs = random_inputs(model, self.shapes, seed=self.seed)
        elif inputs is None:
            inputs = self._inferred_inputs(model)
        return model, inputs

    def _inferred_inputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        try:
            return infer_example_inputs(model, seed=self.seed)
        except TraceError as error:
            raise TraceError(
                f"{error} Here, give --input-shape, or a MODEL package.module:factory that returns "
                "(model, example_inputs)."
            ) from error


def build_model(spec: str, seed: int) -> tuple[nn.Module, Any]:
    """Build the model that MODEL names, with random weights drawn from ``seed``.

    Args:
        spec: see :func:`blockprune.models.building.model_factory`.
        seed: of the weights.

    Returns:
        The model, and the example inputs that a factory gave with it, None if none.

    Raises:
        ModelSpecError: the spec names nothing that can be built.
        MissingExtraError: timm was asked for and is not installed.
    """
    factory = model_factory(spec)
    torch.manual_seed(seed)
    return model_and_inputs(spec, factory())


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``; no code of the file runs.

    Args:
        model: takes the weights, in place.
        path: ``.safetensors``, or anything ``torch.load(weights_only=True)`` reads. A mapping
            with ``state_dict`` or ``model`` in it is opened, a ``module.`` prefix dropped.

    Raises:
        ModelSpecError: the file cannot be read, or its keys or shapes are not the model's.
    """
    state = _without_prefix(_read_state(path))
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} ({_size(state[key])}, not {_size(own[key])})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{label} {_some(keys)}"
        for label, keys in (
            ("missing from the file:", missing),
            ("unknown to the model:", unexpected),
            ("of another shape:", reshaped),
        )
        if keys
    ]
    if faults:
        raise ModelSpecError(
            f"The weights in {path} are not those of {type(model).__name__}: {'; '.join(faults)}."
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can make the readers raise anything: KeyError, EOFError, UnpicklingError, ...
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise ModelSpecError(
            f"{path} cannot be read as a state dict ({reason}). Save it with "
            "safetensors.torch.save_file(model.state_dict(), path) or "
            "torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelSpecError(
            f"{path} holds no state dict (a mapping of names to tensors), "
            f"but a {type(loaded).__name__}."
        )
    return dict(loaded)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the ``module.`` that DataParallel puts before every name."""
    if not all(key.startswith("module.") for key in state):
        return state
    return {key.removeprefix("module."): value for key, value in state.items()}


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more


def _size(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"
