"""Whether a ticket is handled as fast as its dense model: copied, loaded, exported, compiled.

Every figure is the time of the ticket over that of the dense model, in pairs of alternating order.
- copy: `copy.deepcopy`;
- state_dict: `load_state_dict` of its own weights;
- file: a safetensors file into a module; for the dense model, weights into a fresh one, for the
  ticket `load_ticket`, which finds and cuts the blocks of a fresh dense one again, and proves it
  (`file_unverified`: with `verify=False`);
- export: `torch.export.export`;
- exported: `torch.export.save`, then `torch.export.load`;
- compile: the first call of `torch.compile`, with no cache to draw on (where a compiler works).

    python benchmarks/ticket_costs.py [--pairs 5] [--networks resnet56 resnet50]
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _pairs import Run, again, alternate, median_ms, ratio
from _peers import SUBJECTS
from _results import Results, check_positive, device_of, parser_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blockprune

NETWORKS = ("resnet56", "resnet50")
TARGET = 1.0
# The ratio of two equal times is not always at most 1; what is less than this is no difference.
NOISE = 0.02
COMPILE_PAIRS = 2
Pair = dict[str, Callable[[], Run]]


def pair_of(network: str, device: torch.device) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a dense model, its ticket and an image."""
    subject = SUBJECTS[network]
    torch.manual_seed(0)
    dense = subject.dense().to(device).eval()
    image = torch.randn(1, 3, subject.image, subject.image, device=device)
    ticket = blockprune.prune(
        dense, "l1", keep_macs=subject.keep_macs, granularity="layer", example_inputs=image
    )
    return dense, ticket.eval(), image


def steps_of(network: str, device: torch.device, folder: Path) -> dict[str, Callable[[], Pair]]:
    """Return each thing that is done to both; what it needs is made when it is called."""
    dense, ticket, image = pair_of(network, device)
    models = {"dense": dense, "ticket": ticket}

    def both(make_ready: Callable[[nn.Module], Callable[[], Run]]) -> Callable[[], Pair]:
        return lambda: {name: make_ready(model) for name, model in models.items()}

    def files(verify: bool) -> Callable[[], Pair]:
        return lambda: _files(network, dense, ticket, device, folder, verify)

    return {
        "copy": both(lambda model: again(lambda: copy.deepcopy(model))),
        "state_dict": both(_loading_its_own),
        "file": files(True),
        "file_unverified": files(False),
        "export": both(lambda model: again(lambda: torch.export.export(model, (image,)))),
        "exported": both(lambda model: _loading_exported(model, image)),
        "compile": both(lambda model: _compiling(model, image)),
    }


def _loading_its_own(model: nn.Module) -> Callable[[], Run]:
    state = copy.deepcopy(model.state_dict())
    return again(lambda: model.load_state_dict(state))


def _files(
    network: str,
    dense: nn.Module,
    ticket: nn.Module,
    device: torch.device,
    folder: Path,
    verify: bool,
) -> Pair:
    whole, cut = folder / "dense.safetensors", folder / "ticket.safetensors"
    save_file(dense.state_dict(), whole)
    blockprune.save_ticket(ticket, cut, overwrite=True)

    def fresh() -> nn.Module:
        return SUBJECTS[network].dense().to(device)

    return {
        "dense": again(lambda: fresh().load_state_dict(load_file(whole))),
        "ticket": again(lambda: blockprune.load_ticket(fresh(), cut, verify=verify)),
    }


def _loading_exported(model: nn.Module, image: Tensor) -> Callable[[], Run]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (image,)), buffer)
    saved = buffer.getvalue()
    return again(lambda: torch.export.load(io.BytesIO(saved)))


def _compiling(model: nn.Module, image: Tensor) -> Callable[[], Run]:
    def make_ready() -> Run:
        torch.compiler.reset()
        return lambda: _compiled(model, image)

    return make_ready


def _compiled(model: nn.Module, image: Tensor) -> Tensor:
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.compiler.config.patch(force_disable_caches=True),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        found: Tensor = torch.compile(model)(image)
        return found


def measure(network: str, results: Results, options: Any, device: torch.device) -> None:
    """Measure one network, a step at a time."""
    with tempfile.TemporaryDirectory() as folder:
        for step, runs in steps_of(network, device, Path(folder)).items():
            if step in options.skip:
                continue
            rounds = min(options.pairs, COMPILE_PAIRS) if step == "compile" else options.pairs
            try:
                samples = alternate(runs(), rounds, device=device)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                results.skip(f"{network}: {step}", str(error).splitlines()[0])
                continue
            found = ratio(samples["ticket"], samples["dense"])
            median = {name: median_ms(times) for name, times in samples.items()}
            results.add("networks", network, **{step: {"median_ms": median, **found}})
            results.target(f"{network} {step}", found["ratio"], at_most=TARGET + NOISE)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(NETWORKS))
    parser.add_argument("--pairs", type=int, default=5, help="paired runs (default 5)")
    parser.add_argument("--skip", nargs="*", default=[], help="steps to leave out, as compile")
    options = parser.parse_args()
    check_positive(pairs=options.pairs)
    device = device_of(options)
    results = Results("ticket_costs", options, device, pairs=options.pairs, noise=NOISE)
    for network in options.networks:
        measure(network, results, options, device)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
