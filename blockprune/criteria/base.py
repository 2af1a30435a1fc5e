"""The protocol of a criterion, and what a criterion is given to work with.

A criterion is a callable: `ScoringContext` in, one number for each block out; **higher is more
important**, and the lowest goes first. The context holds a private copy of the model, so a
criterion may run it, differentiate it and change its weights; what it wants restored for the
next criterion it restores itself (`batch_statistics` does so for what a forward changes).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.blocks import ResidualBlock
from blockprune.errors import CriterionError, DataError, TraceError
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.tracing import Call, as_call, map_tensors, tensors_in

__all__ = ["Batch", "Criterion", "LossFunction", "NoDataWarning", "ScoringContext", "main_output"]

LossFunction = Callable[[Any, Any], Tensor]

# Enough samples for batch statistics in each of GraSP's two halves.
RANDOM_BATCH_SIZE = 16
# torch's own convention for positions without a label.
IGNORED_LABEL = -100


class NoDataWarning(UserWarning):
    """The scores come from random inputs and labels: they saw no data."""


class Criterion(Protocol):
    """Anything that turns a `ScoringContext` into one number for each block.

    Example:
        >>> from blockprune.criteria import Criterion
        >>> def smallest_first(context):
        ...     return {block.name: float(block.params) for block in context.blocks}
        >>> criterion: Criterion = smallest_first
    """

    def __call__(self, context: ScoringContext, /) -> Mapping[str, float]:
        """Return the importance of each block of `context.blocks`, by name."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the model, and the targets of its outputs.

    Attributes:
        call: the arguments, on the device of the model.
        targets: whatever the loss function reads, on the same device.
    """

    call: Call
    targets: Any

    def __len__(self) -> int:
        """Samples: the first dimension of the first tensor that has one."""
        values = (self.call.args, self.call.kwargs, self.targets)
        return next((len(tensor) for tensor in tensors_in(values) if tensor.dim()), 0)

    def part(self, start: int, stop: int) -> Batch:
        """Return samples `start` to `stop` of every tensor whose first dimension is the batch."""
        size = len(self)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.dim() and len(tensor) == size else tensor

        return Batch(self.call.map(cut), map_tensors(self.targets, cut))


class ScoringContext:
    """What a criterion works with.

    Attributes:
        model: a private deep copy of the model, without the user's hooks, in evaluation mode.
        blocks: the blocks to score, in order of execution.
        seed: for whatever a criterion draws.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[ResidualBlock],
        batches: Iterable[Batch] | None,
        example: Call,
        *,
        loss_fn: LossFunction | None = None,
        seed: int = 0,
    ) -> None:
        """Wrap a model that is already a private copy.

        Args:
            model: the copy.
            blocks: of an analysis of that model.
            batches: taken one at a time, when asked for; None: a random one is made.
            example: a call that the model accepts, to shape a random batch after.
            loss_fn: `(outputs, targets) -> scalar`, given the model's own output; None: cross
                entropy of the main output with integer targets.
            seed: of a random batch, and of every forward pass.
        """
        self.model = model
        self.blocks = tuple(blocks)
        self.seed = seed
        self._example = example
        self._loss_fn = loss_fn
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._source = None if batches is None else iter(batches)
        self._taken: list[Batch] = []

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches from the first on, each time it is asked for; those taken are kept.

        Without data, one batch of random inputs and labels.

        Raises:
            DataError: there is none, or an item is not an `(inputs, targets)` pair.

        Warns:
            NoDataWarning: the batch is random.
        """
        if self._source is None:
            warnings.warn(
                "No data was given: the scores come from random inputs and random labels. "
                "Pass data=(inputs, targets), or a DataLoader.",
                NoDataWarning,
                stacklevel=2,
            )
            self._source = iter((self._random_batch(),))
        for position in itertools.count():
            if position == len(self._taken):
                following = next(self._source, None)
                if following is None:
                    return
                self._taken.append(following)
            yield self._taken[position]

    def first_batch(self) -> Batch:
        """Return the first batch: the papers' gradient criteria look at one.

        Raises:
            DataError: there is no batch, or no sample in it.
        """
        batch = next(self.batches, None)
        if batch is None:
            raise DataError("The data is empty: scoring needs at least one (inputs, targets) pair.")
        if len(batch) == 0:
            raise DataError("The first batch holds no sample.")
        return batch

    def outputs(self, batch: Batch) -> Any:
        """Return what the model returns for a batch; equal calls draw equal random numbers.

        Raises:
            DataError: the model refuses the batch; its error is quoted.
        """
        # A forward may write into its input, and a batch is read more than once.
        call = batch.call.map(lambda tensor: tensor.clone())
        try:
            with preserved_rng():
                seed_rng(self.seed)
                return self.model(*call.args, **call.kwargs)
        except Exception as error:
            shapes = [tuple(tensor.shape) for tensor in tensors_in((call.args, call.kwargs))]
            raise DataError(
                f"{type(self.model).__name__} does not run on a batch of shape "
                f"{', '.join(map(str, shapes)) or '(none)'}: {type(error).__name__}: {error}."
            ) from error

    def loss(self, outputs: Any, targets: Any, *, temperature: float = 1.0) -> Tensor:
        """Return the scalar loss of the outputs, every floating-point one divided by `temperature`.

        Raises:
            CriterionError: the loss function fails, or what it returns is not one finite number.
            DataError: the targets do not suit the default loss.
        """
        if temperature != 1.0:
            outputs = _divided(outputs, temperature)
        if self._loss_fn is None:
            loss = _cross_entropy(main_output(outputs), targets)
        else:
            try:
                loss = self._loss_fn(outputs, targets)
            except Exception as error:
                raise CriterionError(
                    f"loss_fn failed on an output of type {type(outputs).__name__}: "
                    f"{type(error).__name__}: {error}. "
                    "It is called as loss_fn(outputs, targets), with what the model returns."
                ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise CriterionError(f"The loss must be a tensor of one element, not {found}.")
        if not bool(torch.isfinite(loss)):
            raise CriterionError(
                f"The loss is {loss.item()} on the scoring batch, so no score can be had from it. "
                "Look for NaN or infinite values in the inputs, the targets and the weights."
            )
        return loss.reshape(())

    def weights(self, block: ResidualBlock) -> dict[str, nn.Parameter]:
        """Return the weights that a criterion scores a block by, each shared one once.

        The weights of convolutions and linear layers, and the input projection of attention; of
        other modules, and of bare parameters, those with at least two dimensions larger than 1.
        A block that has none of these is scored by all of its parameters.
        """
        own = {name: self._parameters[name] for name in block.parameters}
        weights = {name: p for name, p in own.items() if self._is_weight(name)}
        return _distinct(weights or own)

    def trainable_weights(self, block: ResidualBlock) -> dict[str, nn.Parameter]:
        """Return those of `weights` that have gradients.

        Raises:
            CriterionError: all of them are frozen.
        """
        weights = self.weights(block)
        trainable = {name: p for name, p in weights.items() if p.requires_grad}
        if not trainable:
            raise CriterionError(
                f"Block {block.name!r} cannot be scored by gradients: all of its weights "
                f"({', '.join(weights) or 'none'}) are frozen (requires_grad=False). "
                "Unfreeze them, or use a criterion without gradients, such as 'l1'."
            )
        return trainable

    def all_trainable_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of the whole model that have gradients, by the rule of `weights`."""
        named = self._parameters.items()
        return _distinct({n: p for n, p in named if p.requires_grad and self._is_weight(n)})

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Let batch normalisation use the batch; afterwards modes and buffers are as before.

        Dropout and drop path stay off, so that a score does not depend on what was dropped.
        """
        norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
        modes = {module: module.training for module in self.model.modules()}
        buffers = [
            (module._buffers, name, buffer, buffer.clone())
            for module in modes
            for name, buffer in module.named_buffers(recurse=False)
        ]
        for module in modes:
            module.training = isinstance(module, norms)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for owner, name, buffer, value in buffers:
                    owner[name] = buffer.copy_(value)

    def _is_weight(self, name: str) -> bool:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and attribute == "weight":
            return True
        return sum(size > 1 for size in self._parameters[name].shape) >= 2

    def _random_batch(self) -> Batch:
        given = (*self._example.args, *self._example.kwargs.values())
        size = next((len(v) for v in given if isinstance(v, Tensor) and v.dim()), 0)
        if size == 0:
            raise DataError(
                "No random batch can be made: none of the example inputs is a tensor with a batch "
                "dimension. Pass data=(inputs, targets), or use a criterion that reads no data, "
                "such as 'l1'."
            )
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.arange(max(RANDOM_BATCH_SIZE, size)) % size

        def resample(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
                return value
            if not value.is_floating_point():
                # Token ids, masks: only the example knows which values are legal.
                return value[rows.to(value.device)]
            noise = torch.randn((len(rows), *value.shape[1:]), generator=generator)
            return noise.to(value)

        call = Call(
            tuple(resample(value) for value in self._example.args),
            {name: resample(value) for name, value in self._example.kwargs.items()},
        )
        with torch.no_grad():
            logits = main_output(self.outputs(Batch(call, None)))
        if logits.dim() < 2:
            raise DataError(
                f"The model's output has shape {tuple(logits.shape)}, which no random class "
                "labels fit. Pass data=(inputs, targets) and a loss_fn."
            )
        shape = (logits.shape[0], *logits.shape[2:])
        labels = torch.randint(logits.shape[1], shape, generator=generator)
        return Batch(call, labels.to(logits.device))


def main_output(outputs: Any) -> Tensor:
    """Return the first floating-point tensor of a model's output, however nested.

    Raises:
        CriterionError: there is none.

    Example:
        >>> import torch
        >>> main_output({"mask": torch.tensor([True]), "logits": torch.tensor([[2.0]])})
        tensor([[2.]])
    """
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point():
            found: Tensor = tensor
            return found
    raise CriterionError(
        f"The model's output ({type(outputs).__name__}) holds no floating-point tensor to take "
        "a loss of. Pass a loss_fn that knows what to do with it."
    )


def total(tensor: Tensor) -> float:
    """Return the sum of a tensor, added up in double precision wherever the tensor lies."""
    return float(tensor.detach().cpu().sum(dtype=torch.float64))


def batches_of(model: nn.Module, data: Any, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of `data`: one `(inputs, targets)` pair, or an iterable of them.

    A tuple or list of two is one pair where its first item is a tensor or a dict, or its second
    a tensor; otherwise it is an iterable.

    Raises:
        DataError: an item is not a pair, or its inputs are no arguments of the model.
    """
    if _is_pair(data):
        data = [data]
    elif isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise DataError(
            f"data must be an (inputs, targets) pair or an iterable of them, such as a DataLoader; "
            f"got {type(data).__name__}."
        )
    for position, item in enumerate(data):
        if not (isinstance(item, tuple | list) and len(item) == 2):
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise DataError(
                f"batch {position} of the data is a {type(item).__name__}{size}, "
                "not an (inputs, targets) pair."
            )
        inputs, targets = item
        try:
            call = as_call(model, inputs)
        except TraceError as error:
            raise DataError(f"batch {position} of the data: {error}") from error
        yield Batch(
            call.map(lambda tensor: tensor.detach().to(device)),
            map_tensors(targets, lambda tensor: tensor.detach().to(device)),
        )


