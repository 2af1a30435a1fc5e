"""MODEL and ``--weights`` to an ``nn.Module`` with example inputs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blockprune.cli.imports import NotFound, imported
from blockprune.errors import MissingExtraError, ModelSpecError, TraceError, close_names
from blockprune.inputs import infer_example_inputs, random_inputs
from blockprune.tracing import map_tensors

__all__ = ["ModelSource", "build_model", "load_weights"]

FORMS = "MODEL is torchvision:NAME, timm:NAME, blockprune:NAME or package.module:factory."
RETURNS = (
    "A factory returns a torch.nn.Module, or (model, example_inputs) with a Tensor, a tuple of "
    "arguments or a dict of keywords."
)
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
        spec: ``torchvision:NAME``, ``timm:NAME``, ``blockprune:NAME``, or
            ``package.module:factory``, a callable without arguments (or a model) that can be
            imported from the current directory.
        seed: of the weights.

    Returns:
        The model, and the example inputs that a factory gave with it, None if none.

    Raises:
        ModelSpecError: the spec names nothing that can be built.
        MissingExtraError: timm was asked for and is not installed.
    """
    origin, separator, name = spec.partition(":")
    if not separator or not origin or not name:
        raise ModelSpecError(f"{spec!r} names no model. {FORMS}")
    origins = {"torchvision": _torchvision, "timm": _timm, "blockprune": _own}
    factory = origins[origin](name) if origin in origins else _imported(origin, name)
    torch.manual_seed(seed)
    return _model_and_inputs(spec, factory())


def _model_and_inputs(spec: str, built: object) -> tuple[nn.Module, Any]:
    """Return what a factory gave as a model and example inputs, None if it gave none.

    Raises:
        ModelSpecError: it is neither a model nor a pair of a model and example inputs.
    """
    match built:
        case nn.Module():
            return built, None
        case (nn.Module() as model, Tensor() | tuple() as inputs):
            return model, inputs
        case (nn.Module() as model, Mapping() as inputs):
            # A tokenizer returns a mapping of a class of its own.
            return model, dict(inputs)
    found = [f"a {type(item).__name__}" for item in (built if type(built) is tuple else [built])]
    raise ModelSpecError(f"{spec} gives {' and '.join(found) or 'nothing'}. {RETURNS}")


def _torchvision(name: str) -> Callable[[], object]:
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise ModelSpecError(
            f"torchvision has no model {name!r}.{close_names(name, known)} "
            "torchvision.models.list_models() lists all."
        )
    builder = torchvision.models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    no_download = {key: None for key in ("weights", "weights_backbone") if key in accepted}

    def build() -> object:
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce a future change of their random weights.
            warnings.simplefilter("ignore", FutureWarning)
            return builder(**no_download)

    return build


def _timm(name: str) -> Callable[[], object]:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(
            "timm: models need timm, which is not installed: pip install 'blockprune[zoo]'"
        ) from error
    if not timm.is_model(name):
        raise ModelSpecError(
            f"timm has no model {name!r}.{close_names(name, timm.list_models())} "
            "timm.list_models() lists all."
        )
    return lambda: timm.create_model(name, pretrained=False)


def _own(name: str) -> Callable[[], object]:
    from blockprune import models

    known = {n: f for n in models.__all__ if inspect.isfunction(f := getattr(models, n))}
    if name not in known:
        raise ModelSpecError(f"blockprune has no model {name!r}, it has {', '.join(known)}.")
    return known[name]


def _imported(module_name: str, attribute: str) -> Callable[[], object]:
    try:
        found = imported(module_name, attribute)
    except NotFound as error:
        raise ModelSpecError(f"{error} {FORMS}") from error
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise ModelSpecError(
            f"{module_name}:{attribute} is a {type(found).__name__}, "
            "neither a model nor a callable that makes one."
        )
    factory: Callable[[], object] = found
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelSpecError(
            f"{module_name}:{attribute} cannot be called without arguments ({error}). "
            "Give a factory that needs none."
        ) from error
    return factory


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
