"""How the networks of a run stand up, by formula."""

from __future__ import annotations

from blockprune.lottery.record import RobustnessRecord, RunRecord
from blockprune.robustness.record import (
    COMMON_CORRUPTIONS,
    AttackChoice,
    AttackCurve,
    CorruptionAccuracy,
    Picture,
    Proportion,
    RobustnessResult,
    ShiftAccuracy,
    View,
)
from tests.fake_run import DENSE, chance, fake_run, ticket

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
"""A grey PNG of one pixel."""

NAMES = (*COMMON_CORRUPTIONS[:4], "speckle_noise")
EFFECTS = {
    DENSE: 0.0,
    ticket("grasp", 1): 0.02,
    ticket("grasp", 3): -0.03,
    ticket("snip", 1): 0.0,
    chance(1): -0.05,
}


def robust_run(seeds: tuple[int, ...] = (0, 1, 2)) -> RunRecord:
    """Return a run whose networks differ by an effect, and by a hundredth of it from seed to seed.

    One network has a flag.
    """
    found = [
        RobustnessRecord(
            case=case,
            seed=seed,
            result=result_of(effect, seed, flagged=(case, seed) == (chance(1), 1)),
        )
        for case, effect in EFFECTS.items()
        for seed in seeds
    ]
    return fake_run(seeds).model_copy(update={"robustness": tuple(found)})


def error_of(place: int, severity: int, effect: float, seed: int) -> float:
    """Return the error under a corruption; one ticket's effect changes its sign by seed."""
    return 0.1 + 0.03 * severity + 0.02 * place + 0.01 * seed - effect * (1 + seed / 10)


def result_of(effect: float, seed: int, *, flagged: bool = False) -> RobustnessResult:
    """Return one network's figures."""
    errors = {
        (name, severity): error_of(place, severity, effect, seed)
        for place, name in enumerate(NAMES)
        for severity in range(1, 6)
    }
    by_name = {name: sum(errors[name, s] for s in range(1, 6)) / 5 for name in NAMES}
    by_severity = {str(s): sum(errors[n, s] for n in NAMES) / len(NAMES) for s in range(1, 6)}
    choices = (AttackChoice.model_validate({"name": n}) for n in ("fgsm", "pgd", "deepfool"))
    return RobustnessResult(
        seed=seed,
        clean=Proportion(images=360, accuracy=0.95, low=0.92, high=0.97),
        corrupted_by="made",
        corruptions=tuple(
            CorruptionAccuracy(name=n, severity=s, accuracy=1 - error)
            for (n, s), error in errors.items()
        ),
        corruption_errors=by_name,
        severity_errors=by_severity,
        mean_error=sum(by_name[name] for name in NAMES[:4]) / 4,
        shifts=(
            ShiftAccuracy(
                name="usps", found=Proportion(images=200, accuracy=0.7, low=0.63, high=0.76)
            ),
        ),
        attacked=100,
        attacks=tuple(
            AttackCurve(
                choice=choice,
                parts=(choice.name,),
                accuracies=tuple(0.9 / (1 + k * (1 + place)) for k in range(len(choice.epsilons))),
                transferred=tuple(0.9 - 0.1 * k for k in range(len(choice.epsilons)))
                if choice.name == "pgd"
                else None,
            )
            for place, choice in enumerate(choices)
        ),
        zero_gradients=0.0,
        flags=("PGD is weaker than an attack made on the dense model.",) if flagged else (),
        ece=0.02 + seed / 1000,
        agreement=None if effect == 0 else 0.9,
        examples=(3, 5),
        pictures=(
            Picture(
                index=3,
                label=7,
                views=(
                    View(name="clean", decided=7, png=PIXEL),
                    View(name="fgsm", decided=1, png=PIXEL),
                ),
            ),
        ),
    )
