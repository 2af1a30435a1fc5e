"""Fisher: what the loss would lose with each channel of the block's activations.

Multiply channel `c` of an activation `a` by a mask, 1 where nothing is pruned. The derivative of
sample `n`'s loss with respect to it is `s_nc`, the sum over positions of `a * dL_n/da`. To second
order, with the Fisher information for the Hessian of a model near a minimum, setting the mask to 0
raises the mean loss by half of the mean of `s_nc ** 2`. That holds sample by sample, so samples
must be told apart in activations of any layout: (samples, channels, height, width), (positions,
samples, features), windows of images folded into one axis. Two short passes that differ in the
number of samples show which axis they lie along; where none does, samples go one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blockprune.blocks import ResidualBlock
from blockprune.criteria.base import Batch, ScoringContext
from blockprune.criteria.derivatives import (
    failures,
    gradient_of,
    loss_of,
    running_statistics,
    warn_if_all_zero,
)
from blockprune.criteria.layer_outputs import LayerOutput, Watch, modules_around, sample_axis

__all__ = ["Fisher"]

CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.PReLU,
)


@dataclass(frozen=True)
class Fisher:
    """Fisher: the estimated rise of the loss without each output channel, summed over the block.

    For each layer's output `a`, with channels `c` and positions `i` (height and width, or tokens),
    over the samples `n` of all batches::

        score = sum over layers, channels of  1/2 mean_n (sum_i a_nci * dL_n/da_nci)^2

    in the unit of the loss, squared. `L_n` is the loss of sample n alone: what is differentiated
    is the loss times the batch size, so a loss_fn has to be a mean over samples.

    A block's layers are the modules that own its weights, as far as these are trainable, and their
    outputs count as they leave the module: what is written into them later does not. Of a module
    that is never called itself (attention reads the weights of its output projection) it is the
    nearest one around it that is; of several outputs the first floating-point one. Each call of a
    module counts as a layer. What blocks share, modules or weights, counts in each of them with all
    of its calls, as a shared weight has one gradient. Channels are the second axis behind
    convolutions (and other weights of four axes or more) and the last elsewhere.

    Reads every batch, with labels, at one forward and backward each and two short forwards in all,
    in evaluation mode, where no sample sees another. Made for a trained network.

    Raises (when called):
        CriterionError: all weights of a block are frozen, or the loss is not finite.
        DataError: no data, or data that the model refuses.

    Example:
        >>> import torch
        >>> from blockprune import score_blocks
        >>> from blockprune.models import resnet20
        >>> data = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
        >>> len(score_blocks(resnet20(), Fisher(), data).scores)
        7

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """

    needs: ClassVar[str] = "labels"
    reads_only: ClassVar[bool] = True

    def __call__(self, context: ScoringContext) -> dict[str, float]:
        """Return the score of each block, from all batches."""
        owned = {block.name: _owned(context, block) for block in context.blocks}
        batches = context.all_batches()
        with torch.enable_grad(), running_statistics(context), failures("fisher"):
            reader = _Reader(context, owned, batches[0])
            sums = dict.fromkeys(reader.is_channels_second, 0.0)
            for batch in batches:
                for module, squares in reader.squares(batch):
                    sums[module] += squares
        samples = sum(len(batch) for batch in batches)
        scores = {
            name: math.fsum(sums[module] for module in layers) / (2 * samples)
            for name, layers in reader.layers.items()
        }
        warn_if_all_zero(scores)
        return scores


class _Owned(NamedTuple):
    """A weight, and the modules around it, the innermost first."""

    weight: nn.Parameter
    around: list[nn.Module]


class _Place(NamedTuple):
    """Where the samples of one activation of a pass are: along an axis, with rows for each."""

    module: nn.Module
    axis: int
    rows: int

    def fits(self, output: LayerOutput, samples: int) -> bool:
        """Whether the activation of a batch is as this one."""
        shape = output.tensor.shape
        is_long_enough = len(shape) > self.axis and shape[self.axis] == self.rows * samples
        return output.module is self.module and is_long_enough


class _Reader:
    """Reads squared derivatives by channel masks off the activations of a batch.

    Attributes:
        layers: block name to the modules whose activations count, each once.
        is_channels_second: for each of these modules, whether the second axis is the channels'.
    """

    def __init__(
        self, context: ScoringContext, owned: dict[str, list[_Owned]], batch: Batch
    ) -> None:
        self._context = context
        self._watch = Watch({m: None for own in owned.values() for o in own for m in o.around})
        # In a batch too small for the two passes, samples go one at a time.
        is_probed = len(batch) >= 3
        probe = self._probe(batch.part(0, 2 if is_probed else 1))
        called = {output.module for output in probe}
        self.layers: dict[str, list[nn.Module]] = {}
        self.is_channels_second: dict[nn.Module, bool] = {}
        for name, weights in owned.items():
            self.layers[name] = self._layers_of(weights, called)
        self._watch.modules = list(self.is_channels_second)
        self._places: list[_Place] | None = None
        if is_probed:
            two = [output for output in probe if output.module in self.is_channels_second]
            self._places = self._found_places(two, self._probe(batch.part(0, 3)))

    def squares(self, batch: Batch) -> Iterator[tuple[nn.Module, float]]:
        """Yield, for each activation, the sum over samples and channels of `s_nc ** 2`."""
        size, places = len(batch), self._places
        if places is not None:
            loss, found = self._watch.run(partial(loss_of, self._context, batch))
            if len(found) == len(places) and all(
                place.fits(output, size) for place, output in zip(places, found, strict=True)
            ):
                yield from self._read(loss, found, [place.axis for place in places], size)
                return
            del loss, found
        for n in range(size):
            part = batch.part(n, n + 1)
            loss, found = self._watch.run(partial(loss_of, self._context, part))
            yield from self._read(loss, found, [None] * len(found), 1)

    def _read(
        self,
        loss: Tensor,
        found: Sequence[LayerOutput],
        axes: Sequence[int | None],
        samples: int,
    ) -> Iterator[tuple[nn.Module, float]]:
        # Where a model switches gradients off, the loss does not depend on what is computed there.
        reached = [
            (output, axis)
            for output, axis in zip(found, axes, strict=True)
            if output.tensor.requires_grad
        ]
        if not reached:
            return
        gradients = gradient_of(loss, [output.tensor for output, _ in reached])
        for (output, axis), gradient in zip(reached, gradients, strict=True):
            product = output.tensor.detach() * gradient
            channels = self._channel_axis(output)
            if axis is None:
                rows = product.movedim(channels, -1).unsqueeze(0)
            else:
                rows = product.movedim((axis, channels), (0, -1))
            derivatives = rows.reshape(samples, -1, rows.shape[-1]).sum(1).cpu().double() * samples
            yield output.module, float(derivatives.square().sum())

    def _probe(self, batch: Batch) -> list[LayerOutput]:
        """Return what the modules return for a few samples, without the graph behind it."""
        _, found = self._watch.run(partial(self._context.outputs, batch))
        return [output._replace(tensor=output.tensor.detach()) for output in found]

    def _layers_of(self, weights: Sequence[_Owned], called: set[nn.Module]) -> list[nn.Module]:
        layers: dict[nn.Module, None] = {}
        for weight, around in weights:
            module = next((module for module in around if module in called), None)
            if module is not None:
                layers[module] = None
                is_second = isinstance(module, CHANNELS_SECOND) or weight.dim() > 3
                self.is_channels_second[module] = is_second
        return list(layers)

    def _found_places(
        self, two: Sequence[LayerOutput], three: Sequence[LayerOutput]
    ) -> list[_Place] | None:
        """Return where the samples are in each activation, None if they are not to be found."""
        if [output.module for output in two] != [output.module for output in three]:
            return None
        places = []
        for few, more in zip(two, three, strict=True):
            axis = sample_axis(few.tensor, more.tensor)
            if axis is None or axis == self._channel_axis(few):
                return None
            places.append(_Place(few.module, axis, few.tensor.shape[axis] // 2))
        return places

    def _channel_axis(self, output: LayerOutput) -> int:
        dimensions = output.tensor.dim()
        return 1 if self.is_channels_second[output.module] and dimensions > 2 else dimensions - 1


def _owned(context: ScoringContext, block: ResidualBlock) -> list[_Owned]:
    """Return the block's trainable weights, each once for every module that owns it.

    Raises:
        CriterionError: there is none.
    """
    trainable = {id(weight) for weight in context.trainable_weights(block).values()}
    # A block names a shared weight once, so the other modules that own it are looked for.
    return [
        _Owned(weight, modules_around(context.model, name))
        for name, weight in context.model.named_parameters(remove_duplicate=False)
        if id(weight) in trainable
    ]
