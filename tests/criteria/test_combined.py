from __future__ import annotations

from typing import Any

import pytest
import torch

from blockprune.criteria import Consensus, ScoringContext
from blockprune.criteria.combined import _ranks
from blockprune.errors import CriterionError
from blockprune.scoring import score_blocks
from tests.criteria.nets import Net, context, pair


def test_ranks_and_ties() -> None:
    assert _ranks({"a": 3.0, "b": -1.0, "c": 7.5}) == {"a": 2, "b": 1, "c": 3}
    assert _ranks({"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}) == {"a": 3, "b": 1, "c": 3, "d": 3}
    assert _ranks({}) == {}


def fixed(*values: float) -> Any:
    return lambda context: dict(zip((b.name for b in context.blocks), values, strict=True))


def test_sum_of_the_ranks() -> None:
    model, (images, labels) = Net(), pair()
    consensus = Consensus((fixed(1, 2, 3), fixed(0.5, 0.1, 0.7), fixed(-4, -4, 9)))
    scores = consensus(context(model, images, labels))
    assert scores == {"blocks.0": 1 + 2 + 1.5, "blocks.1": 2 + 1 + 1.5, "blocks.2": 9}


def test_of_names_as_of_single_tables() -> None:
    model, batch = Net(), pair()
    names = ("snip", "kl", "expectabs", "random")
    tables = [score_blocks(model, name, batch).scores for name in names]
    found = score_blocks(model, Consensus(names), batch)
    assert found.criterion == "Consensus"
    for block in found.scores:
        assert found.scores[block] == sum(_ranks(table)[block] for table in tables)


def test_one_member_cannot_spoil_the_model_of_another() -> None:
    def vandal(context: ScoringContext) -> dict[str, float]:
        with torch.no_grad():
            for parameter in context.model.parameters():
                parameter.zero_()
        return dict.fromkeys((block.name for block in context.blocks), 0.0)

    model, batch = Net(), pair()
    alone = _ranks(score_blocks(model, "l1", batch).scores)
    scores = score_blocks(model, Consensus((vandal, "l1")), batch).scores
    assert scores == {name: rank + 2 for name, rank in alone.items()}


@pytest.mark.parametrize("criteria", [(), ("snip",), "snip"])
def test_a_consensus_of_fewer_than_two(criteria: Any) -> None:
    with pytest.raises(CriterionError, match="two or more"):
        Consensus(criteria)


def test_a_consensus_of_what_does_not_exist() -> None:
    with pytest.raises(CriterionError, match=r"no criterion 'snap'.*snip"):
        Consensus(("snap", "l1"))(context(Net(), *pair()))
