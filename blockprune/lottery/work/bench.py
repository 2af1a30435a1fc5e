"""Where a stage is worked on: the model and the data of its run, and what earlier stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.blocks import BlockAnalysis, find_blocks
from blockprune.data import ImageData, balanced_batch, load_data, size_of
from blockprune.errors import DataError, ModelSpecError
from blockprune.lottery.checkpoints import FINAL, Trainer, state_file
from blockprune.lottery.stages import Stage, StageStore
from blockprune.lottery.state import TrainingState, load_state
from blockprune.lottery.steps import Step
from blockprune.models.building import model_and_inputs, model_factory
from blockprune.randomness import preserved_rng, seed_rng

__all__ = ["Bench", "Job", "Made", "Setting", "device", "fresh_seed", "order_seed"]

Made = tuple[dict[str, Any], dict[str, Any]]
"""What a stage found, and what its clock said."""


@dataclass(frozen=True)
class Job:
    """A stage on its way to a worker; all plain values.

    Attributes:
        stage: what to do.
        store: the folder of all stages, which every worker must see under this name.
        data_dir: the folder of the data, likewise; None where the data need none.
        checkpoint_epochs: how often a training is written down.
        curves: the folder for TensorBoard; None: no curves are written.
        workers: processes that fetch samples, which decide on no result.
    """

    stage: Stage
    store: str
    data_dir: str | None = None
    checkpoint_epochs: int = 5
    curves: str | None = None
    workers: int = 0


@dataclass(frozen=True)
class Setting:
    """What all stages of a run have in common: the model and the data.

    Attributes:
        model: name and arguments of the factory.
        data: name, image size and options of the data set.
        granularity: of the blocks.
        data_dir: the folder of the data.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    granularity: str
    data_dir: str | None

    @classmethod
    def of(cls, told: Mapping[str, Any], data_dir: str | None) -> Setting:
        """Return the setting that is told in a stage's inputs."""
        return cls(told["model"], told["data"], told["granularity"], data_dir)

    @cached_property
    def images(self) -> ImageData:
        """The data; those of the latest setting are kept in memory."""
        return _images(json.dumps(dict(self.data), sort_keys=True), self.data_dir)

    @cached_property
    def image(self) -> Tensor:
        """A batch of the first training image."""
        size_of(self.images.train)
        image, _ = self.images.train[0]
        if not isinstance(image, Tensor):
            raise DataError(f"The data set's images are {type(image).__name__}, not tensors.")
        return image.unsqueeze(0)

    def build(self, seed: int) -> nn.Module:
        """Build the dense network with the weights of a seed.

        Raises:
            ModelSpecError: it cannot be built.
        """
        name, arguments = self.model["name"], self.model["arguments"]
        factory = model_factory(name, arguments)
        with preserved_rng():
            seed_rng(seed)
            try:
                built = factory()
            except Exception as error:
                raise ModelSpecError(
                    f"{name} cannot be built with the arguments {dict(arguments)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return model_and_inputs(name, built)[0]

    def analyse(self, model: nn.Module) -> BlockAnalysis:
        """Find the blocks of a model of this setting."""
        device = next(model.parameters()).device
        return find_blocks(model, self.image.to(device), self.granularity)


class Bench:
    """Where one stage is worked on.

    Attributes:
        job: what to do.
        store: of all stages.
        setting: the model and the data.
        notes: what the stage wants known.
    """

    def __init__(self, job: Job, store: StageStore, setting: Setting) -> None:
        self.job = job
        self.store = store
        self.setting = setting
        self.notes: list[str] = []

    def state(self, source: Mapping[str, Any]) -> TrainingState:
        """Return the state that inputs name: of a seed's new network, or of a dense training."""
        if "seed" in source:
            return TrainingState.of(self.setting.build(source["seed"]))
        if source["step"] is None:
            return self.final(source["dense"])
        file = state_file(Step.model_validate(source["step"]))
        return load_state(self.store.folder / source["dense"] / file)

    def final(self, stage: str) -> TrainingState:
        """Return the state that a training stage ended with."""
        return load_state(self.store.folder / stage / FINAL)

    def batch(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the training images that inputs ask to score on, and their labels."""
        images = self.setting.images
        return balanced_batch(
            images.train, images.num_classes, inputs["images_per_class"], seed=inputs["seed"]
        )

    def train(self, model: nn.Module, inputs: Mapping[str, Any], folder: Path, **how: Any) -> Made:
        """Train a network, and leave its states in the folder."""
        trainer = Trainer(
            data=self.setting.images,
            unfinished=self.store.unfinished(self.job.stage),
            every=self.job.checkpoint_epochs,
            test_every_epoch=inputs["test_every_epoch"],
            name=self.job.stage.folder,
            curves=self.job.curves,
            workers=self.job.workers,
        )
        epochs = trainer.train(model, folder, **how)
        self.notes += trainer.notes
        found = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in epochs]
        return {"epochs": found}, {"seconds": [epoch["seconds"] for epoch in epochs]}


def fresh_seed(seed: int) -> int:
    """Return the seed of the new weights of a replicate: those of no other, and not its own."""
    return 2**32 - 1 - seed


def order_seed(seed: int) -> int:
    """Return the recipe's seed of a second order of the data: that of no replicate."""
    return 2**31 + seed


def device() -> torch.device:
    """Return where networks are run."""
    found: torch.device = Accelerator().device
    return found


@lru_cache(maxsize=1)
def _images(told: str, data_dir: str | None) -> ImageData:
    choice = json.loads(told)
    options = dict(choice["options"])
    if choice["image_size"] is not None:
        options["image_size"] = choice["image_size"]
    return load_data(choice["name"], data_dir, **options)
