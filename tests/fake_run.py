"""A run of the lottery that nobody ran: a record with all that a report has to show."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable, Sequence

from blockprune.lottery.record import (
    BlockRecord,
    EpochFigures,
    NetworkRecord,
    RunRecord,
    ScoreRecord,
    SimilarityRecord,
    TicketCase,
    Verdict,
    VerdictRecord,
)
from blockprune.lottery.steps import Step

START = Step()
MERGES = tuple(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(5))
FIXED = ("layer2.0", "layer3.0")
REMOVABLE = tuple(name for name in MERGES if name not in FIXED)
DENSE_MACS = 69_124_736
BLOCK_MACS = 4_718_592
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student's t for 95 %, by number of seeds."""

DENSE = TicketCase(kind="dense")


def ticket(
    criterion: str,
    p: int,
    scored_at: Step = START,
    rewound_to: Step | None = START,
    **other: object,
) -> TicketCase:
    """Return a case; found at initialisation unless told otherwise."""
    return TicketCase.model_validate(
        {
            "kind": "ticket",
            "criterion": criterion,
            "p": p,
            "scored_at": scored_at,
            "weights": "rewind",
            "rewound_to": rewound_to,
            **other,
        }
    )


def chance(p: int, rewound_to: Step = START) -> TicketCase:
    """Return the random control."""
    return TicketCase(
        kind="random", criterion="random", p=p, weights="rewind", rewound_to=rewound_to
    )


def anew(criterion: str, p: int) -> TicketCase:
    """Return the control with the ticket's blocks and new weights."""
    return TicketCase(kind="scratch", criterion=criterion, p=p, scored_at=START, weights="reinit")


def verdict_on(
    case: TicketCase,
    differences: dict[int, float],
    xi: float = 1.0,
    control: dict[int, float] | None = None,
) -> VerdictRecord:
    """Judge a case by the definition, with intervals by Student's t."""
    mean, interval = _interval(list(differences.values()))
    verdict: Verdict = "not enough seeds"
    if interval is not None:
        low, high = interval
        verdict = "wins" if low >= -xi else "loses" if high < -xi else "ties"
    shared = [differences[s] - control[s] for s in differences if s in control] if control else []
    against, against_interval = _interval(shared) if shared else (None, None)
    return VerdictRecord(
        case=case,
        differences=differences,
        winning={seed: points + xi >= 0 for seed, points in differences.items()},
        mean=mean or 0.0,
        interval=interval,
        against_random=against,
        against_random_interval=against_interval,
        verdict=verdict,
    )


def network(
    case: TicketCase,
    seed: int,
    accuracy: float,
    removed: Sequence[str] = (),
    *,
    epochs: int = 20,
    timed: bool = True,
    tested: bool = True,
) -> NetworkRecord:
    """Return a trained network with a curve that ends at its accuracy."""
    first = case.rewound_to.epoch if case.rewound_to is not None else 0
    macs = DENSE_MACS - BLOCK_MACS * len(removed)
    return NetworkRecord(
        case=case,
        seed=seed,
        removed=tuple(removed),
        blocks=len(MERGES) - len(removed),
        params=467_946 - 12_000 * len(removed),
        macs=macs,
        accuracy=accuracy,
        loss=2.3 * (1 - accuracy) + 0.05,
        epochs=tuple(
            EpochFigures(
                epoch=epoch,
                loss=2.2 * math.exp(-4 * epoch / epochs) + 0.02 * (seed + 1) / epoch,
                accuracy=1 - 0.9 * math.exp(-5 * epoch / epochs),
                seconds=1.5 * macs / DENSE_MACS,
                test_accuracy=accuracy * (1 - 0.85 * math.exp(-6 * epoch / epochs))
                if tested
                else None,
            )
            for epoch in range(first + 1, epochs + 1)
        ),
        latency_ms=0.5 + 6 * macs / DENSE_MACS if timed else None,
        latency_iqr_ms=0.1 if timed else None,
        stage=f"stages/{case.kind}-{zlib.crc32(case.label().encode()):08x}-{seed}",
    )


def fake_run(seeds: Iterable[int] = (0, 1, 2), **changes: object) -> RunRecord:
    """Return a run that fills Tables 1 and 2, with controls, similarities and one failure."""
    return _Fake(tuple(seeds)).record().model_copy(update=changes)


