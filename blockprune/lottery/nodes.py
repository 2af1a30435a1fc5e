"""The stages that a run unfolds into, and what each waits for.

What a stage is asked for may depend on what earlier ones found: a ticket's training is named by the
blocks that went, not by the criterion that chose them. So two criteria that choose the same blocks
share one training, and a stage is only known once those before it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from blockprune.lottery.cases import DENSE, START, Moments
from blockprune.lottery.record import TicketCase
from blockprune.lottery.spec import Spec
from blockprune.lottery.stages import Output, Stage
from blockprune.lottery.steps import Step
from blockprune.lottery.work import fresh_seed

__all__ = ["LATENCY", "Node", "Unfolding"]

Outputs = Mapping[str, Output | None]
"""What earlier nodes found, by name; None where there was nothing to find."""

LATENCY = "time forward passes"


@dataclass(frozen=True)
class Node:
    """One thing to do.

    Attributes:
        name: what a person calls it.
        needs: names of the nodes before it.
        stage: returns the stage, given what those found; None where there is nothing to do.
        is_alone: whether it must run while nothing else does.
    """

    name: str
    needs: tuple[str, ...]
    stage: Callable[[Outputs], Stage | None]
    is_alone: bool = False


@dataclass(frozen=True)
class Unfolding:
    """All nodes of a run.

    Attributes:
        spec: of the run.
        setting: what all stages have in common, as inputs tell it.
        cases: to train, for every seed.
        moments: of the dense training.
        protect: patterns of blocks that stay.
    """

    spec: Spec
    setting: dict[str, Any]
    cases: tuple[TicketCase, ...]
    moments: Moments
    protect: tuple[str, ...]

    def nodes(self) -> tuple[Node, ...]:
        """Return every node once, those it needs before it."""
        nodes = [node for seed in self.spec.seed_list for node in self._of_seed(seed)]
        if self.spec.latency is not None:
            nodes.append(self._latency())
        return tuple({node.name: node for node in nodes}.values())

    # --- names ------------------------------------------------------------------------------------

    def training(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that trains a case."""
        return f"seed {seed}: train {case.label()}"

    def evaluation(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that evaluates a case."""
        return f"seed {seed}: evaluate {case.label()}"

    def similarity(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that compares a case with the dense network."""
        return f"seed {seed}: compare {case.label()}"

    def scoring(self, criterion: str, moment: Step, seed: int) -> str:
        """Return the name of the node that scores all blocks."""
        return f"seed {seed}: score by {criterion} at {moment}"

    def choice(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that chooses a case's blocks."""
        if case.early_bird and case.kind != "random":
            return self._draw_of(case, seed)
        words = f"seed {seed}: choose by {case.criterion}, p={case.p}"
        words += "" if case.scored_at is None else f", scored at {case.scored_at}"
        return words + (", iterative" if case.schedule == "iterative" else "")

    # --- nodes ------------------------------------------------------------------------------------

    def _of_seed(self, seed: int) -> list[Node]:
        nodes = [Node(self.training(DENSE, seed), (), lambda _: self._dense(seed))]
        for case in self.cases:
            if case != DENSE:
                nodes += self._choosing(case, seed)
                nodes.append(self._training(case, seed))
            needs = (self.training(case, seed), *self._chosen_by(case, seed))
            nodes.append(
                Node(self.evaluation(case, seed), needs, partial(self._evaluate, case, seed))
            )
            if self.spec.similarities and case.kind == "ticket":
                needs = (*needs, self.training(DENSE, seed))
                nodes.append(
                    Node(self.similarity(case, seed), needs, partial(self._compare, case, seed))
                )
        return nodes

    def _choosing(self, case: TicketCase, seed: int) -> list[Node]:
        """Return the nodes that choose the blocks of a case."""
        name = self.choice(case, seed)
        if case.early_bird and case.kind != "random":
            network = self.training(DENSE, seed)
            return [Node(name, (network,), partial(self._draw, case, seed, network))]
        moment = case.scored_at or START
        score = self.scoring(str(case.criterion), moment, seed)
        dense = () if moment == START else (self.training(DENSE, seed),)
        scored = Node(score, dense, partial(self._score, str(case.criterion), moment, seed))
        if case.schedule == "iterative":
            return [scored, Node(name, dense, partial(self._iterate, case, moment, seed))]
        return [scored, Node(name, (score,), partial(self._choose, case, score, seed))]

    def _training(self, case: TicketCase, seed: int) -> Node:
        needs = [*self._chosen_by(case, seed)]
        if case.early_bird or self._starts_from_dense(case):
            needs.append(self.training(DENSE, seed))
        return Node(self.training(case, seed), tuple(needs), partial(self._train, case, seed))

    def _latency(self) -> Node:
        choices = {
            self.choice(case, seed): None
            for case in self.cases
            for seed in self.spec.seed_list
            if case != DENSE
        }
        return Node(LATENCY, tuple(choices), self._time, is_alone=True)

    # --- stages -----------------------------------------------------------------------------------

    def _dense(self, seed: int) -> Stage:
        return Stage(
            "dense",
            {
                "setting": self.setting,
                "seed": seed,
                "recipe": self._recipe(seed),
                "keep": [step.model_dump() for step in self._kept()],
                "carry_optimizer": self.spec.carry_optimizer,
                "test_every_epoch": self.spec.test_every_epoch,
            },
        )

    def _score(self, criterion: str, moment: Step, seed: int, outputs: Outputs) -> Stage:
        return Stage("score", self._scored(criterion, moment, seed, outputs))

    def _choose(self, case: TicketCase, score: str, seed: int, outputs: Outputs) -> Stage:
        found = outputs[score]
        assert found is not None
        return Stage(
            "plan",
            {
                "setting": self.setting,
                "seed": seed,
                "p": case.p,
                "scores": found.found["scores"],
                **self._rules(),
            },
        )

    def _iterate(self, case: TicketCase, moment: Step, seed: int, outputs: Outputs) -> Stage:
        scored = self._scored(str(case.criterion), moment, seed, outputs)
        inputs = {**scored, "p": case.p, "schedule": "iterative", **self._rules()}
        return Stage("iterative", inputs)

    def _draw(self, case: TicketCase, seed: int, dense: str, outputs: Outputs) -> Stage:
        return Stage(
            "early-bird",
            {
                "setting": self.setting,
                "seed": seed,
                "dense": _folder(outputs, dense),
                "criterion": self._early.criterion,
                "images_per_class": self.spec.images_per_class,
                "p": case.p,
                "steps": [Step(epoch=e).model_dump() for e in self._early_epochs()],
                "window": self._early.window,
                "distance": self._early.distance,
                **self._rules(),
            },
        )

    def _train(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        removed = self.removed(case, seed, outputs)
        if removed is None:
            return None
        rewound = case.rewound_to
        if case.early_bird and case.kind != "scratch":
            rewound = self.drawn_at(case, seed, outputs)
        finetune = self.spec.finetune if case.weights == "finetune" else None
        return Stage(
            "ticket",
            {
                "setting": self.setting,
                "seed": seed,
                "removed": list(removed),
                "weights": case.weights,
                "from": self._source(case, rewound, seed, outputs),
                "rewound_to": None if rewound is None else rewound.model_dump(),
                "recipe": self._recipe(seed),
                "finetune": None if finetune is None else finetune.model_dump(),
                "carry_optimizer": self.spec.carry_optimizer,
                "test_every_epoch": self.spec.test_every_epoch,
            },
        )

    def _evaluate(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        removed = self.removed(case, seed, outputs)
        if removed is None:
            return None
        return Stage(
            "evaluation",
            {
                "setting": self.setting,
                "seed": seed,
                "network": _folder(outputs, self.training(case, seed)),
                "removed": list(removed),
            },
        )

    def _compare(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        evaluated = self._evaluate(case, seed, outputs)
        if evaluated is None:
            return None
        dense = _folder(outputs, self.training(DENSE, seed))
        return Stage("similarity", {**evaluated.inputs, "dense": dense})

    def _time(self, outputs: Outputs) -> Stage:
        assert self.spec.latency is not None
        structures = {
            tuple(found.found["removed"])
            for found in outputs.values()
            if found is not None and found.found["removed"] is not None
        }
        return Stage(
            "latency",
            {
                "setting": self.setting,
                "seed": self.spec.seed_list[0],
                "structures": [[], *(list(removed) for removed in sorted(structures))],
                **self.spec.latency.model_dump(),
            },
        )

    # --- parts of inputs --------------------------------------------------------------------------

    def removed(self, case: TicketCase, seed: int, outputs: Outputs) -> tuple[str, ...] | None:
        """Return the blocks that a case lacks; None where no early-bird ticket was drawn."""
        found: list[list[str] | None] = [[]]
        for name in reversed(self._chosen_by(case, seed)):
            chosen = outputs[name]
            found.append(None if chosen is None else chosen.found["removed"])
        return None if None in found else tuple(found[-1] or ())

    def drawn_at(self, case: TicketCase, seed: int, outputs: Outputs) -> Step | None:
        """Return the moment at which an early-bird ticket was drawn; None for other cases."""
        if not case.early_bird:
            return None
        found = outputs[self._draw_of(case, seed)]
        step = None if found is None else found.found["step"]
        return None if step is None else Step.model_validate(step)

    def _source(
        self, case: TicketCase, rewound: Step | None, seed: int, outputs: Outputs
    ) -> dict[str, Any]:
        """Return where the weights of a case come from."""
        if case.weights == "reinit":
            return {"seed": fresh_seed(seed)}
        if case.weights == "rewind" and rewound == START:
            return {"seed": seed}
        step = rewound.model_dump() if case.weights == "rewind" and rewound else None
        return {"dense": _folder(outputs, self.training(DENSE, seed)), "step": step}

    def _starts_from_dense(self, case: TicketCase) -> bool:
        if case.weights == "rewind":
            return case.rewound_to != START
        return case.weights in ("learning-rate", "finetune")

    def _scored(self, criterion: str, moment: Step, seed: int, outputs: Outputs) -> dict[str, Any]:
        source: dict[str, Any] = {"seed": seed}
        if moment != START:
            step = None if moment == self.moments.end else moment.model_dump()
            source = {"dense": _folder(outputs, self.training(DENSE, seed)), "step": step}
        return {
            "setting": self.setting,
            "seed": seed,
            "criterion": criterion,
            "source": source,
            "images_per_class": self.spec.images_per_class,
        }

    def _rules(self) -> dict[str, Any]:
        return {
            "protect": list(self.protect),
            "min_blocks_per_stage": self.spec.min_blocks_per_stage,
        }

    def _recipe(self, seed: int) -> dict[str, Any]:
        return self.spec.recipe.model_copy(update={"seed": seed}).model_dump(mode="json")

    def _kept(self) -> list[Step]:
        """Return the moments, but the beginning and the end, whose states are needed."""
        steps = {step for case in self.cases for step in (case.scored_at, case.rewound_to) if step}
        if self.spec.early_bird is not None:
            steps |= {Step(epoch=epoch) for epoch in self._early_epochs()}
        inner = steps - {START, self.moments.end}
        return sorted(inner, key=lambda step: (step.epoch, step.iteration))

    def _early_epochs(self) -> range:
        return range(1, self.spec.recipe.epochs)

    @property
    def _early(self) -> Any:
        assert self.spec.early_bird is not None
        return self.spec.early_bird

    def _chosen_by(self, case: TicketCase, seed: int) -> tuple[str, ...]:
        """Return the names of the nodes that decide what a case lacks: the choice comes first."""
        if case == DENSE:
            return ()
        drawn = (self._draw_of(case, seed),) if case.early_bird else ()
        return tuple(dict.fromkeys((self.choice(case, seed), *drawn)))

    def _draw_of(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that draws the early-bird ticket of a case's p."""
        return f"seed {seed}: draw {self._early.criterion}, p={case.p}, early bird"


def _folder(outputs: Outputs, name: str) -> str:
    found = outputs[name]
    assert found is not None, name
    return found.folder.name
