"""Detectors, and other models that find things in images."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]

SIZE = 64


def _yolo(kind: str, file: str, *, is_evaluated: bool = False, **options: Any) -> Built:
    # The library looks for newer versions of itself, and for a folder for its settings.
    os.environ["YOLO_OFFLINE"] = "true"
    from ultralytics.nn import tasks

    model: nn.Module = getattr(tasks, kind)(f"{file}.yaml", ch=3, verbose=False, **options)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    if is_evaluated:
        # The head now holds the anchors of this size.
        with torch.no_grad():
            model.eval()(images)
    return model, images


def _sam_encoder() -> Built:
    from segment_anything.modeling import ImageEncoderViT

    encoder = ImageEncoderViT(
        img_size=64,
        patch_size=16,
        embed_dim=16,
        depth=3,
        num_heads=2,
        out_chans=8,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(2,),
    )
    return encoder, torch.rand(BATCH, 3, 64, 64)


def _sam_decoder() -> Built:
    from segment_anything.modeling import MaskDecoder, TwoWayTransformer

    decoder = MaskDecoder(
        transformer_dim=16,
        transformer=TwoWayTransformer(depth=2, embedding_dim=16, num_heads=2, mlp_dim=32),
        iou_head_hidden_dim=16,
    )
    inputs = {
        "image_embeddings": torch.rand(1, 16, 4, 4),
        "image_pe": torch.rand(1, 16, 4, 4),
        "sparse_prompt_embeddings": torch.rand(BATCH, 3, 16),
        "dense_prompt_embeddings": torch.rand(BATCH, 16, 4, 4),
        "multimask_output": True,
    }
    return decoder, inputs


def _yolos() -> list[Configuration]:
    kinds = {
        "detection": ("DetectionModel", "yolov8n", 6, "C2f of the backbone: 1 + 2 + 2 + 1"),
        "segmentation": (
            "SegmentationModel",
            "yolov8n-seg",
            6,
            "C2f of the backbone: 1 + 2 + 2 + 1",
        ),
        "classification": ("ClassificationModel", "yolov8n-cls", 6, "C2f: 1 + 2 + 2 + 1"),
    }
    return [
        Configuration(
            "ultralytics",
            f"{file}, {'after an evaluation' if is_evaluated else 'fresh'}",
            branches,
            why,
            functools.partial(_yolo, kind, file, is_evaluated=is_evaluated),
        )
        for kind, file, branches, why in kinds.values()
        for is_evaluated in (False, True)
    ]


CONFIGURATIONS = (
    *_yolos(),
    Configuration(
        "ultralytics",
        "yolo11n, fresh",
        13,
        "Bottlenecks 2 + 2 x 2 + 3 + 2, and attention and MLP of C2PSA",
        functools.partial(_yolo, "DetectionModel", "yolo11n"),
    ),
    Configuration(
        "ultralytics",
        "yolo11n, after an evaluation",
        13,
        "Bottlenecks 2 + 2 x 2 + 3 + 2, and attention and MLP of C2PSA",
        functools.partial(_yolo, "DetectionModel", "yolo11n", is_evaluated=True),
    ),
    Configuration(
        "ultralytics",
        "yolov8n-pose, after an evaluation",
        6,
        "C2f of the backbone: 1 + 2 + 2 + 1",
        functools.partial(_yolo, "PoseModel", "yolov8n-pose", is_evaluated=True),
    ),
    Configuration(
        "segment-anything", "ImageEncoderViT", 6, "attention and MLP of 3 layers", _sam_encoder
    ),
    Configuration(
        "segment-anything",
        "MaskDecoder",
        8,
        "3 + 4 of two layers, 1 after them; adding a position is no branch",
        _sam_decoder,
    ),
)
