"""Tickets that are cut to be measured or scored, and thrown away."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from blockprune.blocks import BlockAnalysis
from blockprune.errors import ApproximationWarning
from blockprune.plan import named_plan
from blockprune.surgery import cut_blocks

__all__ = ["trial_ticket"]


def trial_ticket(analysis: BlockAnalysis, names: Collection[str]) -> nn.Module:
    """Return a ticket of the analysed model, whose blocks keep the dense model's names.

    It is not verified where the root is a graph: whoever keeps a ticket of these blocks verifies
    that one. Elsewhere layers may be taken out of the lists that hold them, and whether
    the code around the lists allows that is only known by trying.
    """
    traced = analysis.traced
    plan = named_plan(analysis, (name for name in analysis.names if name in names))
    is_graph = any(region.path == "" for region in traced.regions)
    with warnings.catch_warnings():
        # The ticket that is kept says so.
        warnings.simplefilter("ignore", ApproximationWarning)
        return cut_blocks(traced.root, analysis, plan, verify=not is_graph, renumber=False)
