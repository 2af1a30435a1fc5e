"""Models from images to images: segmentation, super-resolution, diffusion."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]


def _images(size: int, channels: int = 3) -> Tensor:
    return torch.rand(BATCH, channels, size, size)


def _smp(kind: str, encoder: str, **options: Any) -> Built:
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, kind)(encoder, encoder_weights=None, classes=3, **options)
    return model, _images(64)


def _diffusers(kind: str, inputs: Any, **options: Any) -> Built:
    import diffusers

    return getattr(diffusers, kind)(**options), inputs


TIMES = torch.tensor([3, 7])


def _unet2d() -> Built:
    return _diffusers(
        "UNet2DModel",
        {"sample": _images(16), "timestep": TIMES},
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _unet2d_condition() -> Built:
    return _diffusers(
        "UNet2DConditionModel",
        {
            "sample": _images(16, 4),
            "timestep": TIMES,
            "encoder_hidden_states": torch.rand(BATCH, 5, 12),
        },
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def _unet1d() -> Built:
    return _diffusers(
        "UNet1DModel",
        {"sample": torch.rand(BATCH, 2, 64), "timestep": TIMES},
        sample_size=64,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
    )


def _kl() -> Built:
    return _diffusers(
        "AutoencoderKL",
        _images(32),
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _vq() -> Built:
    return _diffusers(
        "VQModel",
        _images(32),
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _tiny_autoencoder() -> Built:
    return _diffusers(
        "AutoencoderTiny",
        _images(32),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    )


def _dit() -> Built:
    return _diffusers(
        "DiTTransformer2DModel",
        {
            "hidden_states": _images(8, 4),
            "timestep": TIMES,
            "class_labels": torch.tensor([1, 2]),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    )


def _transformer2d() -> Built:
    return _diffusers(
        "Transformer2DModel",
        {"hidden_states": _images(8, 16), "encoder_hidden_states": torch.rand(BATCH, 5, 12)},
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=12,
    )


def _sd3() -> Built:
    return _diffusers(
        "SD3Transformer2DModel",
        {
            "hidden_states": _images(8, 4),
            "encoder_hidden_states": torch.rand(BATCH, 5, 12),
            "pooled_projections": torch.rand(BATCH, 20),
            "timestep": TIMES,
        },
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )


def _ddpm(kind: str) -> Built:
    import denoising_diffusion_pytorch as ddpm

    model = getattr(ddpm, kind)(dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=8, attn_heads=2)
    data = _images(16) if kind == "Unet" else torch.rand(BATCH, 3, 16)
    return model, (data, TIMES.float())


def _super_image(kind: str, config: str, **options: Any) -> Built:
    import super_image

    model: nn.Module = getattr(super_image, kind)(getattr(super_image, config)(scale=2, **options))
    return model, _images(16)


CONFIGURATIONS = (
    Configuration(
        "segmentation-models-pytorch",
        "Unet, resnet18",
        5,
        "encoder: 2 + 1 + 1 + 1",
        functools.partial(_smp, "Unet", "resnet18"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "FPN, mobilenet_v2",
        10,
        "encoder: 1 + 2 + 3 + 2 + 2",
        functools.partial(_smp, "FPN", "mobilenet_v2"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "DeepLabV3Plus, resnet18",
        5,
        "encoder: 2 + 1 + 1 + 1",
        functools.partial(_smp, "DeepLabV3Plus", "resnet18"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "UnetPlusPlus, efficientnet-b0",
        9,
        "encoder: 1 + 1 + 2 + 2 + 3",
        functools.partial(_smp, "UnetPlusPlus", "efficientnet-b0"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "Segformer, mit_b0",
        16,
        "encoder: attention and MLP of 4 x 2 layers",
        functools.partial(_smp, "Segformer", "mit_b0"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "Unet, timm mobilenetv3",
        6,
        "encoder: 1 + 2 + 1 + 2",
        functools.partial(_smp, "Unet", "timm-mobilenetv3_small_100"),
    ),
    Configuration(
        "segmentation-models-pytorch",
        "MAnet, resnet18",
        6,
        "encoder: 2 + 1 + 1 + 1, and the attention over positions",
        functools.partial(_smp, "MAnet", "resnet18"),
    ),
    Configuration(
        "diffusers",
        "UNet2DModel",
        11,
        "resnets 2 + 1 + 2, attentions 2 + 1 + 3; upwards the widths change",
        _unet2d,
    ),
    Configuration(
        "diffusers",
        "UNet2DConditionModel",
        29,
        "resnets 2 + 1 + 2; 6 transformers of 3 and one around each",
        _unet2d_condition,
    ),
    Configuration(
        "diffusers",
        "UNet1DModel",
        30,
        "resnets 2 + 3 + 2, 6, 2 + 2 + 1; attentions 3, 6, 3",
        _unet1d,
    ),
    Configuration("diffusers", "AutoencoderKL", 14, "encoder 2 + 1 + 3, decoder 3 + 3 + 2", _kl),
    Configuration("diffusers", "VQModel", 14, "encoder 2 + 1 + 3, decoder 3 + 3 + 2", _vq),
    Configuration(
        "diffusers",
        "AutoencoderTiny",
        10,
        "encoder 1 + 2 + 2, decoder 2 + 2 + 1",
        _tiny_autoencoder,
    ),
    Configuration("diffusers", "DiTTransformer2DModel", 6, "attention and MLP of 3 layers", _dit),
    Configuration(
        "diffusers",
        "Transformer2DModel",
        7,
        "3 of each of 2 layers, and one around them",
        _transformer2d,
    ),
    Configuration(
        "diffusers",
        "SD3Transformer2DModel",
        10,
        "attention and MLP of images and text: 4 + 4 + 2",
        _sd3,
    ),
    Configuration(
        "denoising-diffusion-pytorch",
        "Unet",
        11,
        "2 x 3 downwards, 3 in the middle, 2 attentions upwards",
        functools.partial(_ddpm, "Unet"),
    ),
    Configuration(
        "denoising-diffusion-pytorch",
        "Unet1D",
        11,
        "2 x 3 downwards, 3 in the middle, 2 attentions upwards",
        functools.partial(_ddpm, "Unet1D"),
    ),
    Configuration(
        "super-image",
        "EDSR",
        5,
        "4 blocks, and one around them",
        functools.partial(_super_image, "EdsrModel", "EdsrConfig", n_resblocks=4, n_feats=8),
    ),
    Configuration(
        "super-image",
        "CARN",
        9,
        "3 x 3 blocks",
        functools.partial(_super_image, "CarnModel", "CarnConfig"),
    ),
    Configuration(
        "super-image",
        "RCAN",
        7,
        "2 x 2 blocks, 2 groups, and one around them",
        functools.partial(
            _super_image,
            "RcanModel",
            "RcanConfig",
            n_resgroups=2,
            n_resblocks=2,
            n_feats=8,
            reduction=2,
        ),
    ),
)
