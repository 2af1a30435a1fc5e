"""A training that can be killed at any moment, and goes on from its latest checkpoint.

It is taken in stretches of a few epochs. After each, the state, and the figures of all epochs so
far, are put in place as one directory by one rename; only then the one before is removed. Since
training to a moment and on from its state is training through, the end is the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from blockprune.data import ImageData
from blockprune.errors import CheckpointError
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.lottery.steps import Step
from blockprune.lottery.tensorboard import log_epochs
from blockprune.lottery.training import train
from blockprune.whole_files import new_folder

__all__ = ["FINAL", "Trainer", "state_file"]

FINAL: Final = "final.safetensors"
"""The file of the state at the end."""

# What reading a damaged checkpoint can end in; JSON nested too deeply is a RecursionError.
DAMAGES: Final = (CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError)

Figures = dict[str, Any]
"""The figures of one epoch, as `blockprune.lottery.training.EpochRecord` has them."""


def state_file(step: Step) -> str:
    """Return the name of the file that holds the state of a moment."""
    return f"state-{step.epoch:04d}-{step.iteration:06d}.safetensors"


@dataclass
class Trainer:
    """Trains one network for a stage.

    Attributes:
        data: to train and test on.
        unfinished: the directory for checkpoints; made where absent.
        every: epochs between them.
        test_every_epoch: evaluate after each epoch.
        name: of the curves.
        curves: the folder for TensorBoard; None: no curves are written.
        workers: processes that fetch samples.
        notes: what came up.
    """

    data: ImageData
    unfinished: Path
    every: int
    test_every_epoch: bool = False
    name: str = ""
    curves: str | None = None
    workers: int = 0
    notes: list[str] = field(default_factory=list)

    def train(
        self,
        model: nn.Module,
        folder: Path,
        *,
        recipe: Recipe,
        start: TrainingState | None = None,
        keep: Iterable[Step] = (),
        with_optimizer: bool = False,
    ) -> list[Figures]:
        """Train to the end of the recipe, and leave the final state and those to keep in `folder`.

        Args:
            model: trained in place.
            folder: that is given the files.
            recipe: see `train`.
            start: the state to begin from; the model as it is if None.
            keep: moments whose states are kept, after the start and before the end.
            with_optimizer: keep the optimiser's state and the averages with them.

        Returns:
            The figures of each epoch.

        Raises:
            CheckpointError, TrainingDivergedError, DataError: see `train`.
        """
        kept = tuple(keep)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        state, epochs = self._resumed(kept, start)
        begun = Step() if state is None else state.step
        ends = [*range(self.every, recipe.epochs, self.every), recipe.epochs]
        for end in (Step(epoch=end) for end in ends if end > begun.epoch):
            state, figures = self._stretch(model, recipe, state, end, kept, with_optimizer)
            epochs += figures
            if self.curves is not None:
                log_epochs(Path(self.curves) / self.name, figures)
            if end.epoch < recipe.epochs:
                self._write(state, epochs)
        assert state is not None
        last = state if with_optimizer else replace(state, momentum={})
        save_state(last, folder / FINAL)
        for step in kept:
            # Copied, not moved: killed before this stage is in place, it needs them again.
            shutil.copyfile(self.unfinished / state_file(step), folder / state_file(step))
        return epochs

    def _stretch(
        self,
        model: nn.Module,
        recipe: Recipe,
        start: TrainingState | None,
        end: Step,
        kept: Sequence[Step],
        with_optimizer: bool,
    ) -> tuple[TrainingState, list[Figures]]:
        """Train up to a moment; return the state there, and the figures of the epochs."""
        begin = Step() if start is None else start.step
        here = [step for step in kept if _order(begin) < _order(step) <= _order(end)]
        reached: list[TrainingState] = []

        def on_state(state: TrainingState) -> None:
            if state.step in here:
                slim = state if with_optimizer else replace(state, momentum={}, ema=None)
                save_state(slim, self.unfinished / state_file(state.step))
            if state.step == end:
                reached.append(state)

        history = train(
            model,
            self.data.train,
            recipe,
            start=start,
            stop=end,
            keep=[*here, end],
            on_state=on_state,
            test=self.data.test if self.test_every_epoch else None,
            workers=self.workers,
        )
        return reached[-1], [dataclasses.asdict(record) for record in history.epochs]

    def _write(self, state: TrainingState, epochs: list[Figures]) -> None:
        """Put a checkpoint in place, and remove those before it."""
        earlier = self._checkpoints()
        place = self.unfinished / f"epoch-{state.step.epoch:06d}"
        new = new_folder(place)
        try:
            save_state(state, new / "state.safetensors")
            told = json.dumps(epochs)
            text = json.dumps({"epochs": told, "digest": _digest(told)})
            (new / "epochs.json").write_text(text, encoding="utf-8")
            os.rename(new, place)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        for old in earlier:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.unfinished.glob("epoch-*"))

    def _resumed(
        self, kept: Sequence[Step], start: TrainingState | None
    ) -> tuple[TrainingState | None, list[Figures]]:
        """Return the state and the figures to go on from: the latest checkpoint's, or the start."""
        for checkpoint in reversed(self._checkpoints()):
            try:
                state = load_state(checkpoint / "state.safetensors")
                told = json.loads((checkpoint / "epochs.json").read_text(encoding="utf-8"))
                if _digest(str(told["epochs"])) != told["digest"]:
                    raise CheckpointError("epochs.json has changed")
                for step in kept:
                    if _order(step) <= _order(state.step):
                        load_state(self.unfinished / state_file(step))
                return state, json.loads(told["epochs"])
            except DAMAGES as error:
                self.notes.append(
                    f"A checkpoint of {self.name} was damaged ({error}); its training began anew."
                )
                shutil.rmtree(checkpoint, ignore_errors=True)
        return start, []


def _order(step: Step) -> tuple[int, int]:
    return step.epoch, step.iteration


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
