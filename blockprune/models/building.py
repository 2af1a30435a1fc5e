"""What a user's text such as ``torchvision:resnet18`` stands for, as a factory of models."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from blockprune.errors import MissingExtraError, ModelSpecError, close_names
from blockprune.imports import NotFound, imported

__all__ = ["FORMS", "model_and_inputs", "model_factory"]

FORMS = "MODEL is torchvision:NAME, timm:NAME, blockprune:NAME or package.module:factory."
RETURNS = (
    "A factory returns a torch.nn.Module, or (model, example_inputs) with a Tensor, a tuple of "
    "arguments or a dict of keywords."
)

Factory = Callable[..., object]


def model_factory(spec: str, arguments: Mapping[str, Any] | None = None) -> Callable[[], object]:
    """Return what builds the model that ``spec`` names; nothing is built yet.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``blockprune:NAME``, or
            ``package.module:factory``, a callable (or a model) that can be imported, also from
            the current directory.
        arguments: keywords that the factory is called with.

    Raises:
        ModelSpecError: the spec names nothing that can be built, or not with these arguments.
        MissingExtraError: timm was asked for and is not installed.

    Example:
        >>> from blockprune.models.building import model_factory
        >>> model_factory("blockprune:resnet20", {"in_channels": 1})().conv1.in_channels
        1
    """
    arguments = dict(arguments or {})
    origin, separator, name = spec.partition(":")
    if not separator or not origin or not name:
        raise ModelSpecError(f"{spec!r} names no model. {FORMS}")
    origins = {"torchvision": _torchvision, "timm": _timm, "blockprune": _own}
    if origin in origins:
        factory = origins[origin](name)
        _check_arguments(spec, factory, arguments)
    else:
        factory = _imported(origin, name, arguments)
    return lambda: factory(**arguments)


def model_and_inputs(spec: str, built: object) -> tuple[nn.Module, Any]:
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


def _torchvision(name: str) -> Factory:
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

    def build(**arguments: Any) -> object:
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce a future change of their random weights.
            warnings.simplefilter("ignore", FutureWarning)
            return builder(**no_download, **arguments)

    return build


def _timm(name: str) -> Factory:
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
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def _own(name: str) -> Factory:
    from blockprune import models

    known = {n: f for n in models.__all__ if inspect.isfunction(f := getattr(models, n))}
    if name not in known:
        raise ModelSpecError(f"blockprune has no model {name!r}, it has {', '.join(known)}.")
    return known[name]


def _imported(module_name: str, attribute: str, arguments: Mapping[str, Any]) -> Factory:
    try:
        found = imported(module_name, attribute)
    except NotFound as error:
        raise ModelSpecError(f"{error} {FORMS}") from error
    if isinstance(found, nn.Module) and not arguments:
        return lambda: found
    if not callable(found):
        raise ModelSpecError(
            f"{module_name}:{attribute} is a {type(found).__name__}, "
            "neither a model nor a callable that makes one."
        )
    factory: Factory = found
    _check_arguments(f"{module_name}:{attribute}", factory, arguments)
    return factory


def _check_arguments(spec: str, factory: Factory, arguments: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        given = f"with {', '.join(arguments)}" if arguments else "without arguments"
        advice = (
            f"It takes {', '.join(inspect.signature(factory).parameters) or 'none'}."
            if arguments
            else "Give a factory that needs none."
        )
        raise ModelSpecError(f"{spec} cannot be called {given} ({error}). {advice}") from error
