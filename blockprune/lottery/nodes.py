"""The stages that a run unfolds into, and what each waits for.

What a stage is asked for may depend on what earlier ones found: a ticket's training is named by the
blocks that went, not by the criterion that chose them. So two criteria that choose the same blocks
share one training, and a stage is only known once those before it are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

from blockprune.lottery.cases import DENSE, START, Moments, below, blocks_of, trunk_of
from blockprune.lottery.record import TicketCase
from blockprune.lottery.spec import Spec
from blockprune.lottery.stages import Output, Stage
from blockprune.lottery.steps import Step
from blockprune.lottery.work import fresh_seed, order_seed

__all__ = ["LATENCY", "Node", "Outputs", "Unfolding", "folder_of"]

Outputs = Mapping[str, Output | None]
"""What earlier nodes found, by name; None where there was nothing to find."""

LATENCY = "time forward passes"

NOTHING: Final[dict[str, Any]] = {"blocks": []}
"""The cut that the dense network is."""


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

    def training(self, case: TicketCase, seed: int, *, is_twin: bool = False) -> str:
        """Return the name of the node that trains a case; its twin sees the data in other order."""
        return f"seed {seed}: train {case.label()}{', another order' if is_twin else ''}"

    def evaluation(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that evaluates a case."""
        return f"seed {seed}: evaluate {case.label()}"

    def similarity(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that compares a case with the dense network."""
        return f"seed {seed}: compare {case.label()}"

    def robustness(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that measures how a case stands up."""
        return f"seed {seed}: robustness of {case.label()}"

    def scoring(self, criterion: str, moment: Step, seed: int) -> str:
        """Return the name of the node that scores all blocks."""
        return f"seed {seed}: score by {criterion} at {moment}"

    def choice(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that chooses a case's blocks."""
        if case.structure != "blocks":
            chosen = case if case.kind == "random" else self._ticket_of(case)
            return f"seed {seed}: choose {case.structure} for {chosen.label()}"
        if case.early_bird and case.kind != "random":
            return self._draw_of(case, seed)
        words = f"seed {seed}: choose by {case.criterion}, p={case.p}"
        words += "" if case.scored_at is None else f", scored at {case.scored_at}"
        return words + ("" if case.schedule == "one-shot" else f", {case.schedule}")

    # --- nodes ------------------------------------------------------------------------------------

    def _of_seed(self, seed: int) -> list[Node]:
        nodes = [Node(self.training(DENSE, seed), (), lambda _: self._dense(seed))]
        for case in self.cases:
            if case.weights == "partial-reinit":
                nodes.append(self._partial(case, seed))
            if case != DENSE:
                nodes += self._choosing(case, seed)
                nodes.append(self.trained(case, seed))
            needs = (self.training(case, seed), *self._chosen_by(case, seed))
            nodes.append(
                Node(self.evaluation(case, seed), needs, partial(self._evaluate, case, seed))
            )
            if self._is_robustness_asked(case):
                name = self.robustness(case, seed)
                after = (*needs, self.training(DENSE, seed))
                nodes.append(Node(name, after, partial(self._measure_robustness, case, seed)))
            if self.spec.similarities and case.kind == "ticket":
                needs = (*needs, self.training(DENSE, seed))
                nodes.append(
                    Node(self.similarity(case, seed), needs, partial(self._compare, case, seed))
                )
        return nodes

    def _choosing(self, case: TicketCase, seed: int) -> list[Node]:
        """Return the nodes that choose what goes from a case."""
        if case.structure != "blocks":
            return self._choosing_inside(case, seed)
        name = self.choice(case, seed)
        if case.early_bird and case.kind != "random":
            network = self.training(DENSE, seed)
            return [Node(name, (network,), partial(self._draw, case, seed, network))]
        moment = case.scored_at or START
        score = self.scoring(str(case.criterion), moment, seed)
        dense = () if moment == START else (self.training(DENSE, seed),)
        scored = Node(score, dense, partial(self._score, str(case.criterion), moment, seed))
        if case.schedule != "one-shot":
            return [scored, Node(name, dense, partial(self._iterate, case, moment, seed))]
        return [scored, Node(name, (score,), partial(self._choose, case, score, seed))]

    def _choosing_inside(self, case: TicketCase, seed: int) -> list[Node]:
        """Return the nodes that choose the filters or the weights of a case."""
        name, ticket = self.choice(case, seed), self._ticket_of(case)
        if case.kind == "random" and case.structure == "weights":
            chosen = self.choice(ticket, seed)
            return [
                *self._choosing_inside(ticket, seed),
                Node(name, (chosen,), partial(self._shuffle, chosen, seed)),
            ]
        before: list[Node] = []
        if ticket.level:
            needs = [self.training(below(ticket), seed)]
            if ticket.level > 1 and ticket.schedule == "iterative":
                needs.append(self.choice(below(ticket), seed))
        else:
            blocks = blocks_of(ticket)
            before, needs = self._choosing(blocks, seed), [self.choice(blocks, seed)]
            if ticket.scored_at != START:
                needs.append(self.training(DENSE, seed))
        if case.structure == "filters":
            return [*before, Node(name, tuple(needs), partial(self._choose_filters, case, seed))]
        return [*before, Node(name, tuple(needs), partial(self._choose_weights, ticket, seed))]

    def trained(self, case: TicketCase, seed: int, *, is_twin: bool = False) -> Node:
        """Return the node that trains a case, or its twin."""
        needs = [*self._chosen_by(case, seed)]
        if case.early_bird or self._starts_from_dense(case):
            needs.append(self.training(trunk_of(case), seed))
        if case.weights in ("learning-rate", "finetune") and case.level:
            needs.append(self.training(below(case), seed))
        if case.weights == "partial-reinit":
            needs += self.shared_masks(case, seed)
        name = self.training(case, seed, is_twin=is_twin)
        train = partial(self._train, case, seed, is_twin=is_twin)
        return Node(name, tuple(dict.fromkeys(needs)), train)

    def _partial(self, case: TicketCase, seed: int) -> Node:
        """Return the node that trains the trunk of a partial re-initialisation."""

        def train(outputs: Outputs) -> Stage:
            return self._dense(seed, self._partly_new(case, seed, outputs))

        needs = self.shared_masks(case, seed)
        return Node(self.training(trunk_of(case), seed), needs, train)

    def _latency(self) -> Node:
        timed = [case for case in self.cases if case != DENSE and not case.level]
        choices = {self.choice(case, s): None for case in timed for s in self.spec.seed_list}
        return Node(LATENCY, tuple(choices), partial(self._time, timed), is_alone=True)

    # --- stages -----------------------------------------------------------------------------------

    def _dense(self, seed: int, start: dict[str, Any] | None = None) -> Stage:
        return Stage(
            "dense",
            {
                "setting": self.setting,
                "seed": seed,
                "from": start or {"seed": seed},
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
        inputs = {**scored, "p": case.p, "schedule": case.schedule, **self._rules()}
        if case.schedule == "beam":
            inputs["beam_width"] = self.spec.beam_width
        return Stage("iterative", inputs)

    def _choose_filters(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage:
        ticket = self._ticket_of(case)
        criterion = "random" if case.kind == "random" else str(case.criterion)
        scored = self._scored(criterion, ticket.scored_at or START, seed, outputs)
        return Stage("filters", {**scored, **self._goal(ticket, seed, outputs)})

    def _choose_weights(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage:
        if not case.level:
            scored = self._scored(str(case.criterion), case.scored_at or START, seed, outputs)
            goal = self._goal(case, seed, outputs)
        else:
            network = folder_of(outputs, self.training(below(case), seed))
            scored = self._ranked(str(case.criterion), {"dense": network, "step": None}, seed)
            rounds = case.level if case.schedule == "one-shot" else 1
            assert self.spec.levels is not None
            goal = {"share": self.spec.levels.share, "rounds": rounds, "scope": case.scope}
        is_next = case.level > 1 and case.schedule == "iterative"
        parent = folder_of(outputs, self.choice(below(case), seed)) if is_next else None
        return Stage("mask", {**scored, **goal, "parent": parent})

    def _shuffle(self, chosen: str, seed: int, outputs: Outputs) -> Stage:
        like = folder_of(outputs, chosen)
        return Stage("mask", {"setting": self.setting, "seed": seed, "like": like})

    def _goal(self, case: TicketCase, seed: int, outputs: Outputs) -> dict[str, Any]:
        """Return how much goes from a case that is matched to a ticket of blocks."""
        chosen = outputs[self.choice(blocks_of(case), seed)]
        assert chosen is not None
        return {"blocks": chosen.found["removed"], "by": case.matched}

    def _draw(self, case: TicketCase, seed: int, dense: str, outputs: Outputs) -> Stage:
        return Stage(
            "early-bird",
            {
                "setting": self.setting,
                "seed": seed,
                "dense": folder_of(outputs, dense),
                "criterion": self._early.criterion,
                "images_per_class": self.spec.images_per_class,
                "p": case.p,
                "steps": [Step(epoch=e).model_dump() for e in self._early_epochs()],
                "window": self._early.window,
                "distance": self._early.distance,
                **self._rules(),
            },
        )

    def _train(
        self, case: TicketCase, seed: int, outputs: Outputs, *, is_twin: bool = False
    ) -> Stage | None:
        cut = self.cut(case, seed, outputs)
        if cut is None:
            return None
        rewound = None if case.weights == "reinit" else case.rewound_to
        if case.early_bird and case.kind != "scratch":
            rewound = self.drawn_at(case, seed, outputs)
        finetune = self.spec.finetune if case.weights == "finetune" else None
        return Stage(
            "ticket",
            {
                "setting": self.setting,
                "seed": seed,
                "cut": cut,
                "weights": "rewind" if case.weights == "partial-reinit" else case.weights,
                "from": self._source(case, rewound, seed, outputs),
                "rewound_to": None if rewound is None else rewound.model_dump(),
                "recipe": self._recipe(order_seed(seed) if is_twin else seed),
                "finetune": None if finetune is None else finetune.model_dump(),
                "carry_optimizer": self.spec.carry_optimizer,
                "test_every_epoch": self.spec.test_every_epoch,
            },
        )

    def _evaluate(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        cut = self.cut(case, seed, outputs)
        if cut is None:
            return None
        network = folder_of(outputs, self.training(case, seed))
        return Stage(
            "evaluation",
            {"setting": self.setting, "seed": seed, "network": network, "cut": cut},
        )

    def _compare(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        evaluated = self._evaluate(case, seed, outputs)
        if evaluated is None:
            return None
        dense = folder_of(outputs, self.training(DENSE, seed))
        return Stage("similarity", {**evaluated.inputs, "dense": dense})

    def _measure_robustness(self, case: TicketCase, seed: int, outputs: Outputs) -> Stage | None:
        evaluated = self._evaluate(case, seed, outputs)
        if evaluated is None:
            return None
        assert self.spec.robustness is not None
        dense = None if case == DENSE else folder_of(outputs, self.training(DENSE, seed))
        choice = self.spec.robustness.model_dump(mode="json", exclude={"controls"})
        return Stage("robustness", {**evaluated.inputs, "dense": dense, "choice": choice})

    def _time(self, timed: Sequence[TicketCase], outputs: Outputs) -> Stage:
        assert self.spec.latency is not None
        cuts = {json.dumps(NOTHING): NOTHING}
        for case, seed in product(timed, self.spec.seed_list):
            # Where a choice failed, all others are timed.
            if all(name in outputs for name in self._chosen_by(case, seed)):
                cut = self.cut(case, seed, outputs)
                cuts |= {} if cut is None else {json.dumps(cut): cut}
        return Stage(
            "latency",
            {
                "setting": self.setting,
                "seed": self.spec.seed_list[0],
                "cuts": [cuts[text] for text in sorted(cuts)],
                **self.spec.latency.model_dump(),
            },
        )

    # --- parts of inputs --------------------------------------------------------------------------

    def cut(self, case: TicketCase, seed: int, outputs: Outputs) -> dict[str, Any] | None:
        """Return what a case lacks, as stages are told; None where there is no such ticket."""
        if case.structure == "blocks":
            removed = self.removed(case, seed, outputs)
            return None if removed is None else {"blocks": list(removed)}
        chosen = outputs[self.choice(case, seed)]
        assert chosen is not None
        if case.structure == "weights":
            return {"mask": chosen.folder.name}
        return {"filters": chosen.found["filters"]}

    def removed(self, case: TicketCase, seed: int, outputs: Outputs) -> tuple[str, ...] | None:
        """Return the blocks that a case lacks; None where no early-bird ticket was drawn."""
        if case.structure != "blocks":
            return ()
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
        if case.weights in ("rewind", "partial-reinit"):
            if rewound == START:
                is_partial = case.weights == "partial-reinit"
                return self._partly_new(case, seed, outputs) if is_partial else {"seed": seed}
            step = rewound.model_dump() if rewound else None
            return {"dense": folder_of(outputs, self.training(trunk_of(case), seed)), "step": step}
        # The final weights are those of the network that was pruned.
        network = below(case) if case.level else DENSE
        return {"dense": folder_of(outputs, self.training(network, seed)), "step": None}

    def _partly_new(self, case: TicketCase, seed: int, outputs: Outputs) -> dict[str, Any]:
        masks = [folder_of(outputs, name) for name in self.shared_masks(case, seed)]
        return {"fresh": fresh_seed(seed), "first": seed, "masks": masks}

    def _is_robustness_asked(self, case: TicketCase) -> bool:
        asked = self.spec.robustness
        return asked is not None and (asked.controls or case.kind in ("dense", "ticket"))

    def _starts_from_dense(self, case: TicketCase) -> bool:
        if case.weights in ("rewind", "partial-reinit"):
            return case.rewound_to != START
        return case.weights in ("learning-rate", "finetune") and not case.level

    def _scored(self, criterion: str, moment: Step, seed: int, outputs: Outputs) -> dict[str, Any]:
        source: dict[str, Any] = {"seed": seed}
        if moment != START:
            step = None if moment == self.moments.end else moment.model_dump()
            source = {"dense": folder_of(outputs, self.training(DENSE, seed)), "step": step}
        return self._ranked(criterion, source, seed)

    def _ranked(self, criterion: str, source: dict[str, Any], seed: int) -> dict[str, Any]:
        """Return the inputs of what ranks by a criterion, in the network that a source names."""
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
        if case.structure != "blocks":
            return (self.choice(case, seed),)
        drawn = (self._draw_of(case, seed),) if case.early_bird else ()
        return tuple(dict.fromkeys((self.choice(case, seed), *drawn)))

    def _ticket_of(self, case: TicketCase) -> TicketCase:
        """Return the ticket that a control of filters or weights stands beside."""
        if case.kind != "scratch":
            return case.model_copy(update={"kind": "ticket"})
        # New weights leave open which policy's ticket it is: the first of the spec's.
        free = {"kind": "ticket", "weights": None}
        if not case.level:
            free["rewound_to"] = None
        return next(
            ticket
            for ticket in self.cases
            if ticket.kind == "ticket"
            and ticket.model_copy(update=free) == case.model_copy(update=free)
        )

    def shared_masks(self, case: TicketCase, seed: int) -> tuple[str, ...]:
        """Return the choices of the last tickets of all importances, with their first weights."""
        assert self.spec.levels is not None
        free = {"weights": "rewind", "level": self.spec.levels.count}
        return tuple(
            self.choice(case.model_copy(update={**free, "criterion": importance}), seed)
            for importance in self.spec.levels.importances
        )

    def _draw_of(self, case: TicketCase, seed: int) -> str:
        """Return the name of the node that draws the early-bird ticket of a case's p."""
        return f"seed {seed}: draw {self._early.criterion}, p={case.p}, early bird"


def folder_of(outputs: Outputs, name: str) -> str:
    """Return the directory that a node which is done left its output in."""
    found = outputs[name]
    assert found is not None, name
    return found.folder.name
