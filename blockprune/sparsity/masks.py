"""Masks: which single weights of a network there are, as a value and as one file.

A file is safetensors: one tensor of booleans for each layer, the rest as JSON in its header, with a
digest of everything. No pickle, so it can never run code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from blockprune.errors import MaskError, close_names
from blockprune.tensor_files import TensorFiles

__all__ = ["LayerSparsity", "Mask", "owners"]

_FILES: Final = TensorFiles("mask", "Mask.save", "blockprune-mask-2", MaskError)


class LayerSparsity(NamedTuple):
    """How much of one layer's weight is left.

    Attributes:
        kept: weights that survive.
        total: weights of the dense layer.
    """

    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Share that is pruned, in [0, 1]."""
        return 1 - self.kept / self.total


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights survive: ``m`` in ``m * W``, for the convolutions and linear layers.

    A value: it copies what it is given, and nothing changes it afterwards.

    Attributes:
        keep: True for each weight that survives, by name of parameter, on the CPU; the order of
            the layers is that of the model, and ties go by it.
        aliases: the other names of weights that several layers share, and the name in `keep`.

    Raises:
        MaskError: a tensor is not boolean, or an alias stands for nothing.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import Mask
        >>> mask = Mask({"fc.weight": torch.tensor([[True, False], [True, True]])})
        >>> mask.kept, mask.total, mask.density
        (3, 4, 0.75)
        >>> mask.apply({"fc.weight": torch.full((2, 2), 7.0)})["fc.weight"]
        tensor([[7., 0.],
                [7., 7.]])

    Source: Frankle and Carbin, "The lottery ticket hypothesis", 2019.
    """

    keep: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.keep.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise MaskError(f"a mask is boolean; that of {name} is {found}. Compare it with 0.")
        for alias, name in self.aliases.items():
            if name not in self.keep or alias in self.keep:
                raise MaskError(f"{alias} cannot be another name of {name} in this mask.")
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.keep.items()
        }
        object.__setattr__(self, "keep", copies)
        object.__setattr__(self, "aliases", dict(self.aliases))

    @classmethod
    def full(cls, model: nn.Module) -> Self:
        """Return the mask that keeps every weight that can be pruned.

        Those are the weights of convolutions (of any dimension, transposed too) and linear layers;
        biases, normalisations, embeddings and the joint input projection of attention are never
        pruned. A weight that several layers share is there once, under its first name.

        Raises:
            MaskError: there is no such weight, or one is computed from others (pruned by
                torch.nn.utils.prune, or parametrized) or not initialised yet.

        Example:
            >>> from blockprune.models import resnet20
            >>> from blockprune.sparsity import Mask
            >>> mask = Mask.full(resnet20())
            >>> mask.kept == mask.total, mask.collapsed
            (True, ())
        """
        prunable = set(_prunable(model))
        first_names: dict[nn.Parameter, str] = {}
        aliases = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in first_names:
                aliases[name] = first_names[parameter]
            elif parameter in prunable:
                first_names[parameter] = name
        full = {name: torch.ones(p.shape, dtype=torch.bool) for p, name in first_names.items()}
        return cls(full, aliases)

    @property
    def layers(self) -> dict[str, LayerSparsity]:
        """What is left of each layer."""
        return {
            name: LayerSparsity(int(keep.count_nonzero()), keep.numel())
            for name, keep in self.keep.items()
        }

    @property
    def kept(self) -> int:
        """Weights that survive."""
        return sum(layer.kept for layer in self.layers.values())

    @property
    def total(self) -> int:
        """Weights of the dense network that can be pruned."""
        return sum(keep.numel() for keep in self.keep.values())

    @property
    def density(self) -> float:
        """Share of the weights that survives, in [0, 1]; 1 where there are none."""
        return self.kept / self.total if self.total else 1.0

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers with nothing left (layer collapse).

        A network of layers in a row is then a constant. Where another path leads around the layer,
        as a shortcut does, the network lives on without it.
        """
        return tuple(name for name, layer in self.layers.items() if layer.kept == 0)

    @property
    def digest(self) -> str:
        """A hash of names, shapes and every bit."""
        digest = hashlib.blake2b(repr(sorted(self.aliases.items())).encode(), digest_size=16)
        for name, keep in self.keep.items():
            digest.update(f"\n{name!r} {tuple(keep.shape)}\n".encode())
            digest.update(keep.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether names, their order, shapes and every bit agree."""
        if not isinstance(other, Mask):
            return NotImplemented
        return self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def apply(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``m * W``: new tensors for the layers of the mask, the rest as it is.

        A pruned weight is 0 whatever it was, also where that was not finite.

        Args:
            weights: by name, such as a ``state_dict``, on any device; unchanged.

        Raises:
            MaskError: a layer of the mask is missing, or has another shape.
        """
        masked = dict(weights)
        problems = []
        for name, keep in self.items():
            if name not in weights:
                problems.append(f"{name} is missing.{close_names(name, weights)}")
            elif weights[name].shape != keep.shape:
                problems.append(_shapes(name, weights[name], keep))
            else:
                weight = weights[name].detach()
                masked[name] = weight.masked_fill(~keep.to(weight.device), 0)
        _refuse(problems, "the weights")
        return masked

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every name that a ``state_dict`` has for a layer of the mask, and what survives."""
        yield from self.keep.items()
        for alias, name in self.aliases.items():
            yield alias, self.keep[name]

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of `model` that the mask is for, by the mask's names.

        Raises:
            MaskError: see `fits`.
        """
        self.fits(model)
        known = dict(model.named_parameters(remove_duplicate=False))
        return {name: known[name] for name in self.keep}

    def fits(self, model: nn.Module) -> None:
        """Check that the mask is one for this model; the model may have more layers.

        Raises:
            MaskError: a layer is missing, has another shape, or shares its weight with another one
                where the mask says that it does not; the first of them are named.
        """
        known = dict(model.named_parameters(remove_duplicate=False))
        first_names: dict[int, str] = {}
        problems = []
        for name, keep in self.keep.items():
            if f"{name}_orig" in known:
                problems.append(f"{name} is pruned by torch.nn.utils.prune: take that off first")
            elif name not in known:
                problems.append(f"{name} is missing.{close_names(name, known)}")
            elif known[name].shape != keep.shape:
                problems.append(_shapes(name, known[name], keep))
            elif id(known[name]) in first_names:
                problems.append(f"{first_names[id(known[name])]} and {name} are one weight there")
            else:
                first_names[id(known[name])] = name
        for alias, name in self.aliases.items():
            if name in known and known.get(alias) is not known[name]:
                problems.append(f"{alias} and {name} are two weights there, and one in the mask")
        _refuse(problems, type(model).__name__)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to one file, which appears whole or not at all; equal masks, equal files.

        Raises:
            MaskError: the folder does not exist, or cannot be written to.
        """
        header = {"layers": list(self.keep), "aliases": dict(self.aliases)}
        _FILES.write(path, self.keep, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the mask in a file that `save` wrote, every bit of it checked.

        Raises:
            MaskError: the file is absent, damaged, or of another kind.

        Example:
            >>> import tempfile, torch
            >>> from blockprune.sparsity import Mask
            >>> mask = Mask.full(torch.nn.Linear(3, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mask.save(f"{folder}/mask.safetensors")
            ...     again = Mask.load(f"{folder}/mask.safetensors")
            >>> again == mask
            True
        """
        header, tensors = _FILES.read(path, _Header)
        if sorted(header.layers) != sorted(tensors):
            raise MaskError(f"{path} is damaged: its layers are not those that its header names.")
        try:
            return cls({name: tensors[name] for name in header.layers}, header.aliases)
        except MaskError as error:
            raise MaskError(f"{path}: {error}") from error


class _Header(BaseModel):
    layers: list[str]
    aliases: dict[str, str]


def owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return every module that holds this very parameter, and the attribute that it is there."""
    return [
        (module, attribute)
        for module in model.modules()
        for attribute, held in module._parameters.items()
        if held is parameter
    ]


def _prunable(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that can be pruned, each once."""
    found: dict[nn.Parameter, None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise MaskError(
                f"the weight of {name or 'the model itself'} is computed from others (pruned by "
                "torch.nn.utils.prune, or parametrized). Take that off first: without_prune, "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise MaskError(
                f"the weight of {name or 'the model itself'} has no shape yet; run the model once."
            )
        if weight.numel():
            found[weight] = None
    if not found:
        raise MaskError(
            f"{type(model).__name__} has no convolution and no linear layer, so no weight that can "
            "be pruned."
        )
    return list(found)


def _shapes(name: str, found: Tensor, wanted: Tensor) -> str:
    return f"{name} is {tuple(found.shape)}, and {tuple(wanted.shape)} in the mask"


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise MaskError(f"the mask does not fit {what}: {'; '.join(problems[:3])}{more}.")
