"""How alike what leaves the blocks of two networks is: the figures behind a CKA map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockprune.batches import Batch, batches_of
from blockprune.blocks import BlockAnalysis, Flow, find_blocks
from blockprune.criteria.nonlinear import is_nonlinear
from blockprune.errors import BlockNotFoundError, DataError, MeasurementError, close_names
from blockprune.similarity import FEWEST_SAMPLES, MinibatchCKA
from blockprune.tracing import CallInterpreter, Followed, assemble, isolated, structural_copy

__all__ = ["block_similarity"]

See = Callable[[str, Tensor], None]
"""Is given the name of a block and what leaves it."""


def block_similarity(
    dense: nn.Module,
    ticket: nn.Module,
    batches: Iterable[Any],
    dense_blocks: Sequence[str],
    ticket_blocks: Sequence[str],
    *,
    granularity: str = "branch",
) -> tuple[tuple[float, ...], ...]:
    """Return the linear CKA of every block of one network with every block of another.

    Both see the same batches, in evaluation mode. Compared is what leaves a block: its merge, or
    the activation that alone reads the merge; all positions and channels of a sample are its
    features. The estimate is that of `blockprune.similarity.MinibatchCKA`, unbiased, so that values
    of independent features lie about 0 on either side.

    Args:
        dense: a network; neither is changed.
        ticket: another one that takes the same inputs, such as a ticket of it.
        batches: such as a DataLoader or a list; each is `(inputs, targets)`, of which the targets
            are not read, or inputs alone. A batch of fewer than 4 samples, for which the estimate
            is not defined, is left out.
        dense_blocks: names of its residual merges, those that cannot be removed too: of its blocks
            and of its rejections.
        ticket_blocks: likewise of the other, where what stays keeps the name of the dense network.
        granularity: of the blocks named.

    Returns:
        One row for each of `dense_blocks`, with one value for each of `ticket_blocks`; NaN where a
        block returns the same for all samples.

    Raises:
        BlockNotFoundError: a network has no merge of that name.
        MeasurementError: no batch of at least 4 samples, or what leaves a block holds no axis of
            the samples.
        DataError: `batches`, or an item of it, is no such thing.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.lottery.alike import block_similarity
        >>> from blockprune.models import resnet20
        >>> dense, images = resnet20(), torch.rand(8, 3, 8, 8)
        >>> ticket = blockprune.remove_blocks(dense, "layer1.1", images)
        >>> [[same]] = block_similarity(dense, ticket, [images], ["layer1.0"], ["layer1.0"])
        >>> round(same, 6)
        1.0

    Source: Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", 2021;
    papers/000 compares GraSP with SNIP by CKA.
    """
    device = next((p.device for p in dense.parameters()), torch.device("cpu"))
    meter, views = MinibatchCKA(), None
    for batch in _listed(dense, batches, device):
        if len(batch) < FEWEST_SAMPLES:
            continue
        if views is None:
            views = [
                _View(dense, batch, dense_blocks, granularity),
                _View(ticket, batch, ticket_blocks, granularity),
            ]
        meter.update(*(view.features(batch) for view in views))
    return tuple(tuple(row) for row in meter.values().tolist())


def _listed(model: nn.Module, batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches must be an iterable of batches, such as a list; got {type(batches).__name__}."
        )
    for item in batches:
        # One at a time: a list of two tensors would be read as inputs and targets.
        yield from batches_of(model, [item], device)


class _View:
    """A network whose blocks are looked at while it runs."""

    def __init__(
        self, model: nn.Module, batch: Batch, names: Sequence[str], granularity: str
    ) -> None:
        analysis = find_blocks(model, batch.call, granularity)
        known = _ends(analysis)
        for name in names:
            if name not in known:
                raise BlockNotFoundError(
                    f"there is no residual merge {name!r}.{close_names(name, known)} "
                    f"{type(model).__name__} has {', '.join(known) or 'none'}."
                )
        self._names = tuple(names)
        self._found: dict[str, list[Tensor]] = {}
        ends = {known[name]: name for name in names}
        graphs = {flow.region.path: flow.region.graph for flow in analysis.cuts.flows}
        watching = partial(_Watching, ends=ends, see=self._see)
        self._model = assemble(
            structural_copy(model), graphs, lambda path, m, g: Followed(m, g, watching)
        ).eval()

    def features(self, batch: Batch) -> list[Tensor]:
        """Return (samples, features) of each block."""
        self._found.clear()
        inputs = batch.call.map(torch.clone)
        with isolated(), torch.no_grad():
            self._model(*inputs.args, **inputs.kwargs)
        return [self._of(name, len(batch)) for name in self._names]

    def _see(self, name: str, leaving: Tensor) -> None:
        # A copy, since a later block may write into what leaves this one.
        self._found.setdefault(name, []).append(leaving.clone())

    def _of(self, name: str, samples: int) -> Tensor:
        """Return what left a block, at every call of it."""
        parts = self._found.get(name, [])
        shapes = [tuple(part.shape) for part in parts]
        if not parts or any(samples not in shape for shape in shapes):
            raise MeasurementError(
                f"What leaves {name!r} has the shapes {shapes}, of which none holds the {samples} "
                "samples of the batch; CKA compares features of samples."
            )
        # Layers of sequences may have the positions first.
        rows = [part.movedim(part.shape.index(samples), 0).flatten(1) for part in parts]
        return torch.cat(rows, dim=1)


class _Watching(CallInterpreter):
    """Follows the graph of one region, and shows what leaves its blocks."""

    def __init__(
        self, module: nn.Module, graph: fx.Graph, ends: Mapping[fx.Node, str], see: See
    ) -> None:
        super().__init__(module, graph=graph)
        self._ends = ends
        self._show = see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._ends:
            self._show(self._ends[n], value)
        return value


def _ends(analysis: BlockAnalysis) -> dict[str, fx.Node]:
    """Return, by name, where what leaves each residual merge is computed."""
    cuts = analysis.cuts
    merges = {name: (cut.flow, cut.branch.joins) for name, cut in cuts.branches.items()}
    merges |= cuts.refused
    for block in analysis.blocks:
        last = cuts.of_blocks([block.name], analysis.granularity)[-1]
        merges[block.name] = (last.flow, last.branch.joins)
    return {name: _end(flow, merge) for name, (flow, merge) in merges.items()}


def _end(flow: Flow, merge: fx.Node) -> fx.Node:
    readers = list(merge.users)
    return readers[0] if len(readers) == 1 and is_nonlinear(readers[0], flow) else merge
