"""Two processes with half of the data each, against one with all of it.

The tests start this very file twice with `torchrun`, once for all of them: `JOBS` are what each
rank does, and its results come back in files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import blockprune
from blockprune.criteria import CRITERIA, ScoringContext
from blockprune.data import make_loader
from blockprune.distributed import GlobalBatches, global_batches
from blockprune.errors import BlockpruneError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import evaluate, train
from tests.criteria.nets import CLASSES, Net, pair

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
SHARE = 6
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=4, seed=3)


class Plain(nn.Module):
    """Residual and without batch statistics, which each rank would take over its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


class Noisy(Dataset[Any]):
    """Forty-eight samples, augmented: each is drawn anew whenever it is asked for."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % CLASSES
        return torch.eye(CLASSES, 5, dtype=torch.float64)[label] + 0.3 * torch.randn(5), label


def plain() -> Plain:
    torch.manual_seed(5)
    return Plain()


def net() -> Net:
    torch.manual_seed(6)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Two global batches, as one process has them."""
    images, labels = pair(2 * RANKS * SHARE)
    size = RANKS * SHARE
    return [(images[k : k + size], labels[k : k + size]) for k in (0, size)]


def share(rank: int) -> list[tuple[Tensor, Tensor]]:
    rows = slice(rank * SHARE, (rank + 1) * SHARE)
    return [(images[rows], labels[rows]) for images, labels in batches()]


def by_rank(context: ScoringContext) -> dict[str, float]:
    """A criterion that finds something else on every machine."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {block.name: (1 - 2 * rank) * k for k, block in enumerate(context.blocks)}


def refused(act: Callable[[], object]) -> str:
    try:
        act()
    except BlockpruneError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def score_job(rank: int) -> object:
    tables = blockprune.score_criteria(net(), CRITERIA, global_batches(share(rank)))
    return {name: table.scores for name, table in tables.items()}


def stream_job(rank: int) -> object:
    data = global_batches(item for item in share(rank))
    return blockprune.score_blocks(net(), "taylor", data).scores


def own_numbers_job(rank: int) -> object:
    return blockprune.score_blocks(net(), by_rank, global_batches(share(rank))).scores


def iterative_job(rank: int) -> object:
    data = global_batches(share(rank))
    ticket = blockprune.prune(net(), "taylor", p=2, schedule="iterative", data=data)
    return blockprune.plan_of(ticket).remove


def accelerate_job(rank: int) -> object:
    loader = make_loader(Noisy(), RECIPE.batch_size, seed=1)
    prepared = Accelerator(cpu=True).prepare_data_loader(loader)
    return [[x.tolist(), y.tolist()] for x, y in global_batches(prepared)]


def uneven_job(rank: int) -> object:
    lengths = ([4, 2], [3])[rank]
    data = global_batches((torch.full((n, 2), float(rank)), torch.arange(n)) for n in lengths)
    return [[x[:, 0].tolist(), y.tolist()] for x, y in data]


def structures_job(rank: int) -> object:
    image, label = torch.full((2, 1), float(rank)), torch.tensor([rank, rank])
    table = torch.eye(3)
    keyword = {"x": image, "table": table, "scale": torch.tensor(2.0), "flag": True}
    [(inputs, targets)] = global_batches((keyword, label))
    [alone] = global_batches(image)
    return {
        "x": inputs["x"].tolist(),
        "table": torch.equal(inputs["table"], table),
        "scale": inputs["scale"].item(),
        "flag": inputs["flag"],
        "targets": targets.tolist(),
        "alone": alone.tolist(),
    }


def errors_job(rank: int) -> object:
    def broken() -> Iterator[Any]:
        yield share(rank)[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield share(rank)[1]

    other = net()
    if rank == 1:
        other.fc.bias.data += 1
    statistics = net()
    statistics.norm.running_mean += rank
    score = blockprune.score_blocks
    ragged = [(torch.zeros(2, 3 + rank), torch.zeros(2))]
    flags = [({"x": torch.zeros(2, 3), "flag": bool(rank)}, torch.zeros(2))]
    arrays = [({"x": torch.zeros(2, 3), "ids": np.arange(2)}, torch.zeros(2))]
    empty: list[Any] = []
    tables = {"l1": {f"block{rank}": 1.0}}
    return {
        "broken": refused(lambda: score(net(), "taylor", global_batches(broken()))),
        "other weights": refused(lambda: score(other, "l1", global_batches(share(rank)))),
        "statistics": refused(lambda: score(statistics, "l1", global_batches(share(rank)))),
        "ragged": refused(lambda: list(global_batches(ragged))),
        "flags": refused(lambda: list(global_batches(flags))),
        "arrays": refused(lambda: list(global_batches(arrays))),
        "no batch": refused(lambda: score(net(), "snip", global_batches(empty))),
        "no iterable": refused(lambda: global_batches(3)),
        "other blocks": refused(lambda: GlobalBatches(empty).agree(tables)),
    }


def train_job(rank: int) -> object:
    accelerator = Accelerator(cpu=True)
    model = plain()
    history = train(model, Noisy(), RECIPE, accelerator=accelerator)
    save_file(model.state_dict(), f"{sys.argv[1]}/weights{rank}.safetensors")
    found = evaluate(model, odd_set(), batch_size=4, accelerator=accelerator)
    return [[e.loss for e in history.epochs], found.accuracy, found.samples]


def ticket_job(rank: int) -> object:
    """All of it: score, cut, train."""
    accelerator = Accelerator(cpu=True)
    data = global_batches(accelerator.prepare_data_loader(make_loader(Noisy(), 8, seed=0)))
    ticket = blockprune.prune(plain(), "snip", p=2, data=data)
    train(ticket, Noisy(), RECIPE, accelerator=accelerator)
    save_file(ticket.state_dict(), f"{sys.argv[1]}/ticket{rank}.safetensors")
    return blockprune.plan_of(ticket).remove


def odd_set() -> TensorDataset:
    """Thirteen samples, which two ranks cannot share evenly."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(13, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(rows, torch.arange(13) % CLASSES)


