"""The protocol of a criterion, and what a criterion is given to work with.

A criterion is a callable: `ScoringContext` in, one number for each block out; **higher is more
important**, and the lowest goes first. The context holds a private copy of the model, so a
criterion may run it, differentiate it and change its weights; what it wants restored for the
next criterion it restores itself (`batch_statistics` does so for what a forward changes).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blockprune.batches import Batch, Replay, batches_of
from blockprune.blocks import BlockAnalysis, ResidualBlock
from blockprune.criteria.passes import Passes
from blockprune.errors import CriterionError, DataError, raise_if_out_of_memory
from blockprune.losses import LossFunction, divided, loss_of, main_output
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.tracing import Call, aliased_copy, copy_model, tensors_in

__all__ = [
    "Batch",
    "Criterion",
    "LossFunction",
    "NoDataWarning",
    "ScoringContext",
    "batches_of",
    "main_output",
    "total",
]

# Enough samples for batch statistics in each of GraSP's two halves.
RANDOM_BATCH_SIZE = 16
# What the saved beginnings of leave-one-out passes may take unless the user says otherwise.
CACHE_BYTES = 2**30


class NoDataWarning(UserWarning):
    """The scores come from random inputs and labels: they saw no data."""


class Criterion(Protocol):
    """Anything that turns a `ScoringContext` into one number for each block.

    A criterion that writes into no weight may say so, `reads_only = True`; it is then given a model
    whose weights lie in the memory of the user's. Any other gets weights of its own.

    Example:
        >>> from blockprune.criteria import Criterion
        >>> def smallest_first(context):
        ...     return {block.name: float(block.params) for block in context.blocks}
        >>> criterion: Criterion = smallest_first
    """

    def __call__(self, context: ScoringContext, /) -> Mapping[str, float]:
        """Return the importance of each block of `context.blocks`, by name."""


class ScoringContext:
    """What a criterion works with.

    Attributes:
        model: a private copy of the model, without the user's hooks, in evaluation mode.
        blocks: the blocks to score, in order of execution.
        seed: for whatever a criterion draws.
        example: a call that the model accepts.
        max_cache_bytes: what a leave-one-out pass may keep of the dense one.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[ResidualBlock],
        batches: Iterable[Batch] | None,
        example: Call,
        *,
        analysis: BlockAnalysis | None = None,
        loss_fn: LossFunction | None = None,
        seed: int = 0,
        max_cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Wrap a model that is already a private copy.

        Args:
            model: the copy.
            blocks: of an analysis of that model.
            batches: taken one at a time, when asked for; None: a random one is made.
            example: a call that the model accepts, to shape a random batch after.
            analysis: that the blocks are of, for `passes`.
            loss_fn: `(outputs, targets) -> scalar`, given the model's own output; None: the loss
                that the model itself returns, else cross entropy of its main output.
            seed: of a random batch, and of every forward pass.
            max_cache_bytes: bounds what leave-one-out passes keep; the scores are the same.
        """
        self.model = model
        self.blocks = tuple(blocks)
        self.seed = seed
        self.example = example
        self.max_cache_bytes = max_cache_bytes
        self._analysis = analysis
        self._loss_fn = loss_fn
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._batches = None if batches is None else _kept(batches)

    def fresh(self, *, reads_only: bool = False) -> ScoringContext:
        """Return a context like this one, over a copy of the model as it is now.

        `reads_only`: the copy shares the memory of the weights.
        """
        return ScoringContext(
            (aliased_copy if reads_only else copy_model)(self.model),
            self.blocks,
            self._batches,
            self.example,
            analysis=self._analysis,
            loss_fn=self._loss_fn,
            seed=self.seed,
            max_cache_bytes=self.max_cache_bytes,
        )

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches from the first on, each time it is asked for; those taken are kept.

        Without data, one batch of random inputs and labels.

        Raises:
            DataError: there is none, or an item is not an `(inputs, targets)` pair.

        Warns:
            NoDataWarning: the batch is random.
        """
        if self._batches is None:
            warnings.warn(
                "No data was given: the scores come from random inputs and random labels. "
                "Pass data=(inputs, targets), or a DataLoader.",
                NoDataWarning,
                stacklevel=2,
            )
            self._batches = _kept([self._random_batch()])
        return iter(self._batches)

    @property
    def analysis(self) -> BlockAnalysis:
        """That the blocks are of, for criteria that need to know where they are.

        Raises:
            CriterionError: the context was made without it.
        """
        if self._analysis is None:
            raise CriterionError(
                "This criterion looks into the blocks while the model runs, so its context needs "
                "the analysis they are of: ScoringContext(..., analysis=find_blocks(...))."
            )
        return self._analysis

    @cached_property
    def passes(self) -> Passes:
        """Forward passes that see the blocks, or leave one out; for criteria of that kind."""
        return Passes(self.model, self.analysis, self.blocks)

    def all_batches(self) -> list[Batch]:
        """Return every batch that holds samples, where there is one.

        Raises:
            DataError: there is none.
        """
        found = [batch for batch in self.batches if len(batch)]
        return found or [self.first_batch()]

    def first_batch(self) -> Batch:
        """Return the first batch: the papers' gradient criteria look at one.

        Raises:
            DataError: there is no batch, or no sample in it.
        """
        batch = next(self.batches, None)
        if batch is None:
            raise DataError("The data is empty: at least one batch is needed.")
        if len(batch) == 0:
            raise DataError("The first batch holds no sample.")
        return batch

    def outputs(self, batch: Batch, model: nn.Module | None = None) -> Any:
        """Return what the model returns for a batch; equal calls draw equal random numbers.

        `model`: another one to run in its place.

        Raises:
            DataError: the model refuses the batch; its error is quoted.
        """
        # A forward may write into its input, and a batch is read more than once.
        call = batch.call.map(lambda tensor: tensor.clone())
        with self.running(batch):
            return (self.model if model is None else model)(*call.args, **call.kwargs)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Run the model in here: with the context's random numbers, and an error that says of what.

        Raises:
            DataError: the model refuses the batch; its error is quoted.
        """
        try:
            with preserved_rng():
                seed_rng(self.seed)
                yield
        except (CriterionError, DataError):
            raise
        except Exception as error:
            raise_if_out_of_memory(error)
            given = tensors_in((batch.call.args, batch.call.kwargs))
            shapes = [tuple(tensor.shape) for tensor in given]
            raise DataError(
                f"{type(self.model).__name__} does not run on a batch of shape "
                f"{', '.join(map(str, shapes)) or '(none)'}: {type(error).__name__}: {error}."
            ) from error

    def loss(self, outputs: Any, targets: Any, *, temperature: float = 1.0) -> Tensor:
        """Return the scalar loss of the outputs, every floating-point one divided by `temperature`.

        That is the user's loss function; else the loss that the model returns, having been given
        labels among its inputs; else cross entropy.

        Raises:
            CriterionError: the loss function fails, or what it returns is not one finite number;
                or there are no labels for the default loss.
            DataError: the targets do not suit the default loss.
        """
        if temperature != 1.0:
            outputs = divided(outputs, temperature)
        loss = loss_of(self._loss_fn, outputs, targets)
        if not bool(torch.isfinite(loss)):
            raise CriterionError(
                f"The loss is {loss.item()} on the scoring batch, so no score can be had from it. "
                "Look for NaN or infinite values in the inputs, the targets and the weights."
            )
        return loss.reshape(())

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that qualified name."""
        return self._parameters[name]

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
    def batch_statistics(self, *others: nn.Module) -> Iterator[None]:
        """Let batch normalisation use the batch; afterwards modes and buffers are as before.

        Dropout and drop path stay off, so that a score does not depend on what was dropped.
        That is in `model`, and in `others`, such as `passes.model`.
        """
        norms = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
        models = (self.model, *others)
        modes = {module: module.training for model in models for module in model.modules()}
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
        given = (*self.example.args, *self.example.kwargs.values())
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
            tuple(resample(value) for value in self.example.args),
            {name: resample(value) for name, value in self.example.kwargs.items()},
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


def total(tensor: Tensor) -> float:
    """Return the sum of a tensor, added up in double precision wherever the tensor lies."""
    # Apple's GPUs have no double precision.
    values = tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()
    return float(values.sum(dtype=torch.float64))


def _kept(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return batches that can be read again; a list or a `Replay` can."""
    return batches if isinstance(batches, list | Replay) else Replay(batches)


def _distinct(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    first_names: dict[int, str] = {}
    for name, parameter in parameters.items():
        first_names.setdefault(id(parameter), name)
    return {name: parameters[name] for name in first_names.values()}
