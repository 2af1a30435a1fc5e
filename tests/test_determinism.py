"""The same seed gives the same ticket, scores and training, in another process as well."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import blockprune
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet20

CRITERIA = ("random", "l1", "snip", "expectabs")


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return a hash of every bit of these tensors and of their names."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def _numbers(seed: int) -> dict[str, Any]:
    """Score, prune and train a small network, and return every number that came of it."""
    torch.manual_seed(seed)
    model = resnet20()
    data = torch.randn(20, 3, 16, 16), torch.arange(20) % 10
    analysis = blockprune.find_blocks(model, data[0][:2])
    tables = blockprune.score_criteria(model, CRITERIA, data, seed=seed, analysis=analysis)
    scores = {name: table.scores for name, table in tables.items()}
    plan = blockprune.make_plan(analysis, scores["snip"], p=3)
    ticket = blockprune.remove_blocks(model, plan, data[0][:2])
    history = train(ticket, TensorDataset(*data), Recipe(epochs=2, batch_size=10, seed=seed))
    return {
        "scores": {name: list(values.items()) for name, values in scores.items()},
        "plan": plan.to_json(),
        "losses": [epoch.loss for epoch in history.epochs],
        "weights": _digest(ticket.state_dict()),
    }


def _in_a_process(seed: int, threads: int, hash_seed: int) -> dict[str, Any]:
    """Return the numbers of another interpreter, whose sets are in another order."""
    program = (
        "import json, sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "from tests.test_determinism import _numbers;"
        "print(json.dumps(_numbers(int(sys.argv[1]))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(seed), str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def elsewhere() -> list[dict[str, Any]]:
    """Numbers of two processes of one thread, and of one of two threads."""
    return [_in_a_process(5, 1, 1), _in_a_process(5, 1, 2), _in_a_process(5, 2, 3)]


def test_a_seed_decides_everything() -> None:
    first = _numbers(5)
    torch.rand(7)  # what the caller draws in between does not matter
    assert _numbers(5) == first
    other = _numbers(6)
    assert all(first[part] != other[part] for part in first)


def test_two_processes_agree_bit_for_bit(elsewhere: list[dict[str, Any]]) -> None:
    first, second, _ = elsewhere
    assert first == second
    assert json.loads(json.dumps(_numbers(5))) == first


def test_two_threads_agree_but_for_rounding(elsewhere: list[dict[str, Any]]) -> None:
    """Sums over a batch are split among threads, so that torch promises no equal bits."""
    one, _, two = elsewhere
    assert one["scores"]["random"] == two["scores"]["random"]
    assert json.loads(one["plan"])["remove"] == json.loads(two["plan"])["remove"]
    for name in CRITERIA:
        for (block, found), (same, wanted) in zip(
            two["scores"][name], one["scores"][name], strict=True
        ):
            assert block == same
            assert found == pytest.approx(wanted, rel=1e-3)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-2)


def test_the_weights_of_a_ticket_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    model, digests = resnet20(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            ticket = blockprune.remove_blocks(model, ["layer1.1"], torch.ones(2, 3, 8, 8))
            digests.append(_digest(ticket.state_dict()))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1]