JOBS: dict[str, Callable[[int], object]] = {
    "scores": score_job,
    "stream": stream_job,
    "own numbers": own_numbers_job,
    "iterative": iterative_job,
    "accelerate": accelerate_job,
    "uneven": uneven_job,
    "structures": structures_job,
    "errors": errors_job,
    "train": train_job,
    "ticket": ticket_job,
}


def main() -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    rank = dist.get_rank()
    results = {name: job(rank) for name, job in JOBS.items()}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(results), "utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={RANKS}", __file__, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    """What each job found, by rank."""
    return [json.loads((out / f"rank{rank}.json").read_text("utf-8")) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_finds_what_one_process_finds(
    ranks: list[dict[str, Any]], name: str
) -> None:
    alone = blockprune.score_blocks(net(), name, batches()).scores
    assert [found["scores"][name] for found in ranks] == [alone] * RANKS


def test_a_stream_is_read_once(ranks: list[dict[str, Any]]) -> None:
    alone = blockprune.score_blocks(net(), "taylor", batches()).scores
    assert [found["stream"] for found in ranks] == [alone] * RANKS


def test_rank_0_decides_where_ranks_find_different_numbers(ranks: list[dict[str, Any]]) -> None:
    alone = blockprune.score_blocks(net(), by_rank, batches()).scores
    assert [found["own numbers"] for found in ranks] == [alone] * RANKS


def test_every_round_is_scored_together(ranks: list[dict[str, Any]]) -> None:
    ticket = blockprune.prune(net(), "taylor", p=2, schedule="iterative", data=batches())
    alone = list(blockprune.plan_of(ticket).remove)
    assert [found["iterative"] for found in ranks] == [alone] * RANKS


def test_shares_of_accelerate_join_to_the_batches_of_one_process(
    ranks: list[dict[str, Any]],
) -> None:
    loader = make_loader(Noisy(), RANKS * RECIPE.batch_size, seed=1)
    alone = [[x.tolist(), y.tolist()] for x, y in loader]
    assert [found["accelerate"] for found in ranks] == [alone] * RANKS


def test_a_rank_without_further_batches_gives_none(ranks: list[dict[str, Any]]) -> None:
    expected = [
        [[0.0] * 4 + [1.0] * 3, [0, 1, 2, 3, 0, 1, 2]],
        [[0.0] * 2, [0, 1]],
    ]
    assert [found["uneven"] for found in ranks] == [expected] * RANKS


def test_what_belongs_to_no_sample_is_kept_as_it_is(ranks: list[dict[str, Any]]) -> None:
    expected = {
        "x": [[0.0], [0.0], [1.0], [1.0]],
        "table": True,
        "scale": 2.0,
        "flag": True,
        "targets": [0, 0, 1, 1],
        "alone": [[0.0], [0.0], [1.0], [1.0]],
    }
    assert [found["structures"] for found in ranks] == [expected] * RANKS


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("broken", "DataError: Rank 1 cannot read its data: OSError: the disk is gone."),
        ("other weights", "CriterionError: Rank 1 scores another Net than rank 0: their param"),
        ("ragged", "DataError: The batches of ranks 0 and 1 cannot be joined: (2, 3) of float32"),
        ("flags", "DataError: The batches of ranks 0 and 1 cannot be joined: apart from their"),
        (
            "arrays",
            "DataError: The batches of ranks 0 and 1 cannot be joined: apart from their tensors "
            "they differ, or cannot be compared",
        ),
        ("no batch", "DataError: The data is empty"),
        ("no iterable", "DataError: data must be an (inputs, targets) pair"),
        ("other blocks", "CriterionError: Rank 1 scored {'l1': ['block1']}, and rank 0 {'l1'"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(
    ranks: list[dict[str, Any]], case: str, message: str
) -> None:
    for found in ranks:
        assert found["errors"][case].startswith(message)


def test_running_statistics_may_differ(ranks: list[dict[str, Any]]) -> None:
    assert [found["errors"]["statistics"] for found in ranks] == ["nothing was raised"] * RANKS


def test_training_with_half_the_batch_each_is_training_with_all_of_it(
    out: Path, ranks: list[dict[str, Any]]
) -> None:
    model = plain()
    recipe = RECIPE.model_copy(update={"batch_size": RANKS * RECIPE.batch_size})
    history = train(model, Noisy(), recipe)
    _assert_close(_read(out / "weights0.safetensors"), model.state_dict())
    for rank, found in enumerate(ranks):
        _assert_close(_read(out / f"weights{rank}.safetensors"), model.state_dict())
        losses, accuracy, samples = found["train"]
        assert losses == pytest.approx([epoch.loss for epoch in history.epochs])
        assert (accuracy, samples) == (evaluate(model, odd_set()).accuracy, 13)


def test_a_ticket_is_found_and_trained_alike_on_every_rank(
    out: Path, ranks: list[dict[str, Any]]
) -> None:
    data = make_loader(Noisy(), RANKS * 8, seed=0)
    ticket = blockprune.prune(plain(), "snip", p=2, data=data)
    recipe = RECIPE.model_copy(update={"batch_size": RANKS * RECIPE.batch_size})
    train(ticket, Noisy(), recipe)
    assert [found["ticket"] for found in ranks] == [list(blockprune.plan_of(ticket).remove)] * RANKS
    for rank in range(RANKS):
        _assert_close(_read(out / f"ticket{rank}.safetensors"), ticket.state_dict())


def test_one_process_reads_its_data_as_they_are() -> None:
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(2, 1), torch.zeros(2)))
    assert global_batches(loader) is loader


def _read(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    main()
