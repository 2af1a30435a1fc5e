"""A run of tickets of weights, and of structures side by side, that nobody ran."""

from __future__ import annotations

import math
import random

from blockprune.lottery.record import (
    ConnectionRecord,
    ConnectivityRecord,
    Distance,
    EpochFigures,
    MaskRecord,
    NetworkRecord,
    OverlapRecord,
    RunRecord,
    StabilityRecord,
    SurvivalRecord,
    TicketCase,
    VerdictRecord,
)
from blockprune.lottery.steps import Step
from tests.fake_run import DENSE, START, fake_run, network, ticket, verdict_on

SEEDS = (0, 1, 2)
IMPORTANCES = ("magnitude", "lamp", "softmax")
LEVELS = (1, 2, 3, 4)
STEPS = (START, Step(epoch=2), Step(epoch=5))
LAYERS = {"conv1.weight": 144, **{f"layer1.{k}.conv1.weight": 2304 for k in range(4)}}
LAYERS |= {"fc.weight": 640}
TOTAL = sum(LAYERS.values())


def leveled(
    criterion: str, level: int, rewound_to: Step | None = START, **other: object
) -> TicketCase:
    """Return a ticket of weights, of rounds with a training between."""
    return TicketCase.model_validate(
        {
            "kind": "ticket",
            "structure": "weights",
            "criterion": criterion,
            "level": level,
            "weights": "rewind",
            "rewound_to": rewound_to,
            "schedule": "iterative",
            **other,
        }
    )


def twin(case: TicketCase) -> TicketCase:
    """Return the control with as many random weights of each layer."""
    return case.model_copy(update={"kind": "random"})


def left_of(layer: str, level: int, criterion: str) -> int:
    """Return how many weights of a layer are left: of the last layer none at the end, by lamp."""
    if (layer, level, criterion) == ("fc.weight", LEVELS[-1], "lamp"):
        return 0
    return math.floor(LAYERS[layer] * 0.8**level)


def accuracy_of(case: TicketCase, seed: int) -> float:
    """Return a share of 360 images, by formula."""
    falls = {"ticket": 0.4, "random": 1.8, "scratch": 1.4}.get(case.kind, 0.0)
    place = IMPORTANCES.index(str(case.criterion)) if case.criterion in IMPORTANCES else 0
    epoch = case.rewound_to.epoch if case.rewound_to else 0
    wrong = 10 + 2 * seed + round(falls * case.level * (1 + place) - 0.2 * epoch)
    return (360 - max(wrong, 0)) / 360


def weights_run() -> RunRecord:
    """Return a run of three importances by four levels from three steps, with all analyses."""
    cases = []
    for step in STEPS:
        for criterion in IMPORTANCES if step == START else IMPORTANCES[:1]:
            for level in LEVELS:
                found = leveled(criterion, level, step)
                cases += [found, twin(found)]
                if step == START and criterion == "magnitude":
                    cases.append(found.model_copy(update={"kind": "scratch", "weights": "reinit"}))
    tickets = [case for case in cases if case.kind == "ticket"]
    last = [case for case in tickets if case.level == LEVELS[-1]]
    judged = [case for case in cases if case.level == LEVELS[-1] and case.kind != "scratch"]
    return fake_run().model_copy(
        update={
            "name": "digits-ltr",
            "spec": {
                "name": "digits-ltr",
                "model": {"name": "blockprune:lenet"},
                "recipe": {"epochs": 10, "batch_size": 64},
            },
            "blocks": (),
            "scores": (),
            "similarities": (),
            "failures": {},
            "networks": tuple(_network(case, seed) for case in (DENSE, *cases) for seed in SEEDS),
            "verdicts": tuple(_verdict(case) for case in cases),
            "masks": tuple(_mask(case, seed) for case in tickets for seed in SEEDS),
            "overlaps": tuple(found for seed in SEEDS for found in _overlaps(seed)),
            "connections": tuple(
                ConnectionRecord(
                    case=case,
                    seed=seed,
                    overlapping=400 + seed,
                    others=3000 - 400 - seed,
                    spread=(0.01 + seed / 1000, 0.03),
                    sign_flips=(0.05, 0.2 + seed / 100 if case.criterion != "lamp" else None),
                )
                for case in last
                if case.rewound_to == START
                for seed in SEEDS
            ),
            "survivals": tuple(
                SurvivalRecord(
                    case=leveled(criterion, LEVELS[-1], weights="partial-reinit"),
                    seed=seed,
                    layers={"conv1.weight": (60, 40 + seed, 25.0), "fc.weight": (0, 0, 0.0)},
                )
                for criterion in IMPORTANCES[:2]
                for seed in SEEDS
            ),
            "stabilities": tuple(_stability(case, seed) for case in judged for seed in SEEDS),
            "connectivities": tuple(
                _connectivity(case, seed)
                for case in judged
                if case.criterion == "magnitude"
                for seed in SEEDS
            ),
        }
    )


