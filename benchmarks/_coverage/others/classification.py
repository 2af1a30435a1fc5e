"""Classifiers of images, and towers of images and text."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]


def _images(size: int, channels: int = 3) -> Tensor:
    return torch.rand(BATCH, channels, size, size)


VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "heads": 2, "mlp_dim": 32}


def _vit_pytorch(module: str, kind: str, size: int = 32, **options: Any) -> Built:
    made: nn.Module = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**options)
    return made, _images(size)


def _nest() -> Built:
    return _vit_pytorch(
        "nest",
        "NesT",
        image_size=32,
        patch_size=4,
        num_classes=5,
        dim=8,
        heads=2,
        num_hierarchies=3,
        block_repeats=(2, 1, 2),
    )


def _max_vit() -> Built:
    return _vit_pytorch(
        "max_vit",
        "MaxViT",
        size=64,
        num_classes=5,
        dim_conv_stem=8,
        dim=16,
        dim_head=8,
        depth=(2, 2),
        window_size=4,
        mbconv_expansion_rate=2,
        mbconv_shrinkage_rate=0.25,
    )


def _mobile_vit() -> Built:
    return _vit_pytorch(
        "mobile_vit",
        "MobileViT",
        size=64,
        image_size=(64, 64),
        dims=[16, 24, 32],
        channels=[8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
        num_classes=5,
    )


def _cvt() -> Built:
    stages: dict[str, Any] = {}
    for stage, (width, depth) in enumerate(((8, 1), (16, 2), (24, 2)), start=1):
        stages |= {f"s{stage}_emb_dim": width, f"s{stage}_heads": stage, f"s{stage}_depth": depth}
    return _vit_pytorch("cvt", "CvT", size=64, num_classes=5, **stages)


def _twins() -> Built:
    stages: dict[str, Any] = {}
    for stage, width in enumerate((8, 16, 24, 32), start=1):
        stages |= {
            f"s{stage}_emb_dim": width,
            f"s{stage}_local_patch_size": 2,
            f"s{stage}_global_k": 2,
        }
    stages["s3_depth"] = 2
    stages |= {"s1_patch_size": 2, "s4_local_patch_size": 1}
    return _vit_pytorch("twins_svt", "TwinsSVT", size=64, num_classes=5, **stages)


def _cct() -> Built:
    return _vit_pytorch(
        "cct",
        "CCT",
        img_size=32,
        embedding_dim=16,
        n_conv_layers=2,
        num_layers=3,
        num_heads=2,
        mlp_ratio=2,
        num_classes=5,
        positional_embedding="learnable",
    )


def _pytorchcv(name: str, size: int = 64) -> Built:
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False), _images(size)


def _efficientnet() -> Built:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=5), _images(64)


def _mixer() -> Built:
    from mlp_mixer_pytorch import MLPMixer

    mixer = MLPMixer(image_size=32, channels=3, patch_size=8, dim=16, depth=3, num_classes=5)
    return mixer, _images(32)


def _g_mlp() -> Built:
    from g_mlp_pytorch import gMLPVision

    return (
        gMLPVision(image_size=32, patch_size=8, num_classes=5, dim=16, depth=3, attn_dim=8),
        _images(32),
    )


def _in_lightning(name: str, size: int) -> Built:
    import timm
    from lightning import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = timm.create_model(name, num_classes=5)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier(), _images(size)


def _xrv(kind: str) -> Built:
    import torchxrayvision

    if kind == "DenseNet":
        return torchxrayvision.models.DenseNet(weights=None), _images(64, channels=1)
    model = torchxrayvision.autoencoders.ResNetAE50()
    return model, _images(224, channels=1)


def _open_clip(**vision: Any) -> Built:
    import open_clip

    text = {"context_length": 8, "vocab_size": 49, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={
            "image_size": 32,
            "layers": 3,
            "width": 16,
            "patch_size": 8,
            "head_width": 8,
            **vision,
        },
        text_cfg=text,
    )
    return model, (_images(32), torch.randint(1, 49, (BATCH, 8)))


def _coca() -> Built:
    import open_clip

    text = {"context_length": 9, "vocab_size": 49, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CoCa(
        embed_dim=16,
        multimodal_cfg={**text, "layers": 2, "context_length": 8},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg={
            "image_size": 32,
            "layers": 2,
            "width": 16,
            "patch_size": 8,
            "head_width": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
    )
    return model, (_images(32), torch.randint(1, 49, (BATCH, 8)))


CONFIGURATIONS = (
    Configuration(
        "vit-pytorch",
        "ViT",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_vit_pytorch, "vit", "ViT", depth=3, **VIT),
    ),
    Configuration(
        "vit-pytorch",
        "SimpleViT",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_vit_pytorch, "simple_vit", "SimpleViT", depth=3, **VIT),
    ),
    Configuration(
        "vit-pytorch",
        "DeepViT",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_vit_pytorch, "deepvit", "DeepViT", depth=3, **VIT),
    ),
    Configuration(
        "vit-pytorch",
        "CaiT",
        6,
        "attention and MLP of 2 + 1 layers",
        functools.partial(_vit_pytorch, "cait", "CaiT", depth=2, cls_depth=1, **VIT),
    ),
    Configuration("vit-pytorch", "CCT", 6, "attention and MLP of 3 layers", _cct),
    Configuration("vit-pytorch", "NesT", 10, "attention and MLP of 2 + 1 + 2 layers", _nest),
    Configuration(
        "vit-pytorch",
        "MaxViT",
        18,
        "block and grid attention, each with an MLP, of 4 layers, and 2 MBConv",
        _max_vit,
    ),
    Configuration(
        "vit-pytorch",
        "MobileViT",
        21,
        "3 MV2 blocks; attention and MLP of 2 + 4 + 3 layers",
        _mobile_vit,
    ),
    Configuration("vit-pytorch", "CvT", 10, "attention and MLP of 1 + 2 + 2 layers", _cvt),
    Configuration(
        "vit-pytorch",
        "TwinsSVT",
        42,
        "local and global: 4 a layer, 2 in the last stage; 9 + 9 + 13 + 11 with position",
        _twins,
    ),
    Configuration(
        "pytorchcv",
        "preresnet20_cifar10",
        7,
        "3 + 2 + 2",
        functools.partial(_pytorchcv, "preresnet20_cifar10", 32),
    ),
    Configuration(
        "pytorchcv",
        "seresnet20_cifar10",
        7,
        "3 + 2 + 2",
        functools.partial(_pytorchcv, "seresnet20_cifar10", 32),
    ),
    Configuration(
        "pytorchcv",
        "resdropresnet20_cifar10",
        7,
        "3 + 2 + 2, each multiplied by a random number in train mode",
        functools.partial(_pytorchcv, "resdropresnet20_cifar10", 32),
    ),
    Configuration(
        "pytorchcv",
        "mobilenetv3_small_w7d20",
        7,
        "1 + 4 + 2: widths 40 and 48 round to one",
        functools.partial(_pytorchcv, "mobilenetv3_small_w7d20", 224),
    ),
    Configuration("efficientnet-pytorch", "efficientnet-b0", 9, "1 + 1 + 2 + 2 + 3", _efficientnet),
    Configuration("mlp-mixer-pytorch", "MLPMixer", 6, "tokens and channels of 3 layers", _mixer),
    Configuration("g-mlp-pytorch", "gMLPVision", 3, "one of each of 3 layers", _g_mlp),
    Configuration(
        "lightning",
        "timm resnet18 inside",
        5,
        "2 + 1 + 1 + 1",
        functools.partial(_in_lightning, "resnet18", 64),
    ),
    Configuration(
        "lightning",
        "timm test_vit inside",
        12,
        "attention and MLP of 6 layers",
        functools.partial(_in_lightning, "test_vit", 160),
    ),
    Configuration(
        "torchxrayvision",
        "DenseNet",
        0,
        "concatenates",
        functools.partial(_xrv, "DenseNet"),
    ),
    Configuration(
        "torchxrayvision",
        "ResNetAE50",
        24,
        "2 + 3 + 5 + 2, down and up",
        functools.partial(_xrv, "ResNetAE"),
    ),
    Configuration("open-clip-torch", "ViT", 10, "attention and MLP of 3 + 2 layers", _open_clip),
    Configuration(
        "open-clip-torch",
        "ModifiedResNet",
        6,
        "1 + 0 + 1 + 0 of the images, attention and MLP of 2 layers of the text",
        functools.partial(_open_clip, layers=(2, 1, 2, 1), width=8, patch_size=None),
    ),
    Configuration(
        "open-clip-torch",
        "CoCa",
        16,
        "attention and MLP of 2 + 2 + 2 layers and of 2 that attend to the image",
        _coca,
    ),
)
