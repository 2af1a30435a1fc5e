"""Tickets of single weights: masks, importances, training under a mask, and their analyses."""

from __future__ import annotations

from blockprune.recovery import recalibrate_norms
from blockprune.sparsity.analyses import (
    LayerRow,
    Overlap,
    Spread,
    common,
    flipped,
    layer_sparsity,
    overlap,
    overlap_by_layer,
    partial_reinit,
    sign_flips,
    spread,
    surviving,
)
from blockprune.sparsity.connectivity import (
    Connectivity,
    connectivity,
    interpolated,
)
from blockprune.sparsity.holding import held, with_prune, without_prune
from blockprune.sparsity.importances import IMPORTANCES, NEEDS_DATA, importance_of
from blockprune.sparsity.masks import LayerSparsity, Mask
from blockprune.sparsity.pruning import prune_lowest, random_like, random_mask, weights_to_prune
from blockprune.sparsity.stability import angle_degrees, distance

__all__ = [
    "IMPORTANCES",
    "NEEDS_DATA",
    "Connectivity",
    "LayerRow",
    "LayerSparsity",
    "Mask",
    "Overlap",
    "Spread",
    "angle_degrees",
    "common",
    "connectivity",
    "distance",
    "flipped",
    "held",
    "importance_of",
    "interpolated",
    "layer_sparsity",
    "overlap",
    "overlap_by_layer",
    "partial_reinit",
    "prune_lowest",
    "random_like",
    "random_mask",
    "recalibrate_norms",
    "sign_flips",
    "spread",
    "surviving",
    "weights_to_prune",
    "with_prune",
    "without_prune",
]
