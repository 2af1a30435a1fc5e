"""What a refit of ResNet-50 costs, against one plain forward pass of the same images."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from _memory import can_measure, in_own_process, peak_bytes
from torch import Tensor, nn

import blockprune
from _recovery.methods import batches
from blockprune.recovery import work

REMOVED = 4
SIZE = 224
SPREAD = ("layer1.2", "layer2.3", "layer3.5", "layer4.2")
"""The last block of each stage: as many gaps as blocks, over the whole depth."""
FORWARD = "forward"


def dense_model() -> nn.Module:
    """Return the network, with random weights."""
    torch.manual_seed(0)
    return torchvision.models.resnet50().eval()


def images(count: int) -> Tensor:
    """Return random images."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def ticket_of(dense: nn.Module, cut: str, few: Tensor) -> nn.Module:
    """Return the ticket of a kind of cut."""
    if cut == "spread":
        return blockprune.remove_blocks(dense, SPREAD, few)
    return blockprune.prune(dense, cut, REMOVED, data=batches(few))


CUTS = ("spread", "block_influence")


def forward(dense: nn.Module, data: list[Any]) -> None:
    """Run all images once."""
    with torch.no_grad():
        for part, _ in data:
            dense(part)


@contextlib.contextmanager
def timed(owner: Any, name: str, spent: Counter[str]) -> Iterator[None]:
    """Add up the CPU seconds of all calls of a function, while this is open."""
    plain = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        found = plain(*args, **kwargs)
        spent[name] += time.process_time() - start
        return found

    with mock.patch.object(owner, name, watched):
        yield


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def measured(cut: str, count: int, size: int) -> dict[str, Any]:
    """Return the time of a refit, between two forward passes of the same images."""
    dense, x = dense_model(), images(count)
    data, ticket = batches(x, size), ticket_of(dense, cut, x[:4])
    forward(dense, data[:1])
    before, _ = seconds(lambda: forward(dense, data))
    spent: Counter[str] = Counter()
    with timed(work, "fitted", spent), timed(work.Work, "_read", spent):
        refit, found = seconds(lambda: blockprune.recover(ticket, dense, data))
    after, _ = seconds(lambda: forward(dense, data))
    one, solves, reading = (before + after) / 2, spent["fitted"], spent["_read"]
    # Finding blocks, trials and proofs run two samples, however many there are.
    fixed = refit - solves - reading
    return {
        "removed": list(blockprune.plan_of(ticket).remove),
        "gaps": [list(gap.blocks) for gap in blockprune.recovery_of(found).gaps],
        "forward_seconds": [before, after],
        "reading_seconds": reading,
        "solve_seconds": solves,
        "fixed_seconds": fixed,
        "passes": (reading + fixed) / one,
        "passes_of_512": reading / one + fixed / (one * 512 / count),
    }


def peak(what: str, count: int, size: int) -> int:
    """Return the peak of one run above the model, the ticket and the images, in bytes."""
    dense, x = dense_model(), images(count)
    data = batches(x, size)
    if what == FORWARD:
        return peak_bytes(lambda: forward(dense, data), torch.device("cpu"))
    ticket = ticket_of(dense, what, x[:2])
    return peak_bytes(lambda: blockprune.recover(ticket, dense, data), torch.device("cpu"))


def gram_bytes() -> int:
    """Return the size of the largest Gram matrix of `SPREAD`, in bytes."""
    columns = max(dense_model().get_submodule(f"{b}.conv3").in_channels for b in SPREAD) + 1
    return 8 * columns**2


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cuts; `--peak-of` measures one peak, in this process."""
    torch.set_num_threads(1)
    rows = {}
    for cut in CUTS:
        rows[cut] = measured(cut, args.count, args.batch)
        print(cut, rows[cut], flush=True)
    result = {"images": args.count, "batch": args.batch, "size": SIZE, "cuts": rows}
    if can_measure(torch.device("cpu")):
        script = str(Path(__file__).parent.parent / "recovery.py")
        few = ["--count", str(2 * args.batch), "--batch", str(args.batch)]
        result["peak_bytes"] = {
            what: in_own_process(script, ["cost", "--peak-of", what, *few])
            for what in (FORWARD, *CUTS)
        }
        parameters = sum(p.numel() * p.element_size() for p in dense_model().parameters())
        result |= {"model_bytes": parameters, "gram_bytes": gram_bytes()}
    return result
