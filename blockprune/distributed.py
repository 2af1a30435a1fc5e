"""One model scored by several processes (ranks), each of which holds a part of the data.

A score is rarely a mean over samples, to be averaged over ranks: SNIP takes the absolute value of
the gradient of a whole batch, and batch statistics, CKA and PLS look at samples together. So ranks
exchange samples, not scores. Each scores the batch that all of them hold together, and finds what
one process would find that holds it alone, bit for bit on like machines; where they are not alike,
rank 0's numbers hold for all, so that every rank cuts the same blocks.

Training averages gradients over ranks, which needs no more than `train(..., accelerator=...)`: with
batches of `n` on each of `k` ranks it takes the steps of one process with batches of `k * n`, up to
rounding. Batch normalisation is the exception: each rank normalises by its own samples, unless its
layers are turned into `torch.nn.SyncBatchNorm` (`convert_sync_batchnorm`; GPUs only).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockprune.batches import Replay, items_of
from blockprune.errors import CriterionError, DataError
from blockprune.tracing import map_tensors, tensors_in

__all__ = ["GlobalBatches", "global_batches"]


def global_batches(data: Any) -> Any:
    """Return data whose batches join those of all ranks; `data` itself where there is one process.

    Pass it as `data` to `prune` or `score_blocks`, on every rank at the same place of the program:
    each then cuts the same blocks. Batch `k` is the ranks' batches `k`, rank 0's samples first; a
    rank that has no more gives none. With the shares that `accelerate` hands out, those are the
    batches of one process, as many times larger as there are ranks. Each rank holds the joint batch
    in memory. A sampler that repeats samples to even out the shares repeats them in it.

    The number of blocks must not depend on the rank: a budget in milliseconds is measured on each,
    so plan by one in blocks, MACs or parameters.

    Args:
        data: this rank's share, one `(inputs, targets)` pair or an iterable of them; see
            `score_blocks`. What is read of it is kept, for the next time it is asked for.

    Returns:
        `GlobalBatches`, or `data` where `torch.distributed` is not in use.

    Raises:
        DataError: `data` is neither a batch nor iterable. When it is read: a rank cannot read its
            share, or the shares do not fit together; every rank raises it.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.distributed import global_batches
        >>> from blockprune.models import resnet20
        >>> share = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
        >>> ticket = blockprune.prune(resnet20(), "grasp", p=2, data=global_batches(share))
        >>> len(blockprune.plan_of(ticket).remove)
        2
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return GlobalBatches(data)
    return data


class GlobalBatches:
    """Batches that are the same on every rank; made by `global_batches`."""

    def __init__(self, data: Any) -> None:
        self._batches = Replay(_joint(items_of(data)))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def check_same(self, model: nn.Module) -> None:
        """Compare the parameters of the ranks' models; their buffers may differ.

        Under data parallelism each rank has its own running statistics, until the next step.

        Raises:
            CriterionError: they differ; every rank raises it.
        """
        digests = _exchange(_digest(model))
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise CriterionError(
                    f"Rank {rank} scores another {type(model).__name__} than rank 0: their "
                    "parameters differ, so they would cut different blocks. Load the same weights "
                    "on every rank, or build the model after seeding each alike."
                )

    def agree(self, scores: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Return rank 0's scores, by criterion and block.

        Raises:
            CriterionError: the ranks scored different blocks, or by different criteria.
        """
        every = _exchange(dict(scores))
        asked = [{name: list(table) for name, table in one.items()} for one in every]
        for rank, names in enumerate(asked):
            if names != asked[0]:
                raise CriterionError(
                    f"Rank {rank} scored {names}, and rank 0 {asked[0]}. Every rank must make the "
                    "same call."
                )
        first: dict[str, dict[str, float]] = every[0]
        return first


@dataclass(frozen=True)
class _Share:
    """What one rank gives to a joint batch: one item, an error, or, at the end, neither."""

    items: tuple[Any, ...] = ()
    error: str | None = None


def _joint(data: Iterable[Any]) -> Iterator[Any]:
    source = (item for item in data)
    while True:
        # A rank that fails must say so: the others wait for its share.
        share, cause = _next(source)
        shares = _exchange(share)
        for rank, given in enumerate(shares):
            if given.error is not None:
                raise DataError(f"Rank {rank} cannot read its data: {given.error}.") from cause
        held = {rank: share.items[0] for rank, share in enumerate(shares) if share.items}
        if not held:
            return
        yield _joined(held)


def _next(source: Iterator[Any]) -> tuple[_Share, Exception | None]:
    try:
        return _Share(tuple(_portable(item) for item in itertools.islice(source, 1))), None
    except Exception as error:
        return _Share(error=f"{type(error).__name__}: {error}"), error


def _portable(item: Any) -> Any:
    """Return an item on the CPU, in containers that can be taken apart and put together again."""
    if isinstance(item, tuple | list):
        item = tuple(_plain(part) for part in item)
    return map_tensors(_plain(item), lambda tensor: tensor.detach().cpu())


def _plain(part: Any) -> Any:
    # The batches of tokenizers are mappings, and no dicts.
    return dict(part) if isinstance(part, Mapping) else part


def _joined(items: Mapping[int, Any]) -> Any:
    """Return one batch made of those of several ranks.

    Tensors whose first dimension is the batch are put one behind the other; whatever else there
    is must be the same for all.

    Raises:
        DataError: it is not, or the tensors do not fit.
    """
    ranks, batches = list(items), list(items.values())
    skeletons = [map_tensors(batch, _no_value) for batch in batches]
    for rank, skeleton in zip(ranks, skeletons, strict=True):
        if not _equal(skeleton, skeletons[0]):
            raise DataError(
                f"The batches of ranks {ranks[0]} and {rank} cannot be joined: apart from their "
                f"tensors they differ, or cannot be compared ({skeletons[0]!r:.200} and "
                f"{skeleton!r:.200}). Make what belongs to a sample a tensor, and what does not "
                "the same on every rank."
            )
    rows = [list(tensors_in(batch)) for batch in batches]
    sizes = [next((len(tensor) for tensor in row if tensor.dim()), 0) for row in rows]
    columns = iter([_column(ranks, column, sizes) for column in zip(*rows, strict=True)])
    return map_tensors(batches[0], lambda _: next(columns))


def _no_value(tensor: Tensor) -> None:
    del tensor


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except ValueError:  # arrays are not equal or different as a whole
        return False


def _column(ranks: Sequence[int], tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the same tensor of several ranks' batches as one."""
    per_sample = all(t.dim() and len(t) == size for t, size in zip(tensors, sizes, strict=True))
    kinds = [(t.dtype, t.shape[1:] if per_sample else t.shape) for t in tensors]
    for rank, tensor, kind in zip(ranks, tensors, kinds, strict=True):
        if kind != kinds[0] or not (per_sample or torch.equal(tensor, tensors[0])):
            raise DataError(
                f"The batches of ranks {ranks[0]} and {rank} cannot be joined: "
                f"{_described(tensors[0])} and {_described(tensor)}. Only the number of samples "
                "may differ: pad or crop them alike on every rank."
            )
    return torch.cat(list(tensors)) if per_sample else tensors[0]


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _digest(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {_described(values)};".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _exchange(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    # This pickles, as torch does between the processes of one job; no file is involved.
    dist.all_gather_object(values, value)
    return values
