"""Equation 1 seed by seed, and the paired interval against scipy's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from blockprune.lottery.early_bird import has_settled, mask_distance
from blockprune.lottery.record import NetworkRecord, RunRecord, TicketCase
from blockprune.lottery.steps import Step
from blockprune.lottery.verdicts import paired_interval, verdict_of, verdicts_of

DENSE = TicketCase(kind="dense")
TICKET = TicketCase(
    kind="ticket",
    criterion="snip",
    p=1,
    scored_at=Step(epoch=4),
    weights="rewind",
    rewound_to=Step(epoch=1),
)
RANDOM = TicketCase(
    kind="random", criterion="random", p=1, weights="rewind", rewound_to=Step(epoch=1)
)


def networks(case: TicketCase, accuracies: dict[int, float]) -> list[NetworkRecord]:
    rest: dict[str, Any] = {"blocks": 1, "params": 1, "macs": 1, "loss": 0.0, "epochs": ()}
    return [
        NetworkRecord(case=case, seed=seed, accuracy=accuracy, stage="", **rest)
        for seed, accuracy in accuracies.items()
    ]


class TestInterval:
    @pytest.mark.parametrize("count", [2, 3, 10])
    @pytest.mark.parametrize("confidence", [0.9, 0.95])
    def test_equals_scipy_s_paired_test(self, count: int, confidence: float) -> None:
        rng = np.random.default_rng(count)
        ticket, dense = rng.normal(90, 1, count), rng.normal(91, 1, count)
        found = paired_interval([*(ticket - dense)], confidence)
        known = stats.ttest_rel(ticket, dense).confidence_interval(confidence)
        assert found == pytest.approx((known.low, known.high))

    def test_by_hand(self) -> None:
        # Mean 2, standard deviation 1, t of 2 degrees at 97.5 % is 4.30265.
        half = 4.302652729911275 / math.sqrt(3)
        assert paired_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half))

    def test_equal_differences_have_no_width(self) -> None:
        assert paired_interval([0.5, 0.5]) == (0.5, 0.5)

    @pytest.mark.parametrize("differences", [[], [1.0]])
    def test_too_few(self, differences: list[float]) -> None:
        assert paired_interval(differences) is None


class TestVerdict:
    @pytest.mark.parametrize(
        ("interval", "verdict"),
        [
            (None, "not enough seeds"),
            ((-1.0, 3.0), "wins"),
            ((-1.01, 3.0), "ties"),
            ((-3.0, -1.0), "ties"),
            ((-3.0, -1.01), "loses"),
        ],
    )
    def test_xi_is_the_limit(self, interval: tuple[float, float] | None, verdict: str) -> None:
        assert verdict_of(interval, xi_points=1.0) == verdict

    def test_pairs_by_seed(self) -> None:
        found = verdicts_of(
            [
                *networks(DENSE, {0: 0.90, 1: 0.95, 2: 0.99}),
                *networks(TICKET, {0: 0.91, 1: 0.94, 3: 0.10}),
                *networks(RANDOM, {0: 0.80, 1: 0.94}),
            ],
            xi_points=1.0,
            confidence=0.95,
        )
        ticket, random = found
        assert (ticket.case, random.case) == (TICKET, RANDOM)
        assert ticket.differences == {0: 1.0, 1: -1.0}
        # A difference of exactly xi wins, whatever binary makes of 0.94 - 0.95.
        assert ticket.winning == {0: True, 1: True}
        assert (ticket.mean, ticket.verdict) == (0.0, "ties")
        assert ticket.against_random == pytest.approx(5.5)
        assert random.against_random is None
        assert random.winning == {0: False, 1: True}

    def test_one_seed_is_not_enough(self) -> None:
        [found] = verdicts_of(
            [*networks(DENSE, {0: 0.9}), *networks(TICKET, {0: 0.99})],
            xi_points=1.0,
            confidence=0.95,
        )
        assert (found.interval, found.verdict) == (None, "not enough seeds")
        assert found.winning == {0: True}
        assert found.against_random is None

    def test_without_a_dense_network_there_is_no_verdict(self) -> None:
        assert verdicts_of(networks(TICKET, {0: 0.9}), xi_points=1.0, confidence=0.95) == ()


class TestEarlyBird:
    def test_one_swap_among_twelve_is_two_twelfths(self) -> None:
        assert mask_distance({"a", "b"}, {"a", "c"}, candidates=12) == pytest.approx(2 / 12)

    def test_settled_means_the_whole_window(self) -> None:
        masks = [{"b"}, {"a"}, {"a"}, {"a"}, {"a"}, {"a"}]
        assert [has_settled(masks[:n], 12) for n in range(1, 7)] == [False] * 5 + [True]

    def test_the_newest_counts(self) -> None:
        # A window whose first four agree, and whose newest does not.
        assert not has_settled([{"a"}] * 4 + [{"b"}], 12)
        assert has_settled([{"a"}] * 4 + [{"b"}], 12, distance=2 / 12)


def test_a_record_without_times_keeps_all_else() -> None:
    [network] = networks(DENSE, {0: 0.5})
    timed = network.model_copy(update={"latency_ms": 1.0, "latency_iqr_ms": 0.1})
    record = RunRecord(
        name="x",
        spec={},
        command="",
        environment={},
        data={},
        xi_points=1,
        confidence=0.95,
        blocks=(),
        networks=(timed,),
        scores=(),
        verdicts=(),
    )
    assert record.without_times() == record.model_copy(update={"networks": (network,)})
