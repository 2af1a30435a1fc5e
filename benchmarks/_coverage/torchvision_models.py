"""Every model of torchvision with random weights, and inputs as small as it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models

from blockprune.inputs import infer_example_inputs

from .sizes import first_that_runs
from .waking import wake

__all__ = ["build", "names"]

BATCH = 2
IMAGE_SIZES = (64, 128, 224, 299)
CLIPS = ((4, 64), (8, 64), (16, 64), (16, 112), (16, 224))
FLOW_SIZES = (128, 256)
DETECTION_SIZE = 64

DETECTION = frozenset(models.list_models(module=models.detection))
SEGMENTATION = frozenset(models.list_models(module=models.segmentation))
VIDEO = frozenset(models.list_models(module=models.video))
FLOW = frozenset(models.list_models(module=models.optical_flow))

# Constructors that take a size, so that one need not be the published one.
SIZED = ("vit_",)
# Constructors that draw truncated normals through SciPy for a minute, unless told not to.
SLOW_INITIALISERS = ("googlenet", "inception_v3")
# Low scores are kept: with random weights all are low, and an empty list proves nothing.
ALL_SCORES = {"score_thresh": 0.0, "detections_per_img": 10}


def names() -> list[str]:
    """Return the names of all models of the installed version."""
    return list(torchvision.models.list_models())


def build(name: str) -> tuple[nn.Module, Any]:
    """Build a model without any download, and inputs for it, two samples where it can."""
    model = wake(torchvision.models.get_model(name, weights=None, **_options(name)))
    inputs = first_that_runs(model, _candidates(name))
    return model, infer_example_inputs(model) if inputs is None else inputs


def _options(name: str) -> dict[str, Any]:
    """Return what a constructor is given: no weights from elsewhere, and small sizes."""
    options: dict[str, Any] = {}
    if name in DETECTION | SEGMENTATION:
        options["weights_backbone"] = None
    if name in DETECTION:
        prefix = "box_" if "rcnn" in name else ""
        options |= {prefix + option: value for option, value in ALL_SCORES.items()}
        if not name.startswith("ssd"):  # which have one size
            options |= {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
    if name.startswith(SIZED):
        # A multiple of the patches of 14, 16 and 32.
        options["image_size"] = 56 if name.endswith("14") else 64
    if name.removeprefix("quantized_") in SLOW_INITIALISERS:
        options["init_weights"] = False
    return options


def _candidates(name: str) -> Iterator[Callable[[], Any]]:
    """Yield makers of inputs, smallest first."""
    if name in DETECTION:
        yield _detection
        return
    if name in FLOW:
        shapes = [[(BATCH, 3, size, size)] * 2 for size in FLOW_SIZES]
    elif name in VIDEO:
        shapes = [[(BATCH, 3, frames, size, size)] for frames, size in CLIPS]
    elif name.startswith(SIZED):
        size = _options(name)["image_size"]
        shapes = [[(BATCH, 3, size, size)]]
    else:
        shapes = [[(BATCH, 3, size, size)] for size in IMAGE_SIZES]
    for shape in shapes:
        yield lambda shape=shape: tuple(torch.rand(s) for s in shape)


def _detection() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images and targets; of the targets each detector reads what it is trained on."""
    size = DETECTION_SIZE
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 44.0]])
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    corners = [(x, y, 1.0) for x, y in itertools.product((25.0, 35.0), (15.0, 40.0))]
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 1]),
        "masks": masks,
        # Seventeen points of a person, visible all.
        "keypoints": torch.tensor([(corners * 5)[:17]] * 2),
    }
    images = [torch.rand(3, size, size) for _ in range(BATCH)]
    return images, [{key: value.clone() for key, value in target.items()} for _ in images]