class _Fake:
    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds = seeds
        self.draw = random.Random(7)
        self.networks = [network(DENSE, seed, self._dense(seed)) for seed in seeds]
        self.verdicts: list[VerdictRecord] = []
        self.scores: list[ScoreRecord] = []
        self.similarities: list[SimilarityRecord] = []

    def record(self) -> RunRecord:
        for p in range(1, 6):
            by_chance = self._case(chance(p), -0.25 * p)
            for criterion, effect in (("snip", -0.3 * p + 0.3), ("grasp", 0.5 - 0.1 * p)):
                self._case(ticket(criterion, p), effect, by_chance)
                if p in (1, 5):
                    self._alike(ticket(criterion, p))
            self._case(anew("grasp", p), -0.4 * p)
        for rewound in (0, 5, 10, 15):
            step = Step(epoch=rewound)
            by_chance = (
                next(v.differences for v in self.verdicts if v.case == chance(3))
                if rewound == 0
                else self._case(chance(3, step), -0.2 - rewound / 10)
            )
            for place, criterion in enumerate(("hrank", "expectabs", "pls", "kl")):
                case = ticket(criterion, 3, Step(epoch=20), step)
                self._case(case, 0.5 - place / 4 - rewound / 8, by_chance)
        for criterion in ("snip", "grasp"):
            self._score(criterion, START)
        for criterion in ("hrank", "expectabs", "pls", "kl"):
            self._score(criterion, Step(epoch=20))
        self._lose_the_last_seed_of(ticket("snip", 4))
        return RunRecord(
            name="digits-tables",
            spec={
                "name": "digits-tables",
                "model": {"name": "blockprune:resnet32", "arguments": {"in_channels": 1}},
                "data": {"name": "digits", "image_size": None},
                "recipe": {"epochs": 20, "lr": 0.1, "batch_size": 64},
                "criteria": ["snip", "grasp"],
                "p": [1, 2, 3, 4, 5],
                "seeds": list(self.seeds),
            },
            command="blockprune lottery run examples/digits-tables.toml --out runs/digits-tables",
            environment={
                "blockprune": "0.1.0",
                "python": "3.11.9",
                "torch": "2.9.0",
                "device": "cpu",
                "cores": 2,
                "gpu": None,
            },
            data={
                "name": "digits",
                "train_images": 1437,
                "test_images": 360,
                "image_shape": (1, 8, 8),
                "classes": 10,
            },
            xi_points=1.0,
            confidence=0.95,
            latency_batch=64,
            blocks=tuple(
                BlockRecord(
                    name=name,
                    stage=int(name[5]) - 1,
                    shape=(16 * 2 ** (int(name[5]) - 1), *2 * (8 // 2 ** (int(name[5]) - 1),)),
                    params=0 if name in FIXED else 4_736,
                    macs=0 if name in FIXED else BLOCK_MACS,
                    removable=name not in FIXED,
                    reason="projection_shortcut" if name in FIXED else None,
                )
                for name in MERGES
            ),
            networks=tuple(self.networks),
            scores=tuple(self.scores),
            verdicts=tuple(self.verdicts),
            similarities=tuple(self.similarities),
            failures={
                "train/snip-p4-seed2": "TrainingDivergedError: The loss is nan at epoch 3 of 20, "
                "iteration 7 of 23, learning rate 0.1."
            },
            notes=("Accuracies are those after the last epoch, not the best of all epochs.",),
        )

    def _dense(self, seed: int) -> float:
        return (352 - 2 * seed % 5) / 360

    def _case(
        self, case: TicketCase, effect: float, control: dict[int, float] | None = None
    ) -> dict[int, float]:
        differences = {}
        for seed in self.seeds:
            right = round(360 * self._dense(seed) + 3.6 * (effect + self.draw.uniform(-0.6, 0.6)))
            right = min(right, 360)
            differences[seed] = 100 * (right / 360 - self._dense(seed))
            self.networks.append(network(case, seed, right / 360, self._removed(case, seed)))
        self.verdicts.append(verdict_on(case, differences, control=control))
        return differences

    def _removed(self, case: TicketCase, seed: int) -> tuple[str, ...]:
        order = list(REMOVABLE[1:])
        random.Random(f"{case.criterion} {seed if case.criterion == 'random' else 0}").shuffle(
            order
        )
        if seed and case.kind != "random":
            order[1], order[seed + 1] = order[seed + 1], order[1]
        return tuple(sorted(order[: case.p], key=MERGES.index))

    def _score(self, criterion: str, moment: Step) -> None:
        for seed in self.seeds:
            scale = -6 if criterion == "grasp" else 0
            self.scores.append(
                ScoreRecord(
                    criterion=criterion,
                    scored_at=moment,
                    seed=seed,
                    scores={
                        name: (-1 if criterion == "grasp" and place == 3 else 1)
                        * 10 ** (scale + (place / 3 if scale else 0))
                        * self.draw.uniform(0.5, 1)
                        for place, name in enumerate(REMOVABLE)
                    },
                )
            )

    def _alike(self, case: TicketCase) -> None:
        for seed in self.seeds:
            columns = tuple(n for n in MERGES if n not in self._removed(case, seed))
            self.similarities.append(
                SimilarityRecord(
                    case=case,
                    seed=seed,
                    rows=MERGES,
                    columns=columns,
                    values=tuple(
                        tuple(
                            math.exp(-abs(MERGES.index(a) - MERGES.index(b)) / 4)
                            - 0.03 * case.p * self.draw.random()
                            for b in columns
                        )
                        for a in MERGES
                    ),
                )
            )

    def _lose_the_last_seed_of(self, case: TicketCase) -> None:
        last = self.seeds[-1]
        self.networks = [n for n in self.networks if (n.case, n.seed) != (case, last)]
        place = next(k for k, v in enumerate(self.verdicts) if v.case == case)
        left = {s: d for s, d in self.verdicts[place].differences.items() if s != last}
        self.verdicts[place] = verdict_on(case, left)


def _interval(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    if not values:
        return None, None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = QUANTILES[len(values)] * math.sqrt(variance / len(values))
    return mean, (round(mean - half, 9), round(mean + half, 9))
