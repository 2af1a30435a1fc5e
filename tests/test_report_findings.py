"""Which findings of the papers a run is said to show, on records made so that it is plain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import pytest

from blockprune.lottery.record import (
    ConnectionRecord,
    Distance,
    RunRecord,
    StabilityRecord,
    SurvivalRecord,
    TicketCase,
)
from blockprune.lottery.steps import Step
from blockprune.report.cases import Cases
from blockprune.report.deciding import Finding
from blockprune.report.findings import findings_of, findings_section
from tests.fake_run import DENSE, QUANTILES, START, chance, fake_run, network, ticket, verdict_on
from tests.fake_weights import leveled, twin


def record_of(accuracies: Mapping[TicketCase, tuple[float, ...]], **more: object) -> RunRecord:
    """Return a run in which each case has these accuracies, seed by seed."""
    networks = [
        network(case, seed, accuracy)
        for case, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    dense = accuracies.get(DENSE, ())
    verdicts = [
        verdict_on(case, {s: 100 * (a - dense[s]) for s, a in enumerate(values)})
        for case, values in accuracies.items()
        if case != DENSE and dense
    ]
    bare = {"similarities": (), "scores": ()}
    changes = {"networks": tuple(networks), "verdicts": tuple(verdicts), **bare, **more}
    return fake_run().model_copy(update=changes)


def found(record: RunRecord, words: str) -> Finding:
    [finding] = [f for f in findings_of(Cases(record)) if words in f.claim]
    return finding


class TestComparisons:
    @pytest.mark.parametrize(
        ("snip", "decision"),
        [
            ((0.90, 0.91, 0.90), "holds"),
            ((0.99, 0.98, 0.99), "fails"),
            ((0.95, 0.93, 0.98), "undecided"),
        ],
    )
    def test_grasp_against_snip(self, snip: tuple[float, ...], decision: str) -> None:
        grasp = (0.95, 0.95, 0.95)
        record = record_of({DENSE: (0.96,) * 3, ticket("grasp", 1): grasp, ticket("snip", 1): snip})
        finding = found(record, "than SNIP")
        assert finding.decision == decision
        points = [100 * (a - b) for a, b in zip(grasp, snip, strict=True)]
        half = QUANTILES[3] * statistics.stdev(points) / math.sqrt(3)
        mean = statistics.fmean(points)
        assert f"{mean:+.2f} points" in finding.figures
        low = float(finding.figures.partition("[")[2].partition(",")[0])
        # The quantile has four digits here.
        assert low == pytest.approx(mean - half, abs=0.011)

    def test_pairs_are_averaged_before_the_interval(self) -> None:
        better = {ticket("grasp", p): (0.95 + 0.01 * p,) * 3 for p in (1, 2)}
        record = record_of(
            {DENSE: (0.96,) * 3, **better, chance(1): (0.9, 0.91, 0.92), chance(2): (0.9,) * 3}
        )
        finding = found(record, "than chance")
        assert finding.decision == "holds"
        assert "+6.00 points" in finding.figures
        assert "of 2 comparisons, 3 seeds" in finding.figures

    def test_one_seed_decides_nothing(self) -> None:
        record = record_of({DENSE: (0.9,), ticket("grasp", 1): (0.9,), ticket("snip", 1): (0.8,)})
        assert not [f for f in findings_of(Cases(record)) if "SNIP" in f.claim]

    def test_filters_beside_blocks(self) -> None:
        narrow = ticket("grasp", 1, structure="filters", matched="filters")
        record = record_of(
            {DENSE: (0.9,) * 3, ticket("grasp", 1): (0.9, 0.91, 0.9), narrow: (0.8, 0.81, 0.8)}
        )
        assert found(record, "of filters matched by filters").decision == "holds"
        assert "+10.00 points" in found(record, "of filters matched by filters").figures

    @pytest.mark.parametrize(
        ("l1", "decision"),
        [
            ((0.901, 0.9, 0.899), "holds"),
            ((0.8, 0.81, 0.8), "fails"),
            ((0.9, 0.8, 0.99), "undecided"),
        ],
    )
    def test_alike_is_within_the_tolerance(self, l1: tuple[float, ...], decision: str) -> None:
        record = record_of(
            {DENSE: (0.9,) * 3, leveled("magnitude", 1): (0.9,) * 3, leveled("l1", 1): l1}
        )
        assert found(record, "as good as magnitude").decision == decision

    def test_only_the_last_level_tells_who_falls_behind(self) -> None:
        record = record_of(
            {
                DENSE: (0.9,) * 3,
                leveled("magnitude", 1): (0.1,) * 3,
                leveled("minmax", 1): (0.9,) * 3,
                leveled("magnitude", 2): (0.9, 0.9, 0.91),
                leveled("minmax", 2): (0.5, 0.51, 0.5),
            }
        )
        finding = found(record, "min-max fall behind")
        assert finding.decision == "holds"
        assert "1 comparison," in finding.figures

    def test_wins_and_losses(self) -> None:
        good, bad = ticket("grasp", 1), ticket("grasp", 2)
        dense = (0.9, 0.9, 0.9)
        winning = record_of({DENSE: dense, good: (0.91, 0.91, 0.91)})
        assert found(winning, "at initialisation win").decision == "holds"
        losing = record_of({DENSE: dense, good: (0.91,) * 3, bad: (0.5, 0.51, 0.5)})
        assert found(losing, "at initialisation win").decision == "fails"
        assert "1 wins, 1 loses" in found(losing, "at initialisation win").figures
        later = record_of({DENSE: dense, ticket("kl", 1, scored_at=Step(epoch=9)): (0.91,) * 3})
        assert found(later, "trained network win").paper == "Jordao et al. 2023, Table 1"


class TestOverSeeds:
    def connections(self, *pairs: tuple[float | None, float | None]) -> RunRecord:
        return record_of(
            {DENSE: (0.9,)},
            connections=tuple(
                ConnectionRecord(
                    case=leveled("l1", 2), seed=seed, overlapping=1, others=1,
                    spread=pair, sign_flips=(0.0, 0.0),
                )
                for seed, pair in enumerate(pairs)
            ),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("pairs", "decision"),
        [
            (((0.1, 0.2), (0.1, 0.21), (0.1, 0.2)), "holds"),
            (((0.2, 0.1), (0.21, 0.1), (0.2, 0.1)), "fails"),
            (((0.1, 0.2), (0.3, 0.2), (0.1, 0.2)), "undecided"),
            # Of one mind, and far from certain.
            (((0.1, 0.2), (0.1, 0.9)), "undecided"),
            (((0.1, 0.2),), "undecided"),
        ],
    )
    def test_steadiness(self, pairs: tuple[tuple[float, float], ...], decision: str) -> None:
        record = self.connections(*pairs)
        assert found(record, "from round to round").decision == decision
        assert found(record, "flip their signs").decision == "undecided"

    def test_absent_connections_are_no_figure(self) -> None:
        claims = [f.claim for f in findings_of(Cases(self.connections((None, 0.1))))]
        assert not [claim for claim in claims if "round to round" in claim]

    def test_tickets_of_a_seed_are_one_voice(self) -> None:
        connections = tuple(
            ConnectionRecord(
                case=leveled(name, 2), seed=0, overlapping=1, others=1,
                spread=(0.1, 0.2), sign_flips=(0.0, 0.1),
            )
            for name in ("l1", "l2", "lamp", "softmax")
        )  # fmt: skip
        record = record_of({DENSE: (0.9,)}, connections=connections)
        finding = found(record, "from round to round")
        assert finding.decision == "undecided"
        assert "In 4 of 4 tickets" in finding.figures
        assert "no interval of 1 seed." in finding.figures

    @pytest.mark.parametrize(("kept", "decision"), [(9, "holds"), (2, "fails")])
    def test_survival(self, kept: int, decision: str) -> None:
        survivals = tuple(
            SurvivalRecord(
                case=leveled("l1", 2, weights="partial-reinit"),
                seed=seed,
                layers={"a": (20, kept, 4.0), "b": (5, 0, 1.0)},
            )
            for seed in (0, 1)
        )
        record = record_of({DENSE: (0.9,)}, survivals=survivals)
        finding = found(record, "survives a partial")
        assert finding.decision == decision
        assert f"{100 * (kept / 5 - 1):+.1f} %" in finding.figures
        alone = record_of({DENSE: (0.9,)}, survivals=survivals[:1])
        assert found(alone, "survives a partial").decision == "undecided"

    def test_stability(self) -> None:
        def one(case: TicketCase, l2: float, seed: int) -> StabilityRecord:
            apart = Distance(l2=l2, degrees=10)
            return StabilityRecord(case=case, seed=seed, to_pruning=apart, to_order=apart)

        first, last = leveled("magnitude", 2), leveled("magnitude", 2, Step(epoch=5))
        record = record_of(
            {DENSE: (0.9,)},
            stabilities=tuple(
                one(case, l2, seed)
                for seed in (0, 1)
                for case, l2 in ((first, 4.0), (twin(first), 6.0), (last, 2.0), (twin(last), 5.0))
            ),
        )
        random = found(record, "more stable to pruning than random")
        assert random.decision == "holds"
        assert "2.00 times as far apart" in random.figures
        assert "1.50 to 2.50" in random.figures
        assert "+2.5 [+2.5, +2.5] over 2 seeds" in random.figures
        later = found(record, "rewound later are more stable to the order")
        assert later.decision == "holds"
        assert "L2 4.00 at the first moment, 2.00 at the last" in later.figures

    def test_equal_networks_are_no_reason_to_stop(self) -> None:
        none = Distance(l2=0.0, degrees=0.0)
        case = leveled("magnitude", 2)
        same = tuple(
            StabilityRecord(case=one, seed=0, to_pruning=none, to_order=none)
            for one in (case, twin(case))
        )
        record = record_of({DENSE: (0.9,)}, stabilities=same)
        assert not [f for f in findings_of(Cases(record)) if "than random masks" in f.claim]

    def test_a_seed_that_lacks_a_pair_says_nothing(self) -> None:
        # The hard p is missing of the last seed, which is not better for that.
        record = record_of(
            {
                DENSE: (0.9,) * 3,
                ticket("grasp", 1): (0.9, 0.91, 0.9),
                chance(1): (0.8, 0.81, 0.8),
                ticket("grasp", 2): (0.5, 0.51),
                chance(2): (0.6, 0.61),
            }
        )
        finding = found(record, "than chance")
        assert "+0.00 points [+0.00, +0.00]" in finding.figures
        assert "2 seeds" in finding.figures


def test_a_run_without_figures_has_no_section() -> None:
    assert findings_section(Cases(record_of({DENSE: (0.9, 0.9)}))) is None


def test_each_finding_has_a_row() -> None:
    record = record_of({DENSE: (0.9,) * 3, ticket("grasp", 1, START): (0.91,) * 3})
    section = findings_section(Cases(record))
    assert section is not None
    [row] = section.parts[0].tables[0].rows
    assert row[0] == "All tickets of blocks found at initialisation win."
    assert row[1][1].is_best