def structures_run() -> RunRecord:
    """Return a run of blocks with filters and weights matched to them."""
    record = fake_run()
    cases: dict[TicketCase, float] = {}
    for criterion in ("snip", "grasp"):
        for p in (1, 2, 3):
            for structure, matched, effect in (
                ("filters", "params", -0.5 * p),
                ("weights", "params", -0.1 * p),
                ("filters", "filters", -0.4 * p),
                ("filters", "macs", -0.6 * p),
                ("weights", "macs", -0.2 * p),
            ):
                case = ticket(criterion, p, structure=structure, matched=matched)
                cases[case] = effect
                cases[twin(case)] = 2 * effect
    draw = random.Random(3)
    differences = {
        case: {seed: effect + draw.uniform(-0.3, 0.3) for seed in SEEDS}
        for case, effect in cases.items()
    }
    dense = {n.seed: n.accuracy for n in record.networks if n.case == DENSE}
    networks = [
        network(case, seed, dense[seed] + points / 100).model_copy(
            update=_cost(case) | ({"narrowed": {"layer1.0.conv1": 4}} if _is_narrow(case) else {})
        )
        for case, by_seed in differences.items()
        for seed, points in by_seed.items()
    ]
    verdicts = [
        verdict_on(case, points, control=differences[twin(case)] if case.kind == "ticket" else None)
        for case, points in differences.items()
    ]
    return record.model_copy(
        update={
            "name": "digits-structures",
            "networks": (*record.networks, *networks),
            "verdicts": (*record.verdicts, *verdicts),
        }
    )


def _is_narrow(case: TicketCase) -> bool:
    return case.structure == "filters"


def _cost(case: TicketCase) -> dict[str, object]:
    """A mask saves MACs on paper alone."""
    share = 1 - 0.06 * case.p
    latency = 6.5 if case.structure == "weights" else 0.5 + 6 * (share + 0.03)
    epochs = tuple(
        EpochFigures(epoch=k, loss=1 / k, accuracy=0.9, seconds=1.5, test_accuracy=0.9)
        for k in range(1, 21)
    )
    return {
        "params": round(467_946 * share),
        "macs": round(69_124_736 * share),
        "latency_ms": latency,
        "epochs": epochs,
        "blocks": 15,
    }


def _network(case: TicketCase, seed: int) -> NetworkRecord:
    plain = network(case, seed, accuracy_of(case, seed), epochs=10, timed=False)
    if not case.level:
        return plain.model_copy(update={"blocks": 0})
    left = sum(left_of(layer, case.level, str(case.criterion)) for layer in LAYERS)
    return plain.model_copy(update={"blocks": 0, "weights_left": left, "weights_total": TOTAL})


def _verdict(case: TicketCase) -> VerdictRecord:
    def against(other: TicketCase) -> dict[int, float]:
        return {s: 100 * (accuracy_of(case, s) - accuracy_of(other, s)) for s in SEEDS}

    control = None
    if case.kind == "ticket":
        control = {s: 100 * (accuracy_of(twin(case), s) - accuracy_of(DENSE, s)) for s in SEEDS}
    return verdict_on(case, against(DENSE), control=control)


def _mask(case: TicketCase, seed: int) -> MaskRecord:
    layers = {
        name: (left_of(name, case.level, str(case.criterion)), total)
        for name, total in LAYERS.items()
    }
    collapsed = tuple(name for name, (left, _) in layers.items() if not left)
    return MaskRecord(case=case, seed=seed, layers=layers, collapsed=collapsed)


def _overlaps(seed: int) -> list[OverlapRecord]:
    found = []
    for level in LEVELS:
        cases = [leveled(criterion, level) for criterion in IMPORTANCES]
        pairs = [(cases[0], cases[1]), (cases[0], cases[2]), (cases[1], cases[2])]
        for members in (tuple(cases), *pairs):
            share = 0.8 ** (level * len(members) / 2) + seed / 100
            chance = 0.8 ** (level * (len(members) - 1))
            found.append(
                OverlapRecord(
                    cases=members,
                    seed=seed,
                    of_all=share * 0.8**level,
                    of_surviving=share,
                    expected=chance,
                )
            )
    return found


def _stability(case: TicketCase, seed: int) -> StabilityRecord:
    far = (3.0 if case.kind == "random" else 1.0) / (1 + (case.rewound_to or START).epoch)
    return StabilityRecord(
        case=case,
        seed=seed,
        to_pruning=Distance(l2=10 * far + seed, degrees=20 * far + seed),
        to_order=Distance(l2=12 * far + seed, degrees=25 * far + seed),
    )


def _connectivity(case: TicketCase, seed: int) -> ConnectivityRecord:
    epoch = (case.rewound_to or START).epoch
    bump = (0.3 if case.kind == "random" else 0.1) / (1 + epoch) ** 2
    alphas = tuple(k / 10 for k in range(11))
    return ConnectivityRecord(
        case=case,
        seed=seed,
        alphas=alphas,
        errors=tuple(0.05 + 4 * bump * a * (1 - a) + seed / 1000 for a in alphas),
        instability=bump,
    )