def _is_pair(data: Any) -> bool:
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return False
    inputs, targets = data
    return isinstance(inputs, Tensor | Mapping) or isinstance(targets, Tensor)


def _distinct(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    first_names: dict[int, str] = {}
    for name, parameter in parameters.items():
        first_names.setdefault(id(parameter), name)
    return {name: parameters[name] for name in first_names.values()}


def _divided(outputs: Any, divisor: float) -> Any:
    """Divide every floating-point tensor of a nested output; types are kept."""
    if isinstance(outputs, Tensor):
        return outputs / divisor if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        divided: Any = copy.copy(outputs)
        for key, value in outputs.items():
            divided[key] = _divided(value, divisor)
        return divided
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        divided = copy.copy(outputs)
        for field in dataclasses.fields(outputs):
            # Frozen dataclasses refuse setattr; this is a fresh copy.
            object.__setattr__(divided, field.name, _divided(getattr(outputs, field.name), divisor))
        return divided
    if isinstance(outputs, list):
        return [_divided(value, divisor) for value in outputs]
    if isinstance(outputs, tuple):
        values = [_divided(value, divisor) for value in outputs]
        return type(outputs)(*values) if hasattr(outputs, "_fields") else tuple(values)
    return outputs


def _cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        found = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"The default loss is cross entropy with integer class labels; the targets are {found}."
            " Pass the loss_fn that they are for."
        )
    if logits.dim() > 2 and _class_second(logits) != targets.shape == logits.shape[:-1]:
        # Sequence models put the classes last.
        logits = logits.movedim(-1, 1)
    classes = logits.shape[1] if logits.dim() > 1 else logits.shape[0]
    labels = targets[targets != IGNORED_LABEL]
    # CUDA would answer a label out of range by an assertion that ends the process.
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise DataError(
            f"The targets hold class labels from {int(labels.min())} to {int(labels.max())}, and "
            f"the model's output has {classes} classes: labels go from 0 to {classes - 1}."
        )
    try:
        return functional.cross_entropy(logits, targets.long(), ignore_index=IGNORED_LABEL)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"Cross entropy of an output of shape {tuple(logits.shape)} with targets of shape "
            f"{tuple(targets.shape)} fails: {error}. Pass a loss_fn, or targets that are class "
            "labels of that output."
        ) from error


def _class_second(logits: Tensor) -> torch.Size:
    return torch.Size((logits.shape[0], *logits.shape[2:]))
