"""Latency as a budget: what is estimated, cut, timed and said. The times are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.errors import InfeasibleBudgetError, MeasurementError
from blockprune.models import resnet20
from blockprune.plan import Budget
from blockprune.profiling import Latency, LatencyTable, limits, table, trial_ticket

IMAGE = torch.zeros(2, 3, 32, 32)
DENSE_MS = 10.0
BLOCKS = 7

Clock = Callable[..., "Times"]


class Times:
    """A machine on which the dense model takes 10 ms, and each block a part of them.

    Attributes:
        timed: how many blocks each ticket had less that was timed.
    """

    def __init__(self, estimated: float, real: float, drift: tuple[float, ...]) -> None:
        self.estimated = estimated
        self.real = real
        self.timed: list[int] = []
        self._drift = itertools.cycle(drift)

    def table(self, analysis: BlockAnalysis) -> Any:
        times = self

        class Table:
            total = DENSE_MS

            def __call__(self, removed: frozenset[str]) -> float:
                return DENSE_MS - times.estimated * len(removed)

        return Table()

    def compare(
        self, models: dict[str, nn.Module], inputs: Any, *, batch_sizes: None
    ) -> dict[str, tuple[Latency, ...]]:
        assert list(models) == ["dense", "ticket"]
        assert batch_sizes is None
        gone = len(blockprune.plan_of(models["ticket"]).remove)
        self.timed.append(gone)
        factors = [next(self._drift) for _ in range(3)]
        real = DENSE_MS - self.real * gone
        return {
            "dense": (Latency(2, tuple(DENSE_MS * f for f in factors)),),
            "ticket": (Latency(2, tuple(real * f for f in factors)),),
        }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Set how much a block is estimated, and found, to take."""

    def install(estimated: float, real: float, drift: tuple[float, ...] = (1.0,)) -> Times:
        times = Times(estimated, real, drift)
        monkeypatch.setattr(limits, "LatencyTable", times.table)
        monkeypatch.setattr(limits, "compare_latency", times.compare)
        return times

    return install


@pytest.fixture(scope="module")
def analysis() -> BlockAnalysis:
    return find_blocks(resnet20(), IMAGE)


def test_a_right_table_is_confirmed_on_one_ticket(clock: Clock, analysis: BlockAnalysis) -> None:
    times = clock(estimated=1.0, real=1.0)
    plan = blockprune.make_plan(analysis, max_latency_ms=7.5)
    assert (len(plan.remove), times.timed) == (3, [3])
    assert (plan.p, plan.budget) == (None, Budget(kind="max_latency_ms", value=7.5))


def test_a_hopeful_table_is_scaled_until_a_ticket_is_fast_enough(
    clock: Clock, analysis: BlockAnalysis
) -> None:
    times = clock(estimated=1.2, real=1.0)
    plan = blockprune.make_plan(analysis, max_latency_ms=6.5)
    # Estimated 6.4 after three blocks, found 7; scaled 5.69 after four, found 6.
    assert (len(plan.remove), times.timed) == (4, [3, 4])


def test_a_wary_table_does_not_stop_before_the_last_ticket_is_timed(
    clock: Clock, analysis: BlockAnalysis
) -> None:
    times = clock(estimated=0.5, real=1.0)
    plan = blockprune.make_plan(analysis, max_latency_ms=4.0)
    assert (len(plan.remove), times.timed) == (BLOCKS, [BLOCKS])


def test_a_dense_model_that_is_fast_enough_stays(clock: Clock, analysis: BlockAnalysis) -> None:
    times = clock(estimated=1.0, real=1.0)
    assert blockprune.make_plan(analysis, max_latency_ms=10).remove == ()
    assert times.timed == [0]


def test_what_cannot_be_reached_names_the_best_ticket(
    clock: Clock, analysis: BlockAnalysis
) -> None:
    times = clock(estimated=1.2, real=1.0)
    with pytest.raises(InfeasibleBudgetError) as error:
        blockprune.make_plan(analysis, max_latency_ms=2)
    assert times.timed == [BLOCKS]
    assert str(error.value) == (
        "max_latency_ms=2.0 is below what can be reached: the dense model takes 10.000 ms, and the "
        "fastest ticket timed 3.000 ms, with 7 of 7 blocks gone; 7 can go."
    )
    with pytest.raises(InfeasibleBudgetError, match=r"5 can go with 2 protected\.$"):
        blockprune.make_plan(analysis, max_latency_ms=2, protect="layer3.*")


