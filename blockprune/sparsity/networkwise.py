"""Importances of single weights from what the masked network does.

SNIP, GraSP and SynFlow are those of `blockprune.criteria`, before they are added up over a block.
They are taken on the network that is left: masked weights are 0, and since they do not exist they
take no part in GraSP's gradient flow either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockprune.criteria import ScoringContext
from blockprune.criteria.derivatives import distinct, summed
from blockprune.criteria.gradient import Grasp, saliencies, sensitivities
from blockprune.criteria.synflow import absolute, flows
from blockprune.errors import CriterionError
from blockprune.sparsity.masks import Mask

__all__ = ["MaskedNetwork", "NetworkImportance", "grasp", "random", "snip", "synflow"]


@dataclass(frozen=True)
class MaskedNetwork:
    """What an importance of this kind works with.

    Attributes:
        context: over a private copy of the model whose masked weights are 0.
        mask: which weights there are.
    """

    context: ScoringContext
    mask: Mask

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The copy's weights that the mask is for."""
        return {name: self.context.parameter(name) for name in self.mask.keep}


NetworkImportance = Callable[[MaskedNetwork], dict[str, Tensor]]


def snip(network: MaskedNetwork) -> dict[str, Tensor]:
    """Return ``|theta * dL/dtheta|`` of each weight, over the first batch.

    Source: Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", 2019.
    """
    weights = network.weights
    terms = sensitivities(network.context, list(weights.values()))
    return dict(zip(weights, terms, strict=True))


def grasp(network: MaskedNetwork) -> dict[str, Tensor]:
    """Return ``theta * H g`` of each weight, over the two halves of the first batch.

    ``g`` and ``H`` are those of the weights that survive, the logits are divided by 200.

    Source: Wang et al., "Picking winning tickets before training by preserving gradient flow",
    2020.
    """
    weights, context = network.weights, network.context
    theta = distinct((weights, context.all_trainable_weights()))
    names = {id(weight): name for name, weight in weights.items()}
    exists = [
        network.mask.keep[names[id(w)]].to(w.device) if id(w) in names else w.new_ones(())
        for w in theta
    ]
    halves = saliencies(context, theta, Grasp.temperature, of=Tensor.detach, among=exists)
    found = zip(theta, summed(halves), strict=True)
    return {names[id(weight)]: term for weight, term in found if id(weight) in names}


def synflow(network: MaskedNetwork) -> dict[str, Tensor]:
    """Return ``|theta * dR/dtheta|``, with ``R`` the summed output for ones and absolute weights.

    Raises:
        CriterionError: a product of absolute weights is beyond float64.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", 2020.
    """
    flow = absolute(network.context)
    weights = {name: flow.parameter(name) for name in network.mask.keep}
    found = dict(zip(weights, flows(flow, list(weights.values())), strict=True))
    for name, term in found.items():
        if not bool(term.isfinite().all()):
            raise CriterionError(
                f"SynFlow's importances of {name} are not finite: the product of absolute weights "
                "along the network is beyond float64, or a weight is not finite itself. Use one "
                "that keeps the signs, such as 'snip', or smaller initial weights."
            )
    return found


def random(network: MaskedNetwork) -> dict[str, Tensor]:
    """Return uniform numbers in [0, 1) from the seed alone."""
    generator = torch.Generator().manual_seed(network.context.seed)
    return {
        name: torch.rand(keep.shape, generator=generator, dtype=torch.float64)
        for name, keep in network.mask.keep.items()
    }
