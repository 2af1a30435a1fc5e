"""What is compared between tickets of weights, beside their accuracy: papers/003 and papers/004."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from blockprune.lottery.cases import DENSE, trunk_of
from blockprune.lottery.nodes import Node, Outputs, Unfolding, folder_of
from blockprune.lottery.record import TicketCase
from blockprune.lottery.stages import Stage

__all__ = ["Comparison", "comparisons_of"]


@dataclass(frozen=True)
class Comparison:
    """One stage that compares networks.

    Attributes:
        kind: of the stage.
        cases: what is compared; of a stability, the masked network alone.
        seed: of all of them.
        node: that compares.
        before: nodes that only it needs.
    """

    kind: Literal["overlaps", "connections", "survival", "stability", "line"]
    cases: tuple[TicketCase, ...]
    seed: int
    node: Node
    before: tuple[Node, ...] = ()


def comparisons_of(unfolding: Unfolding) -> tuple[Comparison, ...]:
    """Return every comparison that a run makes, for each of its seeds."""
    return tuple(
        comparison
        for seed in unfolding.spec.seed_list
        for compare in (_overlaps, _connections, _survivals, _stabilities)
        for comparison in compare(unfolding, seed)
    )


def _overlaps(unfolding: Unfolding, seed: int) -> Iterator[Comparison]:
    """Compare the masks of all importances, level by level."""
    for cases in _groups(unfolding):
        masks = tuple(unfolding.choice(case, seed) for case in cases)
        words = cases[0].label().removeprefix(f"{cases[0].criterion}, ")
        node = Node(
            f"seed {seed}: overlap of tickets, {words}",
            masks,
            partial(_stage, unfolding, "overlaps", {"masks": masks}),
        )
        yield Comparison("overlaps", cases, seed, node)


def _connections(unfolding: Unfolding, seed: int) -> Iterator[Comparison]:
    """Follow the connections of the last tickets from round to round."""
    for cases in _groups(unfolding):
        if cases[0].schedule != "iterative" or cases[0].level != _last(unfolding):
            continue
        # No value of new weights goes on from the dense network's.
        if cases[0].weights == "reinit":
            continue
        masks = tuple(unfolding.choice(case, seed) for case in cases)
        for case in cases:
            trainings = tuple(unfolding.training(one, seed) for one in _rounds(case))
            mask = unfolding.choice(case, seed)
            inputs = {"mask": mask, "masks": masks, "rounds": trainings}
            node = Node(
                f"seed {seed}: follow the connections of {case.label()}",
                (*masks, *trainings),
                partial(_stage, unfolding, "connections", inputs),
            )
            yield Comparison("connections", (case,), seed, node)


def _survivals(unfolding: Unfolding, seed: int) -> Iterator[Comparison]:
    """See which shared connections the tickets from partly new weights have again."""
    for case in unfolding.cases:
        if case.weights != "partial-reinit" or case.level != _last(unfolding):
            continue
        mask, masks = unfolding.choice(case, seed), unfolding.shared_masks(case, seed)
        node = Node(
            f"seed {seed}: count what survives in {case.label()}",
            (mask, *masks),
            partial(_stage, unfolding, "survival", {"mask": mask, "masks": masks}),
        )
        yield Comparison("survival", (case,), seed, node)


def _stabilities(unfolding: Unfolding, seed: int) -> Iterator[Comparison]:
    """Train tickets and their random controls on another order of the data, and compare."""
    asked = unfolding.spec.stability
    if asked is None:
        return
    levels = asked.levels or (_last(unfolding),)
    for case in unfolding.cases:
        is_trained = case.kind in ("ticket", "random") and case.weights == "rewind"
        if not is_trained or case.level not in levels:
            continue
        twin = unfolding.trained(case, seed, is_twin=True)
        network, mask = unfolding.training(case, seed), unfolding.choice(case, seed)
        pair = {"network": network, "twin": twin.name}
        dense = unfolding.training(DENSE, seed)
        node = Node(
            f"seed {seed}: stability of {case.label()}",
            (network, twin.name, dense, mask),
            partial(_stage, unfolding, "stability", {**pair, "dense": dense, "mask": mask}),
        )
        yield Comparison("stability", (case,), seed, node, (twin,))
        if asked.alphas:

            def line(
                outputs: Outputs, case: TicketCase = case, pair: dict[str, str] = pair
            ) -> Stage:
                cut = {"seed": seed, "cut": unfolding.cut(case, seed, outputs)}
                return _stage(unfolding, "line", pair, outputs, **cut, alphas=asked.alphas)

            node = Node(
                f"seed {seed}: test between two trainings of {case.label()}",
                (network, twin.name, mask),
                line,
            )
            yield Comparison("line", (case,), seed, node, (twin,))


def _stage(
    unfolding: Unfolding,
    kind: str,
    names: dict[str, Any],
    outputs: Outputs,
    **more: Any,
) -> Stage:
    """Return a stage that is told folders of other stages, here by the names of their nodes."""
    folders = {
        key: folder_of(outputs, name)
        if isinstance(name, str)
        else [folder_of(outputs, one) for one in name]
        for key, name in names.items()
    }
    return Stage(kind, {"setting": unfolding.setting, **folders, **more})


def _groups(unfolding: Unfolding) -> list[tuple[TicketCase, ...]]:
    """Return tickets of weights that differ in their importance alone, two or more of them."""
    groups: dict[TicketCase, list[TicketCase]] = {}
    for case in unfolding.cases:
        if case.kind == "ticket" and case.level and case.weights != "partial-reinit":
            groups.setdefault(_without_criterion(case), []).append(case)
    return [tuple(cases) for cases in groups.values() if len(cases) > 1]


def _without_criterion(case: TicketCase) -> TicketCase:
    return case.model_copy(update={"criterion": None})


def _rounds(case: TicketCase) -> list[TicketCase]:
    """Return the networks that were trained on the way to a ticket: the whole one, every level."""
    levels = [case.model_copy(update={"level": level}) for level in range(1, case.level + 1)]
    return [trunk_of(case), *levels]


def _last(unfolding: Unfolding) -> int:
    levels = unfolding.spec.levels
    return 0 if levels is None else levels.count
