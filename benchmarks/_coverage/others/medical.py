"""Models of volumes (MONAI) and of brain signals (Braindecode)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]

EEG = {"n_chans": 8, "n_outputs": 3, "n_times": 400, "sfreq": 100}


def _volumes(size: int = 32) -> Tensor:
    return torch.rand(BATCH, 1, size, size, size)


def _monai(kind: str, inputs: Any, **options: Any) -> Built:
    from monai.networks import nets

    made: nn.Module = getattr(nets, kind)(**options)
    return made, inputs


def _swin_unetr() -> Built:
    return _monai(
        "SwinUNETR",
        _volumes(64),
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 2),
        window_size=4,
    )


def _unetr() -> Built:
    return _monai(
        "UNETR",
        _volumes(),
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=4,
        hidden_size=16,
        mlp_dim=32,
        num_heads=2,
    )


def _segresnet(kind: str, **options: Any) -> Built:
    return _monai(
        kind, _volumes(16), spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, **options
    )


def _unet() -> Built:
    return _monai(
        "UNet",
        _volumes(16),
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(4, 8, 16),
        strides=(2, 2),
        num_res_units=2,
    )


def _vit() -> Built:
    return _monai(
        "ViT",
        _volumes(16),
        in_channels=1,
        img_size=(16, 16, 16),
        patch_size=(8, 8, 8),
        hidden_size=16,
        mlp_dim=32,
        num_layers=3,
        num_heads=2,
        classification=True,
    )


def _dynunet() -> Built:
    return _monai(
        "DynUNet",
        _volumes(16),
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 1, 2],
        upsample_kernel_size=[1, 2],
        filters=[8, 8, 16],
        res_block=True,
    )


def _resnet() -> Built:
    return _monai(
        "ResNet",
        _volumes(),
        block="basic",
        layers=[2, 2, 2, 2],
        block_inplanes=[8, 16, 32, 64],
        spatial_dims=3,
        n_input_channels=1,
        num_classes=3,
    )


def _vnet() -> Built:
    images = torch.rand(BATCH, 1, 32, 32)
    return _monai("VNet", images, spatial_dims=2, in_channels=1, out_channels=2)


def _mednext() -> Built:
    return _monai(
        "MedNeXt",
        _volumes(16),
        spatial_dims=3,
        init_filters=4,
        in_channels=1,
        out_channels=2,
        encoder_expansion_ratio=2,
        decoder_expansion_ratio=2,
        bottleneck_expansion_ratio=2,
        kernel_size=3,
        blocks_down=(2, 1),
        blocks_bottleneck=2,
        blocks_up=(1, 2),
        use_residual_connection=True,
    )


def _diffusion() -> Built:
    inputs = {"x": torch.rand(BATCH, 1, 16, 16), "timesteps": torch.tensor([3, 7])}
    return _monai(
        "DiffusionModelUNet",
        inputs,
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        attention_levels=(False, True),
        num_res_blocks=2,
        num_head_channels=8,
        norm_num_groups=4,
    )


def _braindecode(kind: str, **options: Any) -> Built:
    from braindecode import models

    settings = {**EEG, **options}
    model: nn.Module = getattr(models, kind)(**settings)
    return model, torch.rand(BATCH, settings["n_chans"], settings["n_times"])


CONFIGURATIONS = (
    Configuration(
        "monai", "SwinUNETR", 20, "attention and MLP of 4 x 2 layers, 4 encoders", _swin_unetr
    ),
    Configuration(
        "monai", "UNETR", 27, "attention and MLP of 12 layers, 2 + 1 in the encoders", _unetr
    ),
    Configuration(
        "monai",
        "SegResNet",
        15,
        "blocks 1 + 2 + 2 + 4 + 3, and 3 connections across, around what is deeper",
        functools.partial(_segresnet, "SegResNet"),
    ),
    Configuration(
        "monai",
        "SegResNetDS",
        9,
        "blocks 1 + 2 + 2 + 2, and 2 connections across, around what is deeper",
        functools.partial(_segresnet, "SegResNetDS", blocks_down=(1, 2, 2)),
    ),
    Configuration(
        "monai",
        "UNet",
        2,
        "the units of the way up; the others have a convolution beside them",
        _unet,
    ),
    Configuration("monai", "ViT", 6, "attention and MLP of 3 layers", _vit),
    Configuration("monai", "DynUNet", 1, "the block that keeps width and size", _dynunet),
    Configuration("monai", "resnet18 of volumes", 5, "2 + 1 + 1 + 1", _resnet),
    Configuration("monai", "VNet", 8, "4 downwards, 4 upwards", _vnet),
    Configuration(
        "monai",
        "MedNeXt",
        10,
        "blocks 2 + 1 + 2 + 1 + 2, and 2 connections across, around what is deeper",
        _mednext,
    ),
    Configuration(
        "monai",
        "DiffusionModelUNet",
        11,
        "resnets 2 + 1 + 2, attentions 2 + 1 + 3; upwards the widths change",
        _diffusion,
    ),
    Configuration(
        "braindecode",
        "EEGConformer",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_braindecode, "EEGConformer", num_layers=3, num_heads=2),
    ),
    Configuration(
        "braindecode",
        "ATCNet",
        12,
        "4 windows: one attention and two temporal blocks each",
        functools.partial(_braindecode, "ATCNet", n_times=500, sfreq=125),
    ),
    Configuration(
        "braindecode",
        "BIOT",
        4,
        "attention and MLP of 2 layers",
        functools.partial(_braindecode, "BIOT", num_layers=2, embed_dim=16, num_heads=2),
    ),
    Configuration(
        "braindecode",
        "EEGNet",
        0,
        "adds nothing",
        functools.partial(_braindecode, "EEGNet"),
    ),
    Configuration(
        "braindecode",
        "BDTCN",
        2,
        "2 of 3 temporal blocks; the first changes the width",
        functools.partial(_braindecode, "BDTCN"),
    ),
)
