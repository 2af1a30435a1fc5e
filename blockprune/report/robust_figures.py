"""What the robustness of the networks of a run comes to, seed by seed, in percent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from blockprune.lottery.record import RobustnessRecord, TicketCase
from blockprune.report.cases import DENSE, Cases
from blockprune.robustness.record import AttackCurve, RobustnessResult

__all__ = ["Measure", "Robust", "attack_title", "measures_of"]

Read = Callable[[RobustnessResult], float | None]


class Measure:
    """One accuracy in percent that networks are compared by.

    Attributes:
        name: of it.
        is_harder: whether it is of images that are harder than the clean ones.
    """

    def __init__(self, name: str, read: Read, *, is_harder: bool = True) -> None:
        self.name, self.is_harder = name, is_harder
        self._read = read

    def of(self, result: RobustnessResult) -> float | None:
        """Return it in percent, None where it was not measured."""
        value = self._read(result)
        return None if value is None else 100 * value


class Robust:
    """The measured networks of a run.

    Attributes:
        results: by case and seed.
        dense: whether there is a dense one to compare with.
        others: all other cases, in order.
    """

    def __init__(self, records: Iterable[RobustnessRecord]) -> None:
        self.results: dict[TicketCase, dict[int, RobustnessResult]] = {}
        for record in records:
            self.results.setdefault(record.case, {})[record.seed] = record.result
        self.dense = DENSE in self.results
        self.others = tuple(case for case in self.results if case != DENSE)

    @classmethod
    def of(cls, cases: Cases) -> Robust:
        """Return those of a run."""
        return cls(cases.record.robustness)

    def all(self) -> list[RobustnessResult]:
        """Return every result."""
        return [result for found in self.results.values() for result in found.values()]

    def values(self, case: TicketCase, measure: Measure) -> list[float]:
        """Return a measure in percent, one for each seed that has it."""
        found = map(measure.of, self.results.get(case, {}).values())
        return [value for value in found if value is not None]

    def differences(self, case: TicketCase, measure: Measure) -> list[float]:
        """Return points above the dense network of the same seed, one for each seed of both."""
        dense = self.results.get(DENSE, {})
        pairs = [
            (measure.of(result), measure.of(dense[seed]))
            for seed, result in self.results[case].items()
            if seed in dense
        ]
        return [one - two for one, two in pairs if one is not None and two is not None]


def measures_of(results: Sequence[RobustnessResult]) -> list[Measure]:
    """Return clean accuracy, the mean under corruptions, each other test set, each attack.

    That of an attack is the mean over its epsilons above 0.
    """
    found = [Measure("clean", lambda result: result.clean.accuracy, is_harder=False)]
    if any(result.mean_error is not None for result in results):
        found.append(Measure("corruptions", _under_corruptions))
    names = dict.fromkeys(shift.name for result in results for shift in result.shifts)
    found += [Measure(name, _on(name)) for name in names]
    attacks = dict.fromkeys(attack_title(a) for result in results for a in result.attacks)
    return [*found, *(Measure(title, _under(title)) for title in attacks)]


def attack_title(attack: AttackCurve) -> str:
    """Return the attack with what its strength hangs on."""
    choice = attack.choice
    if choice.name == "fgsm":
        return "fgsm"
    restarts = f", {choice.restarts} restarts" if choice.restarts > 1 else ""
    return f"{choice.name}, {choice.steps} steps{restarts}"


def _under_corruptions(result: RobustnessResult) -> float | None:
    return None if result.mean_error is None else 1 - result.mean_error


def _on(name: str) -> Read:
    def read(result: RobustnessResult) -> float | None:
        return next((s.found.accuracy for s in result.shifts if s.name == name), None)

    return read


def _under(title: str) -> Read:
    def read(result: RobustnessResult) -> float | None:
        for attack in result.attacks:
            if attack_title(attack) == title:
                points = zip(attack.choice.epsilons, attack.accuracies, strict=True)
                hit = [accuracy for epsilon, accuracy in points if epsilon > 0]
                return sum(hit) / len(hit) if hit else None
        return None

    return read