def test_drift_cancels(clock: Clock, analysis: BlockAnalysis) -> None:
    # Now and then everything takes three times as long; the median of the dense model does not.
    drift = (1.0, 3.0, 1.0)
    assert len(_removed(clock(1.0, 1.0, drift), analysis, 6.0)) == 4


def _removed(times: Times, analysis: BlockAnalysis, limit: float) -> tuple[str, ...]:
    return blockprune.make_plan(analysis, max_latency_ms=limit).remove


def test_a_model_without_blocks(clock: Clock) -> None:
    clock(estimated=1.0, real=1.0)
    plain = find_blocks(nn.Linear(4, 4), torch.zeros(1, 4))
    assert blockprune.make_plan(plain, max_latency_ms=11).remove == ()
    with pytest.raises(InfeasibleBudgetError, match="no removable residual block"):
        blockprune.make_plan(plain, max_latency_ms=9)


@pytest.mark.parametrize("schedule", ["one-shot", "iterative"])
@pytest.mark.parametrize("by", ["score", "score_per_cost"])
def test_prune_to_a_limit(clock: Clock, schedule: str, by: str) -> None:
    times = clock(estimated=1.2, real=1.0)
    ticket = blockprune.prune(
        resnet20(), "l1", max_latency_ms=6.5, example_inputs=IMAGE, schedule=schedule, by=by
    )
    assert len(blockprune.plan_of(ticket).remove) == 4
    assert times.timed == [3, 4]


def test_a_limit_out_of_reach_step_by_step(clock: Clock) -> None:
    clock(estimated=1.0, real=1.0)
    with pytest.raises(InfeasibleBudgetError, match=r"fastest ticket timed 3\.000 ms"):
        blockprune.prune(
            resnet20(), "l1", max_latency_ms=2, example_inputs=IMAGE, schedule="iterative"
        )


# --- the table ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A root that does not trace, over a region that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Add(), Add())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x)) if float(x.sum()) > -1e9 else x


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mix(x)
        return out


def test_the_table_adds_up_what_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = find_blocks(Twice(), torch.zeros(2, 4))

    class Watched(table.WatchedModel):
        def run(self) -> Any:
            executions, _ = super().run()
            # A matrix product takes 3, an addition 1; 4 calls of a block, and 4 around them.
            seconds = {"call_module": 3.0, "call_function": 1.0}
            return [(c, seconds.get(c[-1].op, 0.0)) for c, _ in executions], 20.0

    monkeypatch.setattr(table, "WatchedModel", Watched)
    monkeypatch.setattr(table, "measure_latency", lambda *_, **__: (Latency(2, (40.0,)),))
    estimate = LatencyTable(analysis, repeats=3)
    first, second = analysis.names
    assert estimate.total == estimate([]) == 40.0
    assert estimate([first]) == estimate([second]) == pytest.approx(40.0 * (1 - 8 / 20))
    assert estimate([first, second]) == pytest.approx(40.0 * (1 - 16 / 20))


def test_a_table_of_real_times() -> None:
    net = resnet20().train()
    analysis = find_blocks(net, IMAGE)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    estimate = LatencyTable(analysis, repeats=2)
    assert 0 <= estimate(analysis.names) < estimate(analysis.names[:1]) < estimate.total
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    with pytest.raises(MeasurementError, match="repeats"):
        LatencyTable(analysis, repeats=0)


def test_a_limit_that_any_machine_keeps_to() -> None:
    ticket = blockprune.prune(resnet20(), "l1", max_latency_ms=1e7, example_inputs=IMAGE)
    plan = blockprune.plan_of(ticket)
    assert plan.remove == ()
    assert plan.budget == Budget(kind="max_latency_ms", value=1e7)


def test_a_limit_that_no_machine_keeps_to() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"fastest ticket timed \d+\.\d{3} ms, with 7"):
        blockprune.prune(resnet20(), "l1", max_latency_ms=1e-9, example_inputs=IMAGE)


def test_a_trial_ticket_has_the_dense_names(analysis: BlockAnalysis) -> None:
    ticket = trial_ticket(analysis, {"layer1.1", "layer3.2"})
    assert blockprune.plan_of(ticket).remove == ("layer1.1", "layer3.2")
    left = find_blocks(ticket, IMAGE).names
    assert left == tuple(n for n in analysis.names if n not in ("layer1.1", "layer3.2"))
