"""What a run measured of masks, of their stability and of robustness, as plain tables."""

from __future__ import annotations

from collections.abc import Iterable

from blockprune.lottery.record import RunRecord, TicketCase
from blockprune.report.cases import Cases
from blockprune.report.csv_rows import Row, case_row, csv_of
from blockprune.report.robust_figures import Robust, attack_title
from blockprune.robustness.record import RobustnessResult

__all__ = ["analyses_csv"]


def analyses_csv(record: RunRecord) -> dict[str, str]:
    """Return each table by the name of its file, empty where the run has none of it.

    Shares are in [0, 1], angles in degrees; a layer, a place on a line and a pair of tickets have a
    line each.
    """
    return {
        "masks.csv": csv_of(_masks(record)),
        "overlaps.csv": csv_of(_overlaps(record)),
        "connections.csv": csv_of(_connections(record)),
        "survivals.csv": csv_of(_survivals(record)),
        "stabilities.csv": csv_of(_stabilities(record)),
        "connectivities.csv": csv_of(_connectivities(record)),
        "robustness.csv": csv_of(_robustness(record)),
    }


def _whose(case: TicketCase, seed: int) -> Row:
    return {**case_row(case), "seed": seed}


def _masks(record: RunRecord) -> Iterable[Row]:
    for mask in record.masks:
        for layer, (left, total) in mask.layers.items():
            yield {
                **_whose(mask.case, mask.seed),
                "layer": layer,
                "left": left,
                "total": total,
                "collapsed": layer in mask.collapsed,
            }


def _overlaps(record: RunRecord) -> Iterable[Row]:
    for overlap in record.overlaps:
        yield {
            # All but the importance is the same for all tickets of a line.
            **_whose(overlap.cases[0].model_copy(update={"criterion": None}), overlap.seed),
            "criterion": ";".join(str(case.criterion) for case in overlap.cases),
            "of_all": overlap.of_all,
            "of_surviving": overlap.of_surviving,
            "expected": overlap.expected,
        }


def _connections(record: RunRecord) -> Iterable[Row]:
    for found in record.connections:
        yield {
            **_whose(found.case, found.seed),
            "overlapping": found.overlapping,
            "others": found.others,
            "spread_overlapping": found.spread[0],
            "spread_others": found.spread[1],
            "sign_flips_overlapping": found.sign_flips[0],
            "sign_flips_others": found.sign_flips[1],
        }


def _survivals(record: RunRecord) -> Iterable[Row]:
    for survival in record.survivals:
        for layer, (shared, kept, expected) in survival.layers.items():
            yield {
                **_whose(survival.case, survival.seed),
                "layer": layer,
                "shared": shared,
                "kept": kept,
                "expected": expected,
            }


def _stabilities(record: RunRecord) -> Iterable[Row]:
    for found in record.stabilities:
        yield {
            **_whose(found.case, found.seed),
            "to_order_l2": found.to_order.l2,
            "to_order_degrees": found.to_order.degrees,
            "to_pruning_l2": found.to_pruning.l2,
            "to_pruning_degrees": found.to_pruning.degrees,
        }


def _connectivities(record: RunRecord) -> Iterable[Row]:
    for found in record.connectivities:
        for alpha, error in zip(found.alphas, found.errors, strict=True):
            yield {
                **_whose(found.case, found.seed),
                "alpha": alpha,
                "error": error,
                "instability": found.instability,
            }


def _robustness(record: RunRecord) -> Iterable[Row]:
    for case, results in Robust.of(Cases(record)).results.items():
        for seed, result in results.items():
            for measure, name, place, value in _figures(result):
                yield {
                    **_whose(case, seed),
                    "measure": measure,
                    "name": name,
                    "severity_or_epsilon": place,
                    "value": value,
                }


def _figures(result: RobustnessResult) -> Iterable[tuple[str, str, float | None, float | None]]:
    yield "clean", "", None, result.clean.accuracy
    yield "ece", "", None, result.ece
    yield "agreement", "", None, result.agreement
    for found in result.corruptions:
        yield "corruption", found.name, found.severity, found.accuracy
    for shift in result.shifts:
        yield "shift", shift.name, None, shift.found.accuracy
    for attack in result.attacks:
        title, epsilons = attack_title(attack), attack.choice.epsilons
        for epsilon, accuracy in zip(epsilons, attack.accuracies, strict=True):
            yield "attack", title, epsilon, accuracy
        for epsilon, accuracy in zip(epsilons, attack.transferred or (), strict=False):
            yield "attack made on dense", title, epsilon, accuracy
