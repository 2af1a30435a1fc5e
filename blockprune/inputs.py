"""Example inputs for a model that comes without any.

A shape is never assumed, only proposed and then tried: what the model says about itself
(timm's ``pretrained_cfg``, an ``image_size``) comes first, then its stem, the first layer
that holds parameters, which fixes the rank, the channels and the dtype and leaves the size
open. For the size a short ladder is climbed, and the first size that the model's forward
accepts wins. Trials run on a copy of the model and, where they can, on fake tensors, which
have shapes and no values, so that a rejected size costs milliseconds.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from blockprune.errors import TraceError, raise_if_out_of_memory
from blockprune.tracing import copy_model, structural_copy

__all__ = ["infer_example_inputs", "random_inputs"]

IMAGE_SIZES = (224, 32, 64, 128, 256, 299, 384, 512)
# Video networks train on 112 or 224 pixels; a clip is 16 times an image, so small goes first.
CLIP_SIZES = (112, 224, 32, 64, 128, 256)
CLIP_FRAMES = (16, 8, 32, 4)
SIGNAL_LENGTHS = (1024, 128, 4096, 16000, 32)
SEQUENCE_LENGTHS = (16, 8, 32, 64, 128, 4)
TRIED_SHOWN = 6

# Errors that say "fake tensors cannot do this", as opposed to "the model refuses this shape".
FAKE_LIMITS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)


@dataclass(frozen=True)
class Stem:
    """The first layer with parameters, and what it says about the input."""

    name: str
    kind: str  # "image", "clip", "signal", "features", "sequence" or "tokens"
    width: int  # channels, features, or the size of the vocabulary
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Trial:
    """A shape (batch excluded) that was proposed, and the error that refused it."""

    shape: tuple[int, ...]
    error: str


def infer_example_inputs(
    model: nn.Module, *, batch_size: int = 1, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return random inputs of a shape that the model's forward accepts.

    The shape comes from the model's own configuration where it has one, else from its stem
    and a ladder of sizes. A size that both the evaluation and the training forward accept is
    preferred to one that only evaluation accepts.

    Args:
        model: the network; it is not run, a copy of it is, and nothing of it changes.
        batch_size: first dimension of every input.
        seed: of the values, which are standard normal (or uniform token ids) and drawn from
            a generator of their own: the global random state stays as it is.

    Returns:
        One tensor for each required positional parameter of ``model.forward`` (one where all
        have defaults), all of the same shape, on the device and of the dtype of the stem.

    Raises:
        TraceError: no shape fits; the message quotes what was tried and asks for
            ``example_inputs``.

    Example:
        >>> from torch import nn
        >>> [tuple(x.shape) for x in infer_example_inputs(nn.Linear(5, 2), batch_size=4)]
        [(4, 5)]
    """
    if batch_size < 1:
        raise TraceError(f"batch_size must be at least 1, not {batch_size}.")
    arity = _arity(model)
    stem = _find_stem(model)
    if stem is None:
        raise TraceError(
            f"No input shape can be inferred for {type(model).__name__}: it has no convolution, "
            "linear, normalisation, recurrent or embedding layer to start from. "
            "Pass example_inputs=."
        )
    probe = _Probe(model, stem, arity)
    shape = _choose(probe, list(_configured_shapes(model, stem)), list(_ladder(stem)), batch_size)
    if shape is None:
        raise TraceError(_nothing_fits(model, stem, arity, probe.trials))
    return random_inputs(model, [(batch_size, *shape)], seed=seed)


def random_inputs(
    model: nn.Module, shapes: Sequence[Sequence[int]], *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return random inputs of the given shapes, of the dtype and on the device of the stem.

    Args:
        model: the network that the inputs are for.
        shapes: one full shape (batch included) for each required positional parameter of
            ``model.forward``; a single one serves for all of them.
        seed: of the values; the global random state stays as it is.

    Returns:
        One tensor for each shape: standard normal, or token ids where the stem is an embedding.

    Raises:
        TraceError: the number of shapes is neither one nor the number of inputs, or a
            dimension is not positive.

    Example:
        >>> from torch import nn
        >>> random_inputs(nn.Embedding(10, 4), [(2, 3)])[0].dtype
        torch.int64
    """
    for shape in shapes:
        if not shape or any(size < 1 for size in shape):
            raise TraceError(
                f"An input shape needs positive dimensions, not {_joined(shape)}; "
                "1,3,224,224 is one image of three channels."
            )
    arity = _arity(model)
    if len(shapes) not in (1, arity):
        raise TraceError(
            f"{type(model).__name__}.forward requires {arity} input(s), and {len(shapes)} shapes "
            "were given. Give one shape for all of them, or one for each."
        )
    stem = _find_stem(model)
    full = [tuple(shape) for shape in shapes] * (arity if len(shapes) == 1 else 1)
    generator = torch.Generator().manual_seed(seed)
    return tuple(_draw(shape, stem, generator) for shape in full)


def _draw(shape: tuple[int, ...], stem: Stem | None, generator: torch.Generator) -> Tensor:
    if stem is None:
        return torch.randn(shape, generator=generator)
    if stem.kind == "tokens":
        tokens = torch.randint(stem.width, shape, generator=generator)
        return tokens.to(stem.device)
    return torch.randn(shape, generator=generator).to(stem.device, stem.dtype)


def _arity(model: nn.Module) -> int:
    """Count the tensors that forward needs: its positional parameters without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if keywords:
        raise TraceError(
            f"{type(model).__name__}.forward requires the keyword(s) {', '.join(keywords)}, whose "
            "shapes cannot be inferred. Pass example_inputs= as a dict."
        )
    return max(1, len(required))


def _find_stem(model: nn.Module) -> Stem | None:
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue
        described = _describe(module)
        weight = next(module.parameters(recurse=False), None)
        if described is not None and weight is not None:
            kind, width = described
            return Stem(name, kind, width, weight.dtype, weight.device)
    return None


def _describe(layer: nn.Module) -> tuple[str, int] | None:
    """Say which kind of input a layer reads, and how wide it is."""
    match layer:
        case nn.Conv2d() | nn.ConvTranspose2d():
            return "image", layer.in_channels
        case nn.Conv3d() | nn.ConvTranspose3d():
            return "clip", layer.in_channels
        case nn.Conv1d() | nn.ConvTranspose1d():
            return "signal", layer.in_channels
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            return "image", layer.num_features
        case nn.BatchNorm3d() | nn.InstanceNorm3d():
            return "clip", layer.num_features
        case nn.GroupNorm():
            return "image", layer.num_channels
        case nn.BatchNorm1d():
            return "features", layer.num_features
        case nn.LayerNorm():
            return "features", layer.normalized_shape[-1]
        case nn.Linear():
            return "features", layer.in_features
        case nn.RNNBase():
            return "sequence", layer.input_size
        case nn.Embedding() | nn.EmbeddingBag():
            return "tokens", layer.num_embeddings
    return None


def _configured_shapes(model: nn.Module, stem: Stem) -> Iterator[tuple[int, ...]]:
    """Yield the input shapes (batch excluded) that the model declares for itself."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        size = _read(getattr(model, attribute, None), "input_size")
        if isinstance(size, Sequence) and all(isinstance(n, int) for n in size):
            yield tuple(size)
    if stem.kind not in ("image", "clip"):
        return
    for holder in (model, getattr(model, "config", None), *model.modules()):
        for attribute in ("image_size", "img_size"):
            size = _square(_read(holder, attribute))
            if size is None:
                continue
            if stem.kind == "image":
                yield (stem.width, *size)
            else:
                yield from ((stem.width, frames, *size) for frames in CLIP_FRAMES)
            return


def _read(holder: object, key: str) -> object:
    if isinstance(holder, Mapping):
        return holder.get(key)
    return getattr(holder, key, None)


def _square(size: object) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(type(n) is int for n in size):
        return size[0], size[1]
    return None


def _ladder(stem: Stem) -> Iterator[tuple[int, ...]]:
    """Yield the shapes (batch excluded) to try for a stem, most likely first."""
    match stem.kind:
        case "image":
            yield from ((stem.width, size, size) for size in IMAGE_SIZES)
        case "clip":
            for size in CLIP_SIZES:
                yield from ((stem.width, frames, size, size) for frames in CLIP_FRAMES)
        case "signal":
            yield from ((stem.width, length) for length in SIGNAL_LENGTHS)
        case "tokens":
            yield from ((length,) for length in SEQUENCE_LENGTHS)
        case "sequence":
            yield from ((length, stem.width) for length in SEQUENCE_LENGTHS)
        case _:
            yield (stem.width,)
            yield from ((length, stem.width) for length in SEQUENCE_LENGTHS)
            for channels in (1, 3):  # an image that the forward flattens
                side = math.isqrt(stem.width // channels)
                if channels * side * side == stem.width:
                    yield (channels, side, side)


def _choose(
    probe: _Probe,
    configured: Iterable[tuple[int, ...]],
    ladder: Sequence[tuple[int, ...]],
    batch_size: int,
) -> tuple[int, ...] | None:
    for shape in configured:
        if probe.accepts(shape, batch_size):
            return shape
    fallback = None
    for shape in ladder:
        # Once evaluation accepts a size, the cheap training trial decides about the others
        # (auxiliary heads need larger images, and only run in training).
        if fallback is None:
            if probe.accepts(shape, batch_size):
                fallback = shape
                if probe.trains(shape, batch_size):
                    return shape
        elif probe.trains(shape, batch_size) and probe.accepts(shape, batch_size):
            return shape
    if fallback is None:
        fallback = next((s for s in ladder if probe.accepts(s, batch_size, fake=False)), None)
    return fallback


class _Probe:
    """Tries shapes on copies of a model; remembers what was refused, and why."""

    def __init__(self, model: nn.Module, stem: Stem, arity: int) -> None:
        self.model = model
        self.stem = stem
        self.arity = arity
        self.trials: list[Trial] = []
        self._fake_copy: nn.Module | None = None
        self._real_copy: nn.Module | None = None

    def accepts(self, shape: tuple[int, ...], batch_size: int, *, fake: bool = True) -> bool:
        """Say whether the evaluation forward takes the shape, noting why where it does not."""
        try:
            self._forward((batch_size, *shape), training=False, fake=fake)
        except FAKE_LIMITS:
            return self.accepts(shape, batch_size, fake=False)
        # Whatever the model raises on a shape that is not its own means "not this one".
        except Exception as error:
            raise_if_out_of_memory(error)
            self.trials.append(Trial(shape, _first_line(error)))
            return False
        return True

    def trains(self, shape: tuple[int, ...], batch_size: int) -> bool:
        """Say whether the training forward takes the shape, on fake tensors."""
        try:
            # Two samples at least: batch statistics of a single value do not exist.
            self._forward((max(2, batch_size), *shape), training=True, fake=True)
        except Exception as error:
            raise_if_out_of_memory(error)
            return False
        return True

    def _forward(self, shape: tuple[int, ...], *, training: bool, fake: bool) -> None:
        module = self._copy(fake).train(training)
        devices = [self.stem.device] if self.stem.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            if not fake:
                module(*self._inputs(shape))
                return
            with _quiet_refusals(), FakeTensorMode(allow_non_fake_inputs=True):
                module(*self._inputs(shape))

    def _inputs(self, shape: tuple[int, ...]) -> list[Tensor]:
        if self.stem.kind == "tokens":
            make = torch.zeros(shape, dtype=torch.int64, device=self.stem.device)
        else:
            make = torch.randn(shape, dtype=self.stem.dtype, device=self.stem.device)
        return [make] + [make.clone() for _ in range(self.arity - 1)]

    def _copy(self, fake: bool) -> nn.Module:
        if fake:
            self._fake_copy = self._fake_copy or structural_copy(self.model)
            return self._fake_copy
        # Values are computed here, so a forward that writes to its own parameters must not
        # reach the caller's: they are copied too.
        self._real_copy = self._real_copy or _separate_copy(self.model)
        return self._real_copy


def _separate_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares no tensor with the model, and runs none of its user's hooks."""
    return copy_model(structural_copy(model))


@contextmanager
def _quiet_refusals() -> Iterator[None]:
    """Keep torch from logging a traceback for every shape that an operator refuses."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _joined(shape: Sequence[int]) -> str:
    return ",".join(str(size) for size in shape) or "nothing"


def _nothing_fits(model: nn.Module, stem: Stem, arity: int, trials: Sequence[Trial]) -> str:
    distinct = {trial.shape: trial.error for trial in trials}
    shown = list(distinct.items())[:TRIED_SHOWN]
    tried = "; ".join(f"{_joined(shape)}: {error}" for shape, error in shown)
    more = f"; and {len(distinct) - len(shown)} more" if len(distinct) > len(shown) else ""
    return (
        f"No input shape fits {type(model).__name__}, which takes {arity} input(s) and starts with "
        f"{stem.name or 'itself'} ({stem.kind}, width {stem.width}). "
        f"Tried, without the batch dimension: {tried}{more}. Pass example_inputs=."
    )
